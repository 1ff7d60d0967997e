"""Blocks that meet are those in which the reference's mask shows a query a key, and few more."""

import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import long_rows

from t5g2.kernels.attention import Window, visibility
from t5g2.kernels.meetings import bounds, meetings, reaches

EVERYWHERE = Window(None, None)


def shown(segment_ids, positions, keys, window, sizes):
    """Blocks in which a query sees a key, by the reference."""
    visible = np.asarray(visibility(segment_ids, positions, keys, window))
    rows, length, _ = visible.shape
    return visible.reshape(rows, length // sizes[0], sizes[0], -1, sizes[1]).any((2, 4))


@pytest.mark.parametrize("window", [EVERYWHERE, Window(70, 0), Window(33, 95), Window(None, 0)])
@pytest.mark.parametrize("sizes", [(64, 32), (32, 64)])
def test_of_packed_rows_no_block_that_shows_a_key_is_skipped(window, sizes):
    _, (segment_ids, positions), keys, memory = long_rows(512, 384, rows=3)
    for side, reach in ((keys, window), (memory, EVERYWHERE)):
        seen = shown(segment_ids, positions, side, reach, sizes)
        ids = jnp.where(segment_ids == 0, -1, segment_ids), jnp.asarray(side.segment_ids)
        met = np.asarray(meetings(*ids, sizes, reach))
        assert (seen <= met).all()
        # What two blocks have in common may lie beyond the window that they have in common.
        assert met.sum() <= seen.sum() * (1.0 if reach == EVERYWHERE else 1.2)
        for of in (met, met.swapaxes(1, 2)):
            found = np.asarray(bounds(jnp.asarray(of)))
            for row, block in np.ndindex(of.shape[:2]):
                columns = np.flatnonzero(of[row, block])
                expected = (columns[0], columns[-1] + 1) if columns.size else (0, 0)
                assert tuple(found[row, block]) == expected


@pytest.mark.parametrize("window", [EVERYWHERE, Window(2, 0), Window(40, 23), Window(None, 0)])
def test_in_a_row_of_one_example_blocks_are_exactly_those_that_show_a_key(window):
    tokens = np.ones((1, 256), np.int32), np.arange(256)[None]
    _, _, keys, _ = long_rows(256, 8, rows=1)
    keys = keys._replace(segment_ids=tokens[0], positions=tokens[1])
    seen = shown(*tokens, keys, window, (16, 32))
    np.testing.assert_array_equal(reaches((256, 256), (16, 32), window), seen[0])
    met = meetings(*map(jnp.asarray, (tokens[0], tokens[0])), (16, 32), window)
    np.testing.assert_array_equal(met, seen)


def test_segments_in_any_order_are_found():
    ids = np.repeat([[3, 1, 2, 1]], 32, axis=1)
    positions = np.arange(128)[None]
    _, _, keys, _ = long_rows(128, 8, rows=1)
    keys = keys._replace(segment_ids=ids, positions=positions)
    seen = shown(ids, positions, keys, EVERYWHERE, (32, 32))
    assert (
        seen <= np.asarray(meetings(jnp.asarray(ids), jnp.asarray(ids), (32, 32), EVERYWHERE))
    ).all()
