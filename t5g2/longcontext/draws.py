"""Random choices that are the same on every machine and in every process."""

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """A stream of choices that a key determines.

    It rests on `random.Random.random` alone, the one method whose numbers Python promises to keep.
    """

    def __init__(self, *key: object) -> None:
        """Starts the stream of a key, whose parts are told apart by how they print."""
        digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
        self._random = random.Random(int.from_bytes(digest, "big")).random

    def below(self, count: int) -> int:
        """A number from 0 to `count` - 1."""
        return int(self._random() * count)

    def choice(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[self.below(len(values))]

    def sample(self, values: Sequence[T], count: int) -> list[T]:
        """So many different places of `values`, in random order.

        Raises:
            ValueError: there are fewer.
        """
        if count > len(values):
            raise ValueError(f"cannot draw {count} of {len(values)}")
        # The first steps of a shuffle, of which only the places that were touched are stored.
        moved: dict[int, int] = {}
        chosen = []
        for i in range(count):
            place = i + self.below(len(values) - i)
            chosen.append(values[moved.get(place, place)])
            moved[place] = moved.get(i, i)
        return chosen

    def shuffled(self, values: Sequence[T]) -> list[T]:
        """All values in random order."""
        return self.sample(values, len(values))

    def letters(self, alphabet: str, count: int) -> str:
        """So many characters of an alphabet, one by one."""
        return "".join(self.choice(alphabet) for _ in range(count))

    def distinct(self, make: "Callable[[Draws], str]", count: int) -> list[str]:
        """So many different texts, each made by `make` from this stream."""
        found: dict[str, None] = {}
        while len(found) < count:
            found.setdefault(make(self))
        return list(found)
