"""Attention of rows, tokens and heads that lie on several devices.

Each device keeps its queries. Where a layer sees everything, it gathers the keys and values of its
rows (few heads, after grouping) along the length; where a layer has a window, its neighbours send
it no more than the window's reach. Memory grows with S or T, never with S x T.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5g2.errors import UserError
from t5g2.kernels import layout as layouts
from t5g2.kernels.attention import (
    FUSED,
    Backend,
    KeyValues,
    Window,
    attention,
    bidirectional_attention,
    choose_backend,
)
from t5g2.kernels.layout import LENGTH, ROWS, Layout, on_shards
from t5g2.kernels.on_mesh import current_mesh


def placed_attention(
    query: Float[Array, "B T H N"],
    query_segment_ids: Int[Array, "B T"],
    query_positions: Int[Array, "B T"],
    keys: KeyValues,
    memory: KeyValues | None,
    *,
    window: Window,
    scale: float,
    backend: Backend | Literal["auto"] = "auto",
) -> Float[Array, "B T H N"]:
    """`attention`, on the installed layout; without one it is just that.

    Raises:
        UserError: key and value heads lie so that a device's queries have not theirs.
    """
    layout = layouts.current()
    arguments = (query, query_segment_ids, query_positions, keys, memory)
    if layout is None:
        return attention(*arguments, window=window, scale=scale, backend=backend)
    chosen = choose_backend(backend, current_mesh())
    heads, kv_heads = query.shape[2], keys.key.shape[2]
    head_axes = _over(layout, "heads")
    own_heads = _over(layout, "kv_heads") == head_axes
    if not own_heads and _over(layout, "kv_heads"):
        raise UserError(
            "mesh.rules: kv_heads must be split like heads, or not at all ('kv_heads': ())"
        )

    def local(
        query: Array,
        query_segment_ids: Array,
        query_positions: Array,
        keys: KeyValues,
        memory: KeyValues | None,
    ) -> Float[Array, "B T H N"]:
        length = query.shape[1]
        if not own_heads:
            first, count = _kv_heads(query.shape[2], heads, kv_heads, head_axes)
            keys = _some_heads(keys, first, count)
            memory = None if memory is None else _some_heads(memory, first, count)
        (axis,) = layout.axes(LENGTH) or (None,)
        offset: int | None = 0
        if axis is not None:
            shards = layout.mesh.shape[axis]
            if window.left is None or window.right is None:
                keys, offset = _gathered(keys, axis), None
            else:
                keys, offset = _with_neighbours(keys, window, axis, shards, length)
            memory = None if memory is None else _gathered(memory, axis)
        return attention(
            query,
            query_segment_ids,
            query_positions,
            keys,
            memory,
            window=window,
            scale=scale,
            backend=chosen,
            offset=offset,
        )

    tokens = layout.spec(ROWS, LENGTH)
    state = layout.spec(ROWS, LENGTH, "heads", None)
    kept = layout.spec(ROWS, LENGTH, "kv_heads", None)
    spec: Any = (kept, kept, tokens, tokens)
    inputs = (state, tokens, tokens, KeyValues(*spec), memory and KeyValues(*spec))
    return on_shards(local, layout, inputs, state, fused=chosen in FUSED)(*arguments)


def placed_bidirectional_attention(
    query: Float[Array, "B S H N"], key: Float[Array, "B S H N"], value: Float[Array, "B S H N"]
) -> Float[Array, "B S H N"]:
    """`bidirectional_attention`, on the installed layout; without one it is just that."""
    layout = layouts.current()
    if layout is None:
        return bidirectional_attention(query, key, value)

    def local(query: Array, key: Array, value: Array) -> Array:
        for axis in layout.axes("patches"):
            key, value = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (key, value))
        return bidirectional_attention(query, key, value)

    spec = layout.spec(ROWS, "patches", "vision_heads", None)
    return on_shards(local, layout, (spec, spec, spec), spec)(query, key, value)


def _over(layout: Layout, name: str) -> tuple[str, ...]:
    """The mesh axes that split the heads of states: those that do not split the tokens."""
    return tuple(axis for axis in layout.axes(name) if axis not in layout.tokens())


def _kv_heads(
    local_heads: int, heads: int, kv_heads: int, axes: tuple[str, ...]
) -> tuple[Array, int]:
    """First key and value head, and their number, that this device's query heads share."""
    group = heads // kv_heads
    if local_heads % group and group % local_heads:
        raise UserError(
            f"mesh.rules: {local_heads} of {heads} query heads on a device do not share whole key "
            f"and value heads ({kv_heads}): change mesh.tensor"
        )
    return jax.lax.axis_index(axes) * local_heads // group, max(local_heads // group, 1)


def _some_heads(keys: KeyValues, first: Array, count: int) -> KeyValues:
    key, value = (
        jax.lax.dynamic_slice_in_dim(x, first, count, axis=2) for x in (keys.key, keys.value)
    )
    return keys._replace(key=key, value=value)


def _gathered(keys: KeyValues, axis: str) -> KeyValues:
    """The keys of whole rows."""
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True), keys)


def _with_neighbours(
    keys: KeyValues, window: Window, axis: str, shards: int, length: int
) -> tuple[KeyValues, int]:
    """A device's keys between those before and behind them that its window reaches.

    Returns:
        The keys, and how many come before the device's own.
    """
    assert window.left is not None
    assert window.right is not None
    whole = length * (shards - 1)
    left, right = min(window.left, whole), min(window.right, whole)

    def extended(x: Array) -> Array:
        before = _sent(x, left, axis, shards, forward=True)
        behind = _sent(x, right, axis, shards, forward=False)
        return jnp.concatenate([*reversed(before), x, *behind], axis=1)

    return jax.tree.map(extended, keys), left


def _sent(x: Array, reach: int, axis: str, shards: int, *, forward: bool) -> list[Array]:
    """What the devices before (`forward`) or behind send, the nearest first; ends get zeros."""
    parts = []
    length = x.shape[1]
    for hop in range(1, -(-reach // length) + 1):
        size = min(length, reach - (hop - 1) * length)
        part = x[:, length - size :] if forward else x[:, :size]
        pairs = [(i, i + hop) if forward else (i + hop, i) for i in range(shards - hop)]
        parts.append(jax.lax.ppermute(part, axis, pairs))
    return parts
