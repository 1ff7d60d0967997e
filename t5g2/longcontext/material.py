"""What problems are made of: text to hide things in, and questions with their paragraphs."""

import dataclasses
import json
from pathlib import Path

from t5g2.errors import UserError
from t5g2.longcontext.haystack import Haystack


@dataclasses.dataclass(frozen=True)
class Question:
    """A question that a paragraph answers.

    Attributes:
        question: it.
        answers: texts any of which is right; the first is the one whose likelihood counts.
        paragraph: where the answer is found.
    """

    question: str
    answers: tuple[str, ...]
    paragraph: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Material:
    """What is given to all families.

    Attributes:
        haystack: text; None: families that need some cannot be made.
        questions: for question answering.
    """

    haystack: Haystack | None = None
    questions: tuple[Question, ...] = ()

    def text(self) -> Haystack:
        """The haystack.

        Raises:
            UserError: there is none.
        """
        if self.haystack is None:
            raise UserError("needs text to hide things in: give --haystack")
        return self.haystack


def read_questions(path: Path) -> tuple[Question, ...]:
    """Reads lines of JSON, `{"question": "...", "answers": ["..."], "paragraph": "..."}` each.

    Raises:
        UserError: naming the line that is something else, or fewer than two paragraphs.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"questions {path} cannot be read: {error}") from None
    found = [_question(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line]
    if len({question.paragraph for question in found}) < 2:
        raise UserError(f"questions {path}: fewer than two paragraphs, so nothing distracts")
    return tuple(found)


def _question(line: str, place: str) -> Question:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: not a JSON object")
    for field in ("question", "paragraph"):
        if not isinstance(record.get(field), str) or not record[field]:
            raise UserError(f"{place}: field {field!r} is missing or no text")
    answers = record.get("answers")
    texts = answers if isinstance(answers, list) else []
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"{place}: field 'answers' is not a list of texts")
    return Question(record["question"], tuple(texts), record["paragraph"])
