"""Attention over segments, positions and a window; the decoder's merged self and cross attention.

Masks are data: callers say which segment and position each token has, never an S x T matrix.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh
from jaxtyping import Array, Bool, Float, Int

from t5g2.errors import UserError
from t5g2.kernels.on_mesh import current_mesh, on_each_device, target_platform

Backend = Literal["reference", "blockwise", "splash", "triton"]

# What `jax.checkpoint`'s policies know attention's results by, and what else its backward pass
# needs that queries, keys and values do not tell.
RESULTS = "attention"

# The fused kernels, and what each runs on.
FUSED: dict[Backend, str] = {"splash": "tpu", "triton": "gpu"}


class KeyValues(NamedTuple):
    """Keys and values with what a mask needs to know of them.

    Attributes:
        key: [B, S, K, N].
        value: [B, S, K, N].
        segment_ids: [B, S]; 0 is padding and is never attended.
        positions: [B, S], counted within the segment.
    """

    key: Float[Array, "B S K N"]
    value: Float[Array, "B S K N"]
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]


class Window(NamedTuple):
    """How far a query sees: key positions from `query - left` to `query + right`; None: all."""

    left: int | None
    right: int | None


EVERYWHERE = Window(None, None)


def choose_backend(wanted: Backend | Literal["auto"], mesh: AbstractMesh | None) -> Backend:
    """What `attention` attends with in a program for some devices.

    Args:
        wanted: by the configuration; "auto": the fused kernel of the devices' platform, or, if
            there is none or it shares rows, "blockwise".
        mesh: the devices; None: those that jax runs on, where "auto" is "blockwise".

    Raises:
        UserError: the devices do not run what is wanted.
    """
    if wanted != "auto" and wanted not in FUSED:
        return wanted
    platform = target_platform(mesh)
    if mesh is not None and mesh.shape.get("context", 1) > 1:
        # The fused kernels know masks of whole rows alone.
        if wanted == "auto":
            return "blockwise"
        raise UserError(f"model.attention = '{wanted}' needs mesh.context = 1: leave it 'auto'")
    if wanted == "auto":
        fused = {} if mesh is None else {needed: name for name, needed in FUSED.items()}
        return fused.get(platform, "blockwise")
    needed = FUSED.get(wanted, platform)
    if needed != platform:
        raise UserError(
            f"model.attention = '{wanted}' is for {needed.upper()}s, not for {platform.upper()}s: "
            "leave it 'auto'"
        )
    return wanted


def visibility(
    query_segment_ids: Int[Array, "B T"],
    query_positions: Int[Array, "B T"],
    keys: KeyValues,
    window: Window,
) -> Bool[Array, "B T S"]:
    """Which keys each query sees: those of its own segment, of queries and keys alike, in reach."""
    segments = keys.segment_ids[:, None, :]
    visible = (query_segment_ids[:, :, None] == segments) & (segments != 0)
    distance = query_positions[:, :, None] - keys.positions[:, None, :]
    if window.left is not None:
        visible &= distance <= window.left
    if window.right is not None:
        visible &= -distance <= window.right
    return visible


# What a compiled program says of each of its operations that is part of attention.
SCOPE = "attend"


@jax.named_scope(SCOPE)
def attention(
    query: Float[Array, "B T H N"],
    query_segment_ids: Int[Array, "B T"],
    query_positions: Int[Array, "B T"],
    keys: KeyValues,
    memory: KeyValues | None,
    *,
    window: Window,
    scale: float,
    backend: Backend | Literal["auto"] = "auto",
    offset: int | None = None,
) -> Float[Array, "B T H N"]:
    """Softmax attention of queries over `keys` and, if given, `memory` in one joint softmax.

    With `memory` this is T5Gemma 2's merged attention (arXiv:2512.14856, section 2): the decoder's
    own keys, seen through `window`, and the encoder's, seen whole, share one softmax. A query sees
    only keys of its own segment. Logits and softmax are float32. A query that sees nothing
    (padding) gets zeros.

    Back ends, of which `choose_backend` takes one for the mesh that the program is traced for:

    - "reference" makes one mask and one matrix of logits of all queries by all keys.
    - "blockwise" works on a block of queries at a time, in which a windowed layer sees the
      neighbouring blocks of keys alone: neither memory nor time grows with T x S.
    - "splash" is a fused kernel for TPU, "triton" one for GPU.

    All but the first take queries and keys to be the same tokens, or `offset` to say which they
    are, and the positions of a segment to count by one along the row, as they do in batches and in
    prompts. Where there are other keys, as in a decoder's cache, the reference attends.

    A policy of `jax.checkpoint` that saves `RESULTS` keeps the backward pass from attending anew.

    Args:
        query: [B, T, H, N] queries, after normalisation and RoPE.
        query_segment_ids: [B, T].
        query_positions: [B, T].
        keys: self-attention keys and values, K heads with K dividing H.
        memory: encoder keys and values, or None for plain self-attention. `window` and positions
            do not apply to them.
        window: reach of the self-attention.
        scale: factor on the logits.
        backend: which one; see `choose_backend`.
        offset: on one device of several, which have chosen `backend`: query i is the token of key
            `i + offset`, and what a query sees of its window is among the keys. None: the queries
            are the keys' tokens if there are as many of both, and else any of them.

    Returns:
        [B, T, H, N] in the dtype of `query`.

    Raises:
        UserError: by `choose_backend`.
    """
    mesh = current_mesh()
    chosen = choose_backend(backend, mesh) if offset is None or backend == "auto" else backend
    inputs = (query, query_segment_ids, query_positions, keys)
    same = keys.key.shape[1] == query.shape[1]
    if chosen in FUSED and same:
        kernel = functools.partial(_fused(chosen), window=window, scale=scale)
        split = kernel if offset is not None else on_each_device(kernel, mesh)
        return split(query, query_segment_ids, keys, memory)
    if chosen == "reference" or (offset is None and not same and not sees_all(window)):
        out = reference_attention(*inputs, memory, window=window, scale=scale)
        return checkpoint_name(out, RESULTS)
    from t5g2.kernels.blockwise import blockwise_attention

    return blockwise_attention(*inputs, memory, window=window, scale=scale, offset=offset or 0)


def _fused(backend: Backend) -> Callable[..., Float[Array, "B T H N"]]:
    """A fused kernel, whose module is read where it is called for alone."""
    if backend == "splash":
        from t5g2.kernels.splash import splash

        return splash
    from t5g2.kernels.triton import triton_attention

    return triton_attention


def sees_all(window: Window) -> bool:
    """Whether a query may see keys at any distance, on one side at least."""
    return window.left is None or window.right is None


def reference_attention(
    query: Float[Array, "B T H N"],
    query_segment_ids: Int[Array, "B T"],
    query_positions: Int[Array, "B T"],
    keys: KeyValues,
    memory: KeyValues | None,
    *,
    window: Window,
    scale: float,
) -> Float[Array, "B T H N"]:
    """`attention` in one piece, with a mask of all queries by all keys."""
    seen = visibility(query_segment_ids, query_positions, keys, window)
    key, value = keys.key, keys.value
    if memory is not None:
        crossed = visibility(query_segment_ids, query_positions, memory, EVERYWHERE)
        seen = jnp.concatenate([seen, crossed], axis=-1)
        key = jnp.concatenate([key, memory.key], axis=1)
        value = jnp.concatenate([value, memory.value], axis=1)
    batch, length, heads, width = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, width)
    logits = jnp.einsum("btkgn,bskn->bkgts", grouped, key, preferred_element_type=jnp.float32)
    mask = seen[:, None, None]
    logits = jnp.where(mask, logits * scale, jnp.finfo(jnp.float32).min)
    weights = jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0.0).astype(query.dtype)
    return jnp.einsum("bkgts,bskn->btkgn", weights, value).reshape(batch, length, heads, width)


# Queries worked on at a time where every key is seen.
QUERY_BLOCK = 512


def bidirectional_attention(
    query: Float[Array, "B S H N"], key: Float[Array, "B S H N"], value: Float[Array, "B S H N"]
) -> Float[Array, "B S H N"]:
    """Softmax attention in which every position sees every other; logits are scaled by N ** -0.5.

    Logits and softmax are float32; of a long sequence only a block of their rows exists at a time.
    """
    scale = query.shape[-1] ** -0.5

    def attend(block: Float[Array, "B T H N"]) -> Float[Array, "B T H N"]:
        logits = jnp.einsum("bthn,bshn->bhts", block, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * scale, axis=-1).astype(block.dtype)
        return jnp.einsum("bhts,bshn->bthn", weights, value)

    batch, length, *head = query.shape
    if length % QUERY_BLOCK or length == QUERY_BLOCK:
        return attend(query)
    blocks = query.reshape(batch, -1, QUERY_BLOCK, *head).swapaxes(0, 1)
    return jax.lax.map(attend, blocks).swapaxes(0, 1).reshape(query.shape)
