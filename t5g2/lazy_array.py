"""Arrays that are not in memory: what streams from files of one format to files of another."""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

# No larger array is read before its turn.
_AHEAD_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is read, or made, when it is asked for, and not kept.

    `numpy.asarray` asks for it.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        read: returns it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Shaped[np.ndarray, "..."]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Shaped[np.ndarray, "..."]:
        return np.asarray(self.read(), dtype, copy=copy)


def read_in_turn(
    arrays: Sequence[LazyArray | Shaped[np.ndarray, "..."]],
) -> Generator[Shaped[np.ndarray, "..."]]:
    """Yields what arrays hold, in order; while one is worked on, a thread reads the next.

    No array is kept: the caller has one, and one of at most a gigabyte waits beside it.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        waiting: concurrent.futures.Future[np.ndarray] | None = None
        for i, array in enumerate(arrays):
            read = np.asarray(array) if waiting is None else waiting.result()
            waiting = None
            if i + 1 < len(arrays):
                following = arrays[i + 1]
                if following.dtype.itemsize * math.prod(following.shape) <= _AHEAD_BYTES:
                    waiting = thread.submit(np.asarray, following)
            yield read
            del read
