"""Which task and which document come next: pure functions of seed and counters, no state."""

import functools
import hashlib

import numpy as np
from jaxtyping import Float64, Int

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
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._half = max((size - 1).bit_length() + 1, 2) // 2
        self._rounds = [(seed + i) * 0x9E3779B97F4A7C15 + 1 & _ONES for i in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where `index` is sent."""
        half = self._half
        mask = (1 << half) - 1
        while True:
            left, right = index >> half, index & mask
            for constant in self._rounds:
                z = right * 0xD1342543DE82EF95 + constant & _ONES
                z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _ONES
                z = (z ^ z >> 27) * 0x94D049BB133111EB & _ONES
                left, right = right, left ^ (z ^ z >> 31) & mask
            index = left << half | right
            if index < self._size:
                return index


@functools.lru_cache(maxsize=4096)
def epoch_order(seed: int, epoch: int, size: int) -> Permutation:
    """The order of a source's documents in an epoch."""
    return Permutation(size, key(seed, epoch))


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
