"""Which task and which document come next: pure functions of seed and counters, no state."""

import functools
import hashlib
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
from jaxtyping import Float64, Int, UInt64

# About so many draws of rows side by side are computed at once, and at least so many of each row.
DRAWS_AT_ONCE = 1024
FEWEST_DRAWS = 16

Index = TypeVar("Index", int, UInt64[np.ndarray, " n"])

_BITS = 32
_ROUNDS = 6
_ONES = 0xFFFFFFFFFFFFFFFF
_REVERSED = np.array([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], np.uint8)


def key(*parts: object) -> int:
    """A 64-bit key from any parts: seeds, names, epochs."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Permutation:
    """A keyed permutation of range(size).

    A Feistel network on the smallest even number of bits that holds `size`, walked until it lands
    inside (Black and Rogaway, CT-RSA 2002, section 3): O(1), nothing to store or shuffle. Its
    rounds hash by the finaliser of SplitMix64 (Steele et al., OOPSLA 2014).

    Attributes:
        rounds: a constant of each of the network's rounds.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self.rounds = [(seed + i) * 0x9E3779B97F4A7C15 + 1 & _ONES for i in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where `index` is sent."""
        half = _half(self._size)
        while True:
            index = _feistel(index, half, self.rounds)
            if index < self._size:
                return index


def _half(size: int) -> int:
    """Half of the bits that a network needs."""
    return max((size - 1).bit_length() + 1, 2) // 2


def _feistel(index: Index, half: int, rounds: Iterable[Index]) -> Index:
    """Where a network sends a number, or each of many by constants of its own."""
    mask = (1 << half) - 1
    left, right = index >> half, index & mask
    for constant in rounds:
        z = right * 0xD1342543DE82EF95 + constant & _ONES
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _ONES
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _ONES
        left, right = right, left ^ (z ^ z >> 31) & mask
    return left << half | right


@functools.lru_cache(maxsize=4096)
def epoch_order(seed: int, epoch: int, size: int) -> Permutation:
    """The order of a source's documents in an epoch."""
    return Permutation(size, key(seed, epoch))


class Draws:
    """Which documents of a source rows draw: each once per epoch."""

    def __init__(self, seed: int, size: int, rows: int, shuffled: bool) -> None:
        """Takes the seed and the number of the documents, and the number of all rows.

        Without shuffling documents come in their own order in each epoch.
        """
        self._seed, self._size, self._rows, self._shuffled = seed, size, rows, shuffled
        # Of rows that go on side by side: from which draw on the next ones are known, and which.
        self._side_by_side = range(0)
        self._begins = np.zeros(0, np.int64)
        self._known = np.zeros((0, 0), np.int64)

    def __call__(self, row: int, draw: int) -> int:
        """Number of the document that is the `draw`-th of a row."""
        epoch, index = divmod(draw * self._rows + row, self._size)
        return epoch_order(self._seed, epoch, self._size)(index) if self._shuffled else index

    def among(self, rows: range, draws: Int[np.ndarray, " rows"], row: int, draw: int) -> int:
        """The same, faster: computed for all rows that go on side by side.

        Args:
            rows: these rows.
            draws: where they are.
            row: one of them.
            draw: of this one, as `draws` has it or a few after that.
        """
        place = row - rows.start
        if rows == self._side_by_side:
            ahead = draw - self._begins.item(place)
            if 0 <= ahead < self._known.shape[1]:
                return self._known.item(place, ahead)
        # A row alone may be one of many that are asked for in turn.
        if len(rows) == 1 or draw != draws[place]:
            return self(row, draw)
        self._side_by_side, self._begins = rows, draws.copy()
        following = np.arange(max(DRAWS_AT_ONCE // len(rows), FEWEST_DRAWS))
        self._known = self._next(np.array(rows)[:, None], draws[:, None] + following)
        return self._known.item(place, 0)

    def _next(
        self, row: Int[np.ndarray, "rows 1"], draw: Int[np.ndarray, "rows draws"]
    ) -> Int[np.ndarray, "rows draws"]:
        epoch, index = np.divmod(draw * self._rows + row, self._size)
        if not self._shuffled:
            return index
        epochs, which = np.unique(epoch, return_inverse=True)
        orders = [epoch_order(self._seed, epoch, self._size) for epoch in epochs.tolist()]
        rounds = np.array([order.rounds for order in orders], np.uint64).T[:, which]
        half, number = _half(self._size), index.astype(np.uint64)
        outside = np.full(index.shape, True)
        while outside.any():
            number[outside] = _feistel(number[outside], half, rounds[:, outside])
            outside = number >= self._size
        return number.astype(np.int64)


def low_discrepancy(
    index: Int[np.ndarray, "*n"], shift: Int[np.ndarray, "*n"]
) -> Float64[np.ndarray, "*n"]:
    """The `index`-th points of the van der Corput sequence in base 2, rotated by `shift` / 2**32.

    Any stretch of it covers [0, 1) evenly, so a task of rate p gets p of the examples not only on
    average but to within a few examples at any time.
    """
    # The bytes as they are, little end first, read as big end first: their order is reversed.
    octets = (np.asarray(index) & 0xFFFFFFFF).astype("<u4")[..., None].view(np.uint8)
    reversed_bits = _REVERSED[octets].view(">u4")[..., 0]
    return ((reversed_bits + np.asarray(shift)) & 0xFFFFFFFF) / 2**_BITS


# The golden ratio's fractional part, of 2**32.
_GOLDEN = 0x9E3779B9


class TaskChoice:
    """Picks the tasks of examples j of rows r by the tasks' rates."""

    def __init__(self, rates: Float64[np.ndarray, " tasks"], seed: int) -> None:
        self._bounds = np.cumsum(rates / np.sum(rates))[:-1]
        self._shift = key("task", seed) & 0xFFFFFFFF

    def __call__(
        self, row: int | Int[np.ndarray, "*n"], index: int | Int[np.ndarray, "*n"]
    ) -> Int[np.ndarray, "*n"]:
        """The tasks' numbers."""
        # Rows start at points that are spread evenly, and off the lattice that examples walk on.
        row_shift = np.asarray(row) * _GOLDEN & 0xFFFFFFFF
        point = low_discrepancy(np.asarray(index), self._shift + row_shift)
        return np.searchsorted(self._bounds, point, "right")
