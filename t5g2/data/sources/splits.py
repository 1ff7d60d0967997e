"""Which records are kept from training, and where long texts are cut."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from t5g2.data.sampling import key

# Records are hashed in blocks of so many.
_BLOCK = 1 << 16


class Numbers(Protocol):
    """Record numbers, ascending, by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> int: ...


class Without:
    """The numbers below `size` but for some: as little memory as these take."""

    def __init__(self, left_out: Int64[np.ndarray, " n"], size: int) -> None:
        """Takes the ascending numbers that are left out, all below `size`."""
        self._size = size - len(left_out)
        # How many of the others stand before each one left out.
        self._before = left_out - np.arange(len(left_out))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._size:
            raise IndexError(index)
        return index + int(np.searchsorted(self._before, index, side="right"))


def heldout_of_names(names: Sequence[str], share: float) -> Int64[np.ndarray, " heldout"]:
    """Numbers of the files that are held out: a file's name alone decides."""
    threshold = share * 2**32
    hashes = (zlib.crc32(name.encode(errors="surrogateescape")) for name in names)
    return np.array([i for i, value in enumerate(hashes) if value < threshold], np.int64)


def heldout_of_numbers(source: str, size: int, share: float) -> Int64[np.ndarray, " heldout"]:
    """Numbers of the records that are held out: the source's name and the number decide."""
    found = [
        start + np.flatnonzero(_heldout(source, start, min(start + _BLOCK, size), share))
        for start in range(0, size, _BLOCK)
    ]
    return np.concatenate([np.empty(0, np.int64), *found]).astype(np.int64)


def heldout_flags(source: str, share: float) -> Iterator[bool]:
    """Of record 0, 1, 2, ..., without end, whether it is held out."""
    start = 0
    while True:
        yield from _heldout(source, start, start + _BLOCK, share).tolist()
        start += _BLOCK


def _heldout(source: str, start: int, stop: int, share: float) -> Bool[np.ndarray, " n"]:
    numbers = np.arange(start, stop, dtype=np.uint64)
    return (_mix(numbers + np.uint64(key("heldout", source))) >> np.uint64(32)) < share * 2**32


def _mix(z: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """SplitMix64's generator (Steele et al., OOPSLA 2014) at its z-th step."""
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def line_splits(content: bytes, split_bytes: int | None) -> list[slice]:
    """Where the documents in a text lie: whole lines, of at most `split_bytes` if they can be.

    Linear in the length of the text, also if it is one line.
    """
    if split_bytes is None or len(content) <= split_bytes:
        return [slice(0, len(content))]
    parts, start, end = [], 0, 0
    for line in content.splitlines(keepends=True):
        if end > start and end + len(line) - start > split_bytes:
            parts.append(slice(start, end))
            start = end
        end += len(line)
    return [*parts, slice(start, end)]
