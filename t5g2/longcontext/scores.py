"""How right an answer is: RULER's string matches and MRCR's ratio, from 0 to 1."""

from collections.abc import Sequence
from difflib import SequenceMatcher


def match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that the answer holds, in whichever case: RULER's for most tasks."""
    said = answer.lower()
    return sum(reference.lower() in said for reference in references) / len(references)


def match_part(answer: str, references: Sequence[str]) -> float:
    """1 if the answer holds any of the references: RULER's for question answering."""
    said = answer.lower()
    return float(any(reference.lower() in said for reference in references))


def ratio_after_mark(answer: str, references: Sequence[str]) -> float:
    """Likeness to the reference behind the mark, 0 without the mark: MRCR's as OpenAI grades it.

    Args:
        answer: white space around it does not count.
        references: the right answer, which begins with the mark; and the mark.
    """
    right, mark = references
    said = answer.strip()
    if not said.startswith(mark):
        return 0.0
    return SequenceMatcher(None, said.removeprefix(mark), right.removeprefix(mark)).ratio()
