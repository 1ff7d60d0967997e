"""Documents that remember what they held when they were read: for looking at data."""

import re
import zlib
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from t5g2.data.image_examples import ImageExample, ImageExamples
from t5g2.data.mixture import TokenSource
from t5g2.data.tokenizer import Tokenizer

# Text that compresses to less than this share of its bytes says the same over and over; prose and
# program text compress to a quarter or half. Short texts say little either way.
REPETITIVE = 0.1
_SHORTEST_JUDGED, _LONGEST_JUDGED = 1000, 1 << 20
# Bytes that are no UTF-8 read as this, here and wherever a text was decoded before.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Note(NamedTuple):
    """What is known of a document.

    Attributes:
        tokens: of all of it.
        byte_tokens: those among them that stand for one byte of a character without a piece.
        replacements: its U+FFFD characters.
        repetitive: whether it says the same over and over.
    """

    tokens: int
    byte_tokens: int
    replacements: int
    repetitive: bool


class WatchedDocuments:
    """The documents of a source as they are, with a note on each that is read.

    Attributes:
        notes: by the documents' numbers.
    """

    def __init__(
        self,
        documents: TokenSource | ImageExamples,
        tokenizer: Tokenizer,
        is_byte: Bool[np.ndarray, " vocabulary"],
    ) -> None:
        """Takes the documents, what they were tokenised with, and which ids stand for bytes."""
        self.notes: dict[int, Note] = {}
        self._documents: Any = documents
        self._tokenizer = tokenizer
        self._is_byte = is_byte

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Int[np.ndarray, " n"]:
        tokens = self._documents[index]
        self._note(index, tokens, tokens)
        return tokens

    def example(self, index: int) -> ImageExample:
        """An example of images and text; the note is on its text behind the images."""
        example: ImageExample = self._documents.example(index)
        self._note(index, example.ids, example.ids[example.prefix :])
        return example

    def __getattr__(self, name: str) -> Any:
        """Everything else that documents have, such as `sequential`."""
        return getattr(self._documents, name)

    def _note(
        self, index: int, tokens: Int[np.ndarray, " n"], text_tokens: Int[np.ndarray, " m"]
    ) -> None:
        if index in self.notes:
            return
        text = self._tokenizer.decode(text_tokens)
        content = text.encode()[:_LONGEST_JUDGED]
        self.notes[index] = Note(
            tokens=len(tokens),
            byte_tokens=int(self._is_byte[text_tokens].sum()),
            replacements=text.count(REPLACEMENT),
            repetitive=len(content) >= _SHORTEST_JUDGED
            and len(zlib.compress(content)) < REPETITIVE * len(content),
        )


def byte_pieces(tokenizer: Tokenizer) -> Bool[np.ndarray, " vocabulary"]:
    """Which ids stand for a single byte, by the names that Gemma's tokenizers give them."""
    pieces = map(tokenizer.id_to_piece, range(tokenizer.vocab_size))
    return np.array([re.fullmatch("<0x[0-9A-F]{2}>", piece) is not None for piece in pieces])
