"""Packed rows of T5Gemma 2's UL2 mixture over any text, for benchmarks; needs numpy alone."""

import re
import zlib
from collections.abc import Iterator

import numpy as np

from t5g2.data.mixture import Mixture, Source, TokenSource
from t5g2.data.packing import RowStream
from t5g2.data.ul2 import SpecialTokens

SPECIAL = SpecialTokens(2, 1, range(256_002, 256_002 + 4096))

Documents = list[np.ndarray]
Examples = list[tuple[np.ndarray, np.ndarray]]


def tokens_of(text: str) -> np.ndarray:
    """A word or a sign a token, int32."""
    words = re.findall(r"\w+|[^\w\s]|\s+", text)
    return np.array([1000 + zlib.crc32(word.encode()) % 250_000 for word in words], np.int32)


def joined(documents: Documents, length: int) -> Documents:
    """Documents laid end to end until each has at least `length` tokens."""
    made, held, size = [], [], 0
    for document in documents:
        held.append(document)
        size += len(document)
        if size >= length:
            made.append(np.concatenate(held))
            held, size = [], 0
    return made


def stream_of(documents: TokenSource, length: int, rows: int) -> RowStream:
    """Rows of the mixture."""
    mixture = Mixture(sources=(Source(name="text", documents=documents),), special=SPECIAL)
    return RowStream(mixture, rows, length, length, seed=0)


def examples_of(stream: RowStream) -> Iterator[Examples]:
    """Inputs and targets of the examples that stand in each batch, row by row."""
    cursors = stream.start()
    while True:
        examples: Examples = []
        for row in range(stream.rows):
            pieces, cursors[row] = stream.next_row(row, cursors[row])
            examples += [(piece.example.inputs, piece.example.targets) for piece in pieces]
        yield examples
