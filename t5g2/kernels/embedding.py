"""Looking tokens up in an embedding table that may lie on several devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5g2.kernels import layout as layouts
from t5g2.kernels.layout import LENGTH, ROWS, TABLE_AXES, Layout, on_shards


def lookup(table: Float[Array, "V D"], ids: Int[Array, "B S"], dtype: str) -> Float[Array, "B S D"]:
    """Rows of a table.

    On several devices the table stays where it is: ids go to the parts of the table, and what is
    found there goes to the tokens' devices.

    Args:
        table: the embeddings.
        ids: token ids.
        dtype: of the result.
    """
    layout = layouts.current()
    if layout is None:
        return jnp.take(table, ids, axis=0).astype(dtype)
    vocab_axes, width_axes = map(layout.axes, TABLE_AXES)
    parts = set(vocab_axes + width_axes)

    def local(table: Float[Array, "v d"], ids: Int[Array, "b s"]) -> Float[Array, "b s D"]:
        for axis, dim in _token_places(layout, parts):
            ids = jax.lax.all_gather(ids, axis, axis=dim, tiled=True)
        first = _first_row(vocab_axes, table.shape[0])
        here = ids - first
        mine = (here >= 0) & (here < table.shape[0])
        found = jnp.take(table, jnp.where(mine, here, 0), axis=0).astype(dtype)
        found = jnp.where(mine[..., None], found, 0)
        # One device has the token: the sum is exact in any dtype.
        alone = tuple(axis for axis in vocab_axes if axis not in layout.tokens())
        if alone:
            found = jax.lax.psum(found, alone)
        return _returned(found, layout, vocab_axes, width_axes)

    inputs = (layout.parameter_spec(TABLE_AXES), layout.spec(ROWS, LENGTH))
    return on_shards(local, layout, inputs, layout.spec(ROWS, LENGTH, None))(table, ids)


def _token_places(layout: Layout, parts: set[str]) -> list[tuple[str, int]]:
    """Mesh axes that split both tokens and table, minor ones first, and the tokens' dimension."""
    places = [(axis, 0) for axis in layout.axes(ROWS)]
    places += [(axis, 1) for axis in layout.axes(LENGTH)]
    return [(axis, dim) for axis, dim in reversed(places) if axis in parts]


def _first_row(axes: tuple[str, ...], rows: int) -> Array | int:
    """The first row of a table that this device has, of `rows` rows."""
    return jax.lax.axis_index(axes) * rows if axes else 0


def _returned(
    found: Float[Array, "B S d"],
    layout: Layout,
    vocab_axes: tuple[str, ...],
    width_axes: tuple[str, ...],
) -> Float[Array, "b s D"]:
    """What was found for the tokens of many devices, given to the device of each, whole."""
    row_axes, length_axes = layout.axes(ROWS), layout.axes(LENGTH)

    def dealt(found: Array, axes: tuple[str, ...], dim: int) -> Array:
        if axes[0] in width_axes:
            return jax.lax.all_to_all(found, axes, dim, 2, tiled=True)
        return jax.lax.psum_scatter(found, axes, scatter_dimension=dim, tiled=True)

    # The width is put together from its minor axis on, rows are dealt out from their major one:
    # axes that split both do so in one go.
    shared = [axis for axis in row_axes if axis in vocab_axes + width_axes]
    together = shared and all(axis in width_axes for axis in shared)
    for axis in length_axes:
        if axis in vocab_axes + width_axes:
            found = dealt(found, (axis,), 1)
    for axes in [tuple(shared)] if together else [(axis,) for axis in shared]:
        found = dealt(found, axes, 0)
    for axis in reversed(width_axes):
        if axis not in layout.tokens():
            found = jax.lax.all_gather(found, axis, axis=2, tiled=True)
    return found
