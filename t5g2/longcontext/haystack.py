"""The text that needles are hidden in."""

import re
from collections.abc import Iterable
from pathlib import Path

from t5g2.errors import UserError

# RULER's noise (arXiv:2404.06654, table 2), after Mohtashami and Jaggi (arXiv:2305.16300).
NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)
# Needles stand between sentences. Text without full stops is taken in stretches of so many
# characters.
_LONGEST_SENTENCE = 400
_SENTENCE_END = re.compile(r"(?<=[.!?]) ")
# More text of a corpus than any length needs is not read: about four million tokens.
_MOST_CHARACTERS = 16_000_000


class Haystack:
    """Endless text: a given one over and over.

    Attributes:
        name: what it is called in reports.
    """

    def __init__(self, name: str, text: str) -> None:
        """Takes the text; runs of white space in it become single spaces, as in RULER.

        Raises:
            UserError: there is no text.
        """
        self.name = name
        self._text = " ".join(text.split())
        if not self._text:
            raise UserError(f"haystack {name}: no text")

    def text(self, start: int, size: int) -> str:
        """`size` characters from character `start` on, which begins with a word."""
        start %= len(self._text)
        start = self._text.rfind(" ", 0, start) + 1
        found = self._text[start : start + size]
        missing = size - len(found)
        repeats = -(-missing // (len(self._text) + 1))
        return found + (f" {self._text}" * repeats)[:missing]

    def __len__(self) -> int:
        """Characters before it repeats itself."""
        return len(self._text)


def sentences(text: str) -> list[str]:
    """The sentences of a text with single spaces; joined by spaces they are the text again."""
    found = []
    for sentence in _SENTENCE_END.split(text) if text else []:
        while len(sentence) > _LONGEST_SENTENCE:
            cut = sentence.rfind(" ", 0, _LONGEST_SENTENCE)
            if cut < 1:
                break
            found.append(sentence[:cut])
            sentence = sentence[cut + 1 :]
        found.append(sentence)
    return found


def read_haystack(path: Path) -> Haystack:
    """The text of a file, or of all `.txt` and `.md` files of a directory in the order of names.

    Raises:
        UserError: nothing there, or nothing that can be read as text.
    """
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
        if not files:
            raise UserError(f"haystack {path}: no .txt or .md file in this directory")
    try:
        return collected(str(path), (file.read_text(encoding="utf-8") for file in files))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"haystack {path} cannot be read: {error}") from None


def collected(name: str, documents: Iterable[str]) -> Haystack:
    """A haystack of documents, as many as are ever needed."""
    texts, size = [], 0
    for document in documents:
        texts.append(document)
        size += len(document)
        if size >= _MOST_CHARACTERS:
            break
    return Haystack(name, "\n".join(texts))
