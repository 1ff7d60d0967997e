"""Arrays that are not in memory: what streams from files of one format to files of another."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Shaped


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
