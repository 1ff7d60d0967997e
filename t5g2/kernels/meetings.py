"""Which blocks of queries and keys meet: known before a kernel runs, which skips the others."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from t5g2.kernels.attention import Window


def reaches(lengths: tuple[int, int], sizes: tuple[int, int], window: Window) -> np.ndarray:
    """Which blocks of keys a window shows to which blocks of queries, segments aside.

    Args:
        lengths: queries and keys of a row.
        sizes: queries and keys of a block.
        window: reach along the row. Within a segment positions count by one, so that it is the
            reach in positions.

    Returns:
        bool [blocks of queries, blocks of keys].
    """
    query, key = (np.arange(0, n, size) for n, size in zip(lengths, sizes, strict=True))
    ahead = key[None, :] - query[:, None]
    shown = np.ones(ahead.shape, np.bool_)
    if window.left is not None:
        shown &= ahead + sizes[1] - 1 >= -window.left
    if window.right is not None:
        shown &= ahead - sizes[0] + 1 <= window.right
    return shown


def meetings(
    segment_ids: Int[Array, "B T"],
    key_segment_ids: Int[Array, "B S"],
    sizes: tuple[int, int],
    window: Window,
) -> Bool[Array, "B queries keys"]:
    """Which blocks of queries and keys are in reach and may have a segment in common.

    Never less than those that do: a block counts as having all segments from its least to its
    greatest, and what two blocks have in common may lie out of their reach.

    Args:
        segment_ids: of the queries; 0 and below is padding. T is a multiple of a block's queries.
        key_segment_ids: of the keys; S is a multiple of a block's keys.
        sizes: queries and keys of a block.
        window: see `reaches`.
    """

    def extent(ids: Array, size: int) -> tuple[Array, Array]:
        ids = ids.reshape(ids.shape[0], -1, size)
        lowest = jnp.min(jnp.where(ids > 0, ids, jnp.iinfo(ids.dtype).max), axis=2)
        return lowest, jnp.max(ids, axis=2)

    low, high = (x[:, :, None] for x in extent(segment_ids, sizes[0]))
    key_low, key_high = (x[:, None, :] for x in extent(key_segment_ids, sizes[1]))
    lengths = segment_ids.shape[1], key_segment_ids.shape[1]
    return (low <= key_high) & (key_low <= high) & reaches(lengths, sizes, window)


def bounds(met: Bool[Array, "B rows columns"]) -> Int[Array, "B rows 2"]:
    """Of every row, int32: the first column that is true and the one after the last; none: 0, 0."""
    last = met.shape[2] - jnp.argmax(met[:, :, ::-1], axis=2)
    last = jnp.where(met.any(axis=2), last, 0)
    return jnp.stack([jnp.argmax(met, axis=2), last], axis=2).astype(jnp.int32)
