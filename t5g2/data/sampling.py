"""Which task and which document come next: pure functions of seed and counters, no state."""

import bisect
import hashlib

import numpy as np
from jaxtyping import Float64

_BITS = 32
_ROUNDS = 6
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def key(*parts: object) -> int:
    """A 64-bit key from any parts: seeds, names, epochs."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def permute(index: int, size: int, seed: int) -> int:
    """Where a keyed permutation of range(size) sends `index`.

    A Feistel network on the smallest even number of bits that holds `size`, walked until it lands
    inside (Black and Rogaway, CT-RSA 2002, section 3): O(1), nothing to store or shuffle.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for i in range(_ROUNDS):
            left, right = right, left ^ (_mix(seed + i, right) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(seed: int, value: int) -> int:
    """A 64-bit hash of two integers: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + value * 0xD1342543DE82EF95 + 1) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ z >> 31


def low_discrepancy(index: int, shift: int) -> float:
    """The `index`-th point of the van der Corput sequence in base 2, rotated by `shift` / 2**32.

    Any stretch of it covers [0, 1) evenly, so a task of rate p gets p of the examples not only on
    average but to within a few examples at any time.
    """
    # The bytes as they are, little end first, read as big end first: their order is reversed.
    octets = (index & 0xFFFFFFFF).to_bytes(4, "little").translate(_REVERSED)
    reversed_bits = int.from_bytes(octets, "big")
    return ((reversed_bits + shift) & 0xFFFFFFFF) / 2**_BITS


# The golden ratio's fractional part, of 2**32.
_GOLDEN = 0x9E3779B9


class TaskChoice:
    """Picks the task of example j of row r by the tasks' rates."""

    def __init__(self, rates: Float64[np.ndarray, " tasks"], seed: int) -> None:
        self._bounds = np.cumsum(rates / np.sum(rates))[:-1].tolist()
        self._shift = key("task", seed)

    def __call__(self, row: int, index: int) -> int:
        # Rows start at points that are spread evenly, and off the lattice that examples walk on.
        row_shift = row * _GOLDEN & 0xFFFFFFFF
        point = low_discrepancy(index, self._shift + row_shift)
        return bisect.bisect_right(self._bounds, point)
