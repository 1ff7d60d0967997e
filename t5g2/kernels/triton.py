"""Attention by a kernel for GPU (Pallas, compiled by Triton): blocks that nobody sees are skipped.

FlashAttention-2 (arXiv:2307.08691, algorithms 1 and 2) over two lists of keys in one softmax. Which
blocks see each other is computed from segment ids and the window before the kernels run.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from t5g2.kernels.attention import EVERYWHERE, RESULTS, KeyValues, Window
from t5g2.kernels.meetings import bounds, meetings, reaches
from t5g2.kernels.on_mesh import current_mesh

# Lengths are filled up to multiples of this, which every block divides.
_FILL = 128
# Below this many columns Triton's products have no tiles.
_NARROWEST = 16


class _Side(NamedTuple):
    """Keys and values [B, S, K, N] of one side, and their segment ids [B, S]."""

    key: Any
    value: Any
    segment_ids: Any


class _Blocks(NamedTuple):
    """Queries and keys that a program works on at a time, and how Triton is to compile it."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Queries and keys."""
        return self.queries, self.keys


class _Sizes(NamedTuple):
    """The blocks of each kernel."""

    forward: _Blocks
    to_queries: _Blocks
    to_keys: _Blocks


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known when a program is traced: `triton_attention`'s arguments, and the blocks."""

    window: Window
    scale: float
    interpret: bool
    sizes: _Sizes

    def window_of(self, side: int) -> Window:
        """The reach into the queries' own side, which is the first, or into the other."""
        return self.window if side == 0 else EVERYWHERE


def triton_attention(
    query: Float[Array, "B T H N"],
    query_segment_ids: Int[Array, "B T"],
    keys: KeyValues,
    memory: KeyValues | None,
    *,
    window: Window,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "B T H N"]:
    """`kernels.attention.attention` where queries and `keys` are the same tokens, on one device.

    Lengths and heads are filled up to whole blocks with padding. Logits, softmax and sums are
    float32. Products are of the states' dtype; float32 is rounded to TF32 unless
    `jax_default_matmul_precision` asks for more, as in jax's own products.

    Args:
        query: as there, like what is not named here.
        query_segment_ids: as there.
        keys: as there; of a segment, tokens stand side by side.
        memory: as there.
        window: as there.
        scale: as there.
        interpret: run the kernels in XLA, which any device can.
    """
    length, width = query.shape[1], query.shape[3]
    sides = tuple(
        _Side(
            _filled(side.key),
            _filled(side.value),
            _filled(jnp.asarray(side.segment_ids, jnp.int32)),
        )
        for side in (keys, memory)
        if side is not None
    )
    # Padding, which is 0 among the keys, finds nothing of its own segment.
    segment_ids = jnp.where(query_segment_ids == 0, -1, query_segment_ids).astype(jnp.int32)
    segment_ids = _filled(segment_ids, padding=-1)
    query = _filled(query)
    out = _attend(_Static(window, scale, interpret, _sizes(query)), query, segment_ids, sides)
    return out[:, :length, :, :width]


def _filled(array: Array, padding: int = 0) -> Array:
    """[B, L] or [B, L, heads, N], L filled up to a multiple of `_FILL`, N to a power of two."""
    widths = [(0, 0)] * array.ndim
    widths[1] = (0, -array.shape[1] % _FILL)
    if array.ndim > 2:
        widths[3] = (0, max(pl.next_power_of_2(array.shape[3]), _NARROWEST) - array.shape[3])
    return jnp.pad(array, widths, constant_values=padding)


# By bytes of a state and KiB of shared memory: what compiles for H100, for A100 and for lesser
# devices at 256 columns without spilling registers. None was chosen by timing.
_SMALLEST = _Sizes(_Blocks(16, 16, 4, 1), _Blocks(16, 16, 4, 1), _Blocks(16, 16, 8, 1))
_SIZES = {
    2: (
        (227, _Sizes(_Blocks(128, 64, 8, 2), _Blocks(64, 64, 8, 2), _Blocks(32, 64, 8, 2))),
        (163, _Sizes(_Blocks(64, 64, 8, 2), _Blocks(64, 64, 8, 2), _Blocks(32, 64, 8, 2))),
        (99, _Sizes(_Blocks(32, 32, 4, 1), _Blocks(32, 32, 4, 1), _Blocks(32, 32, 8, 1))),
        (0, _SMALLEST),
    ),
    4: (
        (163, _Sizes(_Blocks(32, 32, 4, 1), _Blocks(32, 32, 4, 1), _Blocks(16, 32, 8, 1))),
        (0, _SMALLEST),
    ),
}
# KiB of shared memory that a block of threads may have, by a part of the device's name, and of all
# other devices (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
_SHARED = {"A100": 163, "A800": 163, "H100": 227, "H800": 227, "H20": 227, "B200": 227, "B300": 227}
_SHARED |= {"AMD": 64, "gfx": 64}
_OTHERS_SHARED = 99


def _sizes(query: Array) -> _Sizes:
    """The blocks for the devices that are traced for."""
    mesh = current_mesh()
    device = None if mesh is None else mesh.abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    shared = max((size for name, size in _SHARED.items() if name in kind), default=_OTHERS_SHARED)
    room = shared * 256 // query.shape[3]
    return next(sizes for needed, sizes in _SIZES[query.dtype.itemsize] if room >= needed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    static: _Static,
    query: Float[Array, "B T H N"],
    segment_ids: Int[Array, "B T"],
    sides: tuple[_Side, ...],
) -> Float[Array, "B T H N"]:
    return _forward(static, query, segment_ids, sides)[0]


def _attend_forward(
    static: _Static, query: Array, segment_ids: Array, sides: tuple[_Side, ...]
) -> tuple[Array, Any]:
    out, sums = _forward(static, query, segment_ids, sides)
    out, sums = checkpoint_name(out, RESULTS), checkpoint_name(sums, RESULTS)
    return out, (query, segment_ids, sides, out, sums)


def _attend_backward(static: _Static, kept: Any, gradient: Array) -> tuple[Any, ...]:
    query, segment_ids, sides, out, sums = kept
    # The share of each logit's gradient that normalisation takes off (FlashAttention-2's D).
    mean = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=3)
    queries = (query, segment_ids, gradient, sums, jnp.swapaxes(mean, 1, 2))
    to_query = _to_queries(static, queries, sides)
    to_sides = tuple(
        _Side(*_to_keys(static, queries, side, number), None) for number, side in enumerate(sides)
    )
    return to_query, None, to_sides


_attend.defvjp(_attend_forward, _attend_backward)


# The kernels. Refs are those of one row and one head, or one key head.


def _dot(a: Array, b: Array, contracting: tuple[int, int] = (1, 0)) -> Array:
    numbers = (((contracting[0],), (contracting[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _logits(
    query: Array,
    key: Array,
    segment_ids: tuple[Array, Array],
    firsts: tuple[Any, Any],
    window: Window,
    scale: float,
) -> Float[Array, "queries keys"]:
    """Logits in base 2 of a block of queries by one of keys; -inf: not seen.

    Args:
        query: [queries, N].
        key: [keys, N].
        segment_ids: of both.
        firsts: where both begin in their rows.
        window: reach along the row. Within a segment positions count by one, so that it is the
            reach in positions.
        scale: factor on the logits.
    """
    mine, theirs = segment_ids
    visible = mine[:, None] == theirs[None, :]
    if window != EVERYWHERE:
        rows = firsts[0] + jnp.arange(query.shape[0])
        columns = firsts[1] + jnp.arange(key.shape[0])
        ahead = columns[None, :] - rows[:, None]
        if window.left is not None:
            visible &= ahead >= -window.left
        if window.right is not None:
            visible &= ahead <= window.right
    return jnp.where(visible, _dot(query, key, (1, 1)) * (scale * math.log2(math.e)), -jnp.inf)


def _forward_kernel(
    query_ref: Any,
    segments_ref: Any,
    sides: tuple[_Side, ...],
    ranges: tuple[Any, ...],
    out_ref: Any,
    sums_ref: Any,
    *,
    static: _Static,
    blocks: _Blocks,
) -> None:
    query, segment_ids = query_ref[...], segments_ref[...]
    first = pl.program_id(1) * blocks.queries
    # The largest logits so far, finite so that nothing is infinity less infinity.
    carry = (
        jnp.zeros(query.shape, jnp.float32),
        jnp.full((blocks.queries,), -1e30, jnp.float32),
        jnp.zeros((blocks.queries,), jnp.float32),
    )
    for number, (side, bound) in enumerate(zip(sides, ranges, strict=True)):

        def step(i: Array, carry: Any, number: int = number, side: _Side = side) -> Any:
            mixed, largest, total = carry
            here = pl.ds(i * blocks.keys, blocks.keys)
            logits = _logits(
                query,
                side.key[here, :],
                (segment_ids, side.segment_ids[here]),
                (first, i * blocks.keys),
                static.window_of(number),
                static.scale,
            )
            larger = jnp.maximum(largest, jnp.max(logits, axis=1))
            weights, less = jnp.exp2(logits - larger[:, None]), jnp.exp2(largest - larger)
            value = side.value[here, :]
            mixed = mixed * less[:, None] + _dot(weights.astype(value.dtype), value)
            return mixed, larger, total * less + jnp.sum(weights, axis=1)

        carry = jax.lax.fori_loop(bound[0], bound[1], step, carry)
    mixed, largest, total = carry
    total = jnp.where(total == 0, 1.0, total)  # Padding: zeros by one.
    out_ref[...] = (mixed / total[:, None]).astype(out_ref.dtype)
    sums_ref[...] = largest + jnp.log2(total)


def _to_queries_kernel(
    query_ref: Any,
    segments_ref: Any,
    gradient_ref: Any,
    sums_ref: Any,
    mean_ref: Any,
    sides: tuple[_Side, ...],
    ranges: tuple[Any, ...],
    out_ref: Any,
    *,
    static: _Static,
    blocks: _Blocks,
) -> None:
    query, segment_ids, gradient = query_ref[...], segments_ref[...], gradient_ref[...]
    sums, mean = sums_ref[...], mean_ref[...]
    first = pl.program_id(1) * blocks.queries
    out = jnp.zeros(query.shape, jnp.float32)
    for number, (side, bound) in enumerate(zip(sides, ranges, strict=True)):

        def step(i: Array, out: Array, number: int = number, side: _Side = side) -> Array:
            here = pl.ds(i * blocks.keys, blocks.keys)
            key = side.key[here, :]
            logits = _logits(
                query,
                key,
                (segment_ids, side.segment_ids[here]),
                (first, i * blocks.keys),
                static.window_of(number),
                static.scale,
            )
            weights = jnp.exp2(logits - sums[:, None])
            to_logits = weights * (_dot(gradient, side.value[here, :], (1, 1)) - mean[:, None])
            return out + _dot(to_logits.astype(key.dtype), key)

        out = jax.lax.fori_loop(bound[0], bound[1], step, out)
    out_ref[...] = (out * static.scale).astype(out_ref.dtype)


def _to_keys_kernel(
    query_ref: Any,
    segments_ref: Any,
    gradient_ref: Any,
    sums_ref: Any,
    mean_ref: Any,
    side: _Side,
    bound: Any,
    key_out_ref: Any,
    value_out_ref: Any,
    *,
    static: _Static,
    blocks: _Blocks,
    window: Window,
) -> None:
    key, value, segment_ids = side.key[...], side.value[...], side.segment_ids[...]
    first_block, count = bound[0], bound[1] - bound[0]
    start = pl.program_id(1) * blocks.keys
    seen = Window(window.right, window.left)  # As a key sees queries.

    def step(i: Array, carry: Any) -> Any:
        to_key, to_value = carry
        # All blocks of the first query head that shares these keys, then those of the next.
        head, first = jax.lax.div(i, count), (first_block + jax.lax.rem(i, count)) * blocks.queries
        here = pl.ds(first, blocks.queries)
        query, gradient = query_ref[here, head, :], gradient_ref[here, head, :]
        # Keys by queries: as such the products below take them, without turning them around.
        logits = _logits(
            key, query, (segment_ids, segments_ref[here]), (start, first), seen, static.scale
        )
        weights = jnp.exp2(logits - sums_ref[head, here][None, :])
        to_value += _dot(weights.astype(gradient.dtype), gradient)
        to_weights = _dot(value, gradient, (1, 1))
        to_logits = weights * (to_weights - mean_ref[head, here][None, :])
        to_key += _dot(to_logits.astype(query.dtype), query)
        return to_key, to_value

    none = jnp.zeros(key.shape, jnp.float32)
    turns = count * query_ref.shape[1]
    to_key, to_value = jax.lax.fori_loop(0, turns, step, (none, none))
    key_out_ref[...] = (to_key * static.scale).astype(key_out_ref.dtype)
    value_out_ref[...] = to_value.astype(value_out_ref.dtype)


# Their calls. Programs that run side by side are the heads of one block: they share its keys.


def _forward(
    static: _Static, query: Array, segment_ids: Array, sides: tuple[_Side, ...]
) -> tuple[Array, Array]:
    """Results and logarithms (base 2) of the sums of their weights, [B, H, T]."""
    blocks = static.sizes.forward
    batch, length, heads, _ = query.shape
    shapes = (
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    )
    specs = _query_specs(query, blocks)
    return _by_queries(
        _forward_kernel,
        "attention_fwd",
        static,
        blocks,
        (query, segment_ids),
        (specs["state"], specs["segments"]),
        sides,
        (shapes, (specs["state"], specs["sums"])),
        products=2,
    )


def _to_queries(static: _Static, queries: Any, sides: tuple[_Side, ...]) -> Array:
    query = queries[0]
    blocks = static.sizes.to_queries
    specs = _query_specs(query, blocks)
    return _by_queries(
        _to_queries_kernel,
        "attention_dq",
        static,
        blocks,
        queries,
        tuple(specs[name] for name in ("state", "segments", "state", "sums", "sums")),
        sides,
        (jax.ShapeDtypeStruct(query.shape, query.dtype), specs["state"]),
        products=3,
    )


def _query_specs(query: Array, blocks: _Blocks) -> dict[str, pl.BlockSpec]:
    """A block of one head's queries, of [B, T, H, N], [B, T] and [B, H, T]."""
    size, width = blocks.queries, query.shape[3]
    return {
        "state": pl.BlockSpec((None, size, None, width), lambda h, i, b: (b, i, h, 0)),
        "segments": pl.BlockSpec((None, size), lambda h, i, b: (b, i)),
        "sums": pl.BlockSpec((None, None, size), lambda h, i, b: (b, h, i)),
    }


def _by_queries(
    kernel: Callable[..., None],
    name: str,
    static: _Static,
    blocks: _Blocks,
    queries: tuple[Array, ...],
    query_specs: tuple[pl.BlockSpec, ...],
    sides: tuple[_Side, ...],
    out: tuple[Any, Any],
    products: int,
) -> Any:
    """Calls a kernel for every block of queries, with all keys of its head."""
    query, segment_ids = queries[:2]
    batch, length, heads, width = query.shape
    group = heads // sides[0].key.shape[2]
    ranges, side_specs, met = [], [], 0
    for number, side in enumerate(sides):
        window, keys = static.window_of(number), side.key.shape[1]
        ranges.append(bounds(meetings(segment_ids, side.segment_ids, blocks.sizes, window)))
        met += int(reaches((length, keys), blocks.sizes, window).sum())
        state = pl.BlockSpec((None, keys, None, width), lambda h, i, b: (b, 0, h // group, 0))
        side_specs.append(_Side(state, state, pl.BlockSpec((None, keys), lambda h, i, b: (b, 0))))
    bound = pl.BlockSpec((None, None, 2), lambda h, i, b: (b, i, 0))
    shapes, specs = out
    return pl.pallas_call(
        functools.partial(kernel, static=static, blocks=blocks),
        grid=(heads, length // blocks.queries, batch),
        in_specs=(*query_specs, tuple(side_specs), (bound,) * len(sides)),
        out_specs=specs,
        out_shape=shapes,
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=_cost(batch * heads * met * products, blocks, width),
        interpret=static.interpret,
        name=name,
    )(*queries, sides, tuple(ranges))


def _to_keys(static: _Static, queries: Any, side: _Side, number: int) -> tuple[Array, Array]:
    """Gradients of keys and values, added up over the query heads that share them."""
    query, segment_ids = queries[:2]
    blocks, window = static.sizes.to_keys, static.window_of(number)
    batch, length, heads, width = query.shape
    keys, kv_heads = side.key.shape[1:3]
    group = heads // kv_heads
    ranges = bounds(
        jnp.swapaxes(meetings(segment_ids, side.segment_ids, blocks.sizes, window), 1, 2)
    )
    met = int(reaches((length, keys), blocks.sizes, window).sum())
    row = pl.BlockSpec((None, length, group, width), lambda h, i, b: (b, 0, h, 0))
    segments = pl.BlockSpec((None, length), lambda h, i, b: (b, 0))
    sums = pl.BlockSpec((None, group, length), lambda h, i, b: (b, h, 0))
    state = pl.BlockSpec((None, blocks.keys, None, width), lambda h, i, b: (b, i, h, 0))
    ids = pl.BlockSpec((None, blocks.keys), lambda h, i, b: (b, i))
    bound = pl.BlockSpec((None, None, 2), lambda h, i, b: (b, i, 0))
    return pl.pallas_call(
        functools.partial(_to_keys_kernel, static=static, blocks=blocks, window=window),
        grid=(kv_heads, keys // blocks.keys, batch),
        in_specs=(row, segments, row, sums, sums, _Side(state, state, ids), bound),
        out_specs=(state, state),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (side.key, side.value)),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=_cost(batch * heads * met * 4, blocks, width),
        interpret=static.interpret,
        name="attention_dkv",
    )(*queries, side, ranges)


def _cost(products: int, blocks: _Blocks, width: int) -> pl.CostEstimate:
    """Of so many products of blocks, where each row is one segment."""
    flops = products * 2 * blocks.queries * blocks.keys * width
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=0)
