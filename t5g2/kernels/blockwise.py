"""Attention in plain XLA, a block of queries at a time; no weights are kept for the backward pass.

It makes them anew from the logarithms of their sums, as FlashAttention-2 does (arXiv:2307.08691,
section 3.1): it neither normalises again nor goes back through a softmax. Of the products none has
its larger operand, the weights, turned around.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from t5g2.kernels.attention import (
    EVERYWHERE,
    QUERY_BLOCK,
    RESULTS,
    KeyValues,
    Window,
    sees_all,
    visibility,
)

# Queries worked on at a time are at least so many where a window is.
_SMALLEST_BLOCK = 128

# Of each side's keys and values.
_Gradients = tuple[tuple[Float[Array, "B S K N"], Float[Array, "B S K N"]], ...]


class _Queries(NamedTuple):
    """Queries with what a mask needs to know of them."""

    states: Float[Array, "B T H N"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]


class _Static(NamedTuple):
    """What is known when a program is traced.

    Attributes:
        window: reach into the first side.
        scale: factor on the logits.
        block: queries at a time.
        local: whether a block of queries sees its neighbours of the first side's keys alone.
        offset: query i is the token of key `i + offset`.
    """

    window: Window
    scale: float
    block: int
    local: bool
    offset: int


def blockwise_attention(
    query: Float[Array, "B T H N"],
    query_segment_ids: Int[Array, "B T"],
    query_positions: Int[Array, "B T"],
    keys: KeyValues,
    memory: KeyValues | None,
    *,
    window: Window,
    scale: float,
    offset: int = 0,
) -> Float[Array, "B T H N"]:
    """`kernels.attention.attention`; in one piece if there are less than two blocks of queries.

    Args:
        query: as there, like what is not named here.
        query_segment_ids: as there.
        query_positions: as there.
        keys: as there; if the window is limited, of the queries' tokens.
        memory: as there.
        window: as there.
        scale: as there.
        offset: query i is the token of key `i + offset`.
    """
    length, block = query.shape[1], QUERY_BLOCK
    if window.left is not None and window.right is not None:
        reach = max(window.left, window.right, 1)
        block = -(-reach // _SMALLEST_BLOCK) * _SMALLEST_BLOCK
    divided = length >= 2 * block
    local = divided and not sees_all(window)
    static = _Static(window, scale, block if divided else length, local, offset)
    sides = (keys,) if memory is None else (keys, memory)
    return _attend(static, _Queries(query, query_segment_ids, query_positions), sides)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    static: _Static, queries: _Queries, sides: tuple[KeyValues, ...]
) -> Float[Array, "B T H N"]:
    return _forward(static, queries, sides)[0]


def _forward(static: _Static, queries: _Queries, sides: tuple[KeyValues, ...]) -> tuple[Array, Any]:
    blocks, near, whole = _in_blocks(static, queries, sides)
    out, log_sums = jax.lax.map(
        lambda x: _block_forward(static, x[0], x[1] + whole), (blocks, near)
    )
    out = _joined(out, queries.states)
    out, log_sums = checkpoint_name(out, RESULTS), checkpoint_name(log_sums, RESULTS)
    return out, (queries, sides, out, log_sums)


def _backward(static: _Static, kept: Any, by_out: Array) -> tuple[Any, ...]:
    queries, sides, out, log_sums = kept
    blocks, near, whole = _in_blocks(static, queries, sides)

    def block(sums: _Gradients, x: tuple[Any, ...]) -> tuple[_Gradients, tuple[Array, _Gradients]]:
        queries, near, *results = x
        by_query, by_sides = _block_backward(static, queries, near + whole, *results)
        by_near, by_whole = by_sides[: len(near)], by_sides[len(near) :]
        return jax.tree.map(jnp.add, sums, by_whole), (by_query, by_near)

    count = len(blocks.states)
    out, by_out = (_split(x, static.block, count) for x in (out, by_out))
    zeros = tuple(
        (jnp.zeros_like(side.key, jnp.float32), jnp.zeros_like(side.value, jnp.float32))
        for side in whole
    )
    by_whole, (by_query, by_near) = jax.lax.scan(
        block, zeros, (blocks, near, out, log_sums, by_out)
    )
    if near:
        neighbours = functools.partial(_neighbours, static, count)
        _, back = jax.vjp(neighbours, sides[0].key.astype(jnp.float32))
        by_near = jax.tree.map(lambda x: back(x)[0], by_near)
    by_sides = [
        side._replace(
            key=by_key.astype(side.key.dtype),
            value=by_value.astype(side.value.dtype),
            segment_ids=None,
            positions=None,
        )
        for side, (by_key, by_value) in zip(sides, by_near + by_whole, strict=True)
    ]
    by_query = _joined(by_query, queries.states)
    return queries._replace(states=by_query, segment_ids=None, positions=None), tuple(by_sides)


_attend.defvjp(_forward, _backward)


# One block.


def _grouped(states: Float[Array, "B T H N"], kv_heads: int) -> Float[Array, "B K G T N"]:
    batch, length, _, width = states.shape
    return states.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)


def _ungrouped(states: Float[Array, "B K G T N"], like: Array) -> Float[Array, "B T H N"]:
    return states.transpose(0, 3, 1, 2, 4).reshape(like.shape).astype(like.dtype)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _logits(
    static: _Static,
    queries: _Queries,
    grouped: Float[Array, "B K G T N"],
    sides: tuple[KeyValues, ...],
) -> list[Float[Array, "B K G T S"]]:
    """Of each side; minus infinity where a query does not see a key."""
    made = []
    for side, window in zip(sides, (static.window, EVERYWHERE), strict=False):
        seen = visibility(queries.segment_ids, queries.positions, side, window)
        logits = _product("bkgtn,bskn->bkgts", grouped, side.key) * static.scale
        made.append(jnp.where(seen[:, None, None], logits, -jnp.inf))
    return made


def _block_forward(
    static: _Static, queries: _Queries, sides: tuple[KeyValues, ...]
) -> tuple[Float[Array, "B T H N"], Float[Array, "B K G T"]]:
    """Results, and the logarithms of what their weights were divided by."""
    grouped = _grouped(queries.states, sides[0].key.shape[2])
    logits = _logits(static, queries, grouped, sides)
    # Of a query that sees nothing: finite, so that its weights are 0.
    lowest = jnp.finfo(jnp.float32).min
    top = functools.reduce(jnp.maximum, (jnp.max(x, axis=-1) for x in logits))
    top = jnp.maximum(top, lowest)
    weights = [jnp.exp(x - top[..., None]) for x in logits]
    sums = functools.reduce(jnp.add, (jnp.sum(x, axis=-1) for x in weights))
    sums = jnp.where(sums == 0, 1.0, sums)
    parts = [
        _product("bkgts,bskn->bkgtn", weight.astype(side.value.dtype), side.value)
        for weight, side in zip(weights, sides, strict=True)
    ]
    out = functools.reduce(jnp.add, parts)
    return _ungrouped(out / sums[..., None], queries.states), top + jnp.log(sums)


def _block_backward(
    static: _Static,
    queries: _Queries,
    sides: tuple[KeyValues, ...],
    out: Float[Array, "B T H N"],
    log_sums: Float[Array, "B K G T"],
    by_out: Float[Array, "B T H N"],
) -> tuple[Float[Array, "B T H N"], _Gradients]:
    """The gradients of queries and sides, the latter in float32."""
    group = functools.partial(_grouped, kv_heads=sides[0].key.shape[2])
    grouped, by_result = group(queries.states), group(by_out)
    # The share of each logit's gradient that normalisation takes off (FlashAttention-2's D).
    mean = jnp.sum(group(out).astype(jnp.float32) * by_result, axis=-1, keepdims=True)
    by_query, by_sides = jnp.zeros_like(grouped, jnp.float32), []
    for side, logits in zip(sides, _logits(static, queries, grouped, sides), strict=True):
        weights = jnp.exp(logits - log_sums[..., None])
        by_weights = _product("bkgtn,bskn->bkgts", by_result, side.value)
        by_logits = (weights * (by_weights - mean) * static.scale).astype(side.key.dtype)
        by_query += _product("bkgts,bskn->bkgtn", by_logits, side.key)
        # The smaller operand first: it is the one that XLA turns around.
        by_key = _product("bkgtn,bkgts->bkns", grouped, by_logits)
        by_value = _product("bkgtn,bkgts->bkns", by_result, weights.astype(by_out.dtype))
        by_sides.append((by_key.transpose(0, 3, 1, 2), by_value.transpose(0, 3, 1, 2)))
    return _ungrouped(by_query, queries.states), tuple(by_sides)


# Blocks.


def _split(tree: Any, size: int, blocks: int, before: int = 0) -> Any:
    """Arrays [B, T, ...] as [blocks, B, size, ...]; what is filled up has segment 0.

    Args:
        tree: of arrays.
        size: of a block.
        blocks: their number.
        before: places to fill ahead of the first; if negative, to leave out.
    """

    def split(array: Array) -> Array:
        padding = [(0, 0, 0)] * array.ndim
        padding[1] = (before, blocks * size - before - array.shape[1], 0)  # negative: cut off
        padded = jax.lax.pad(array, jnp.zeros((), array.dtype), padding)
        return padded.reshape(array.shape[0], blocks, size, *array.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(split, tree)


def _joined(
    blocks: Float[Array, "blocks B block H N"], like: Float[Array, "B T H N"]
) -> Float[Array, "B T H N"]:
    batch, length, *heads = like.shape
    return blocks.swapaxes(0, 1).reshape(batch, -1, *heads)[:, :length]


def _neighbours(static: _Static, blocks: int, keys: Any) -> Any:
    """Of arrays of keys [B, S, ...] what each of a number of blocks of queries may see."""
    # A block's reach ends within its neighbours: with one block of keys ahead of the queries'
    # first, block i of the queries sees blocks i to i + 2 of the keys.
    first, last = (0 if static.window.left else 1), (2 if static.window.right else 1)
    parts = _split(keys, static.block, blocks + 2, static.block - static.offset)
    return jax.tree.map(
        lambda x: jnp.concatenate([x[i : i + blocks] for i in range(first, last + 1)], axis=2),
        parts,
    )


def _in_blocks(
    static: _Static, queries: _Queries, sides: tuple[KeyValues, ...]
) -> tuple[_Queries, tuple[KeyValues, ...], tuple[KeyValues, ...]]:
    """Blocks of queries; the sides of which each block sees its neighbours alone; the others."""
    blocks = -(-queries.states.shape[1] // static.block)
    near, whole = (sides[:1], sides[1:]) if static.local else ((), sides)
    return _split(queries, static.block, blocks), _neighbours(static, blocks, near), whole
