"""Operands of attention: packed rows with padding."""

import jax.numpy as jnp
import numpy as np

from t5g2.kernels.attention import KeyValues

SCALE = 0.3


def packed(segments):
    """Positions that restart with every segment."""
    segments = np.asarray(segments)
    positions = np.zeros_like(segments)
    for row, t in np.ndindex(segments.shape):
        if t and segments[row, t] == segments[row, t - 1]:
            positions[row, t] = positions[row, t - 1] + 1
    return segments, positions


def long_rows(length, memory_length, seed=0, heads=(4, 2), rows=2):
    """Rows packed with random segments, all of which but the first end in padding."""
    rng = np.random.default_rng(seed)

    def segments(length):
        ids = np.zeros((rows, length), int)
        for row in range(rows):
            end = length - length // 5 * (row > 0)
            cuts = np.sort(rng.choice(np.arange(1, end), 4, replace=False))
            ids[row, :end] = 1 + np.searchsorted(cuts, np.arange(end), side="right")
        return packed(ids)

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    own, other = segments(length), segments(memory_length)
    kept = (rows, length, heads[1], 8)
    far = (rows, memory_length, heads[1], 8)
    keys = KeyValues(random(*kept), random(*kept), *own)
    memory = KeyValues(random(*far), random(*far), *other)
    return random(rows, length, heads[0], 8), own, keys, memory
