"""Attention by TPU's splash kernel: blocks of a static mask, of which hidden ones cost nothing."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Float, Int

from t5g2.kernels.attention import RESULTS, KeyValues, Window

# Queries and keys of a block: larger ones fill the vector memory of v5e and v5p.
_BLOCK = 512
_LANES = 128


@dataclasses.dataclass(frozen=True)
class MergedMask(splash_attention.Mask):
    """Which keys each query may see, segments aside: its window of its own side, all of the other.

    Attributes:
        queries: queries, and keys of their own side, which come first.
        keys: all keys.
        window: reach along the row. Within a segment positions count by one, so that it is the
            reach in positions.
    """

    queries: int
    keys: int
    window: Window

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys."""
        return self.queries, self.keys

    def __getitem__(self, part: tuple[slice, slice]) -> np.ndarray:
        """The bool mask of some queries and some keys."""
        query, key = (np.arange(*s.indices(size)) for s, size in zip(part, self.shape, strict=True))
        ahead = key[None, :] - query[:, None]
        visible = np.ones(ahead.shape, np.bool_)
        if self.window.left is not None:
            visible &= ahead >= -self.window.left
        if self.window.right is not None:
            visible &= ahead <= self.window.right
        return visible | (key >= self.queries)[None, :]


def splash(
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

    Lengths are filled up to whole blocks with padding. Logits and softmax are float32.

    Args:
        query: as there, like what is not named here.
        query_segment_ids: as there.
        keys: as there; of a segment, tokens stand side by side.
        memory: as there.
        window: as there.
        scale: as there; queries are multiplied by it, in their own dtype.
        interpret: run the kernel in XLA, which any device can.
    """
    length, heads = query.shape[1:3]
    own = filled_length(length)
    crossed = 0 if memory is None else memory.key.shape[1]
    total = filled_length(own + crossed)

    def joined(mine: Array, theirs: Array | None) -> Array:
        parts = [_filled(mine, own)] if theirs is None else [_filled(mine, own), theirs]
        return _filled(jnp.concatenate(parts, axis=1), total)

    key, value, key_segment_ids = (
        joined(getattr(keys, name), None if memory is None else getattr(memory, name))
        for name in ("key", "value", "segment_ids")
    )
    # Padding sees padding, so that no softmax is empty; what it sees is thrown away.
    segments = splash_attention.SegmentIds(
        _filled(query_segment_ids, own).astype(jnp.int32), key_segment_ids.astype(jnp.int32)
    )
    kernel = _kernel(MergedMask(own, total, window), heads, (_block(own), _block(total)), interpret)
    by_head = (jnp.swapaxes(x, 1, 2) for x in (_filled(query * scale, own), key, value))
    out = jnp.swapaxes(jax.vmap(kernel)(*by_head, segments), 1, 2)[:, :length]
    return jnp.where(query_segment_ids[..., None, None] != 0, out, 0)


def filled_length(length: int) -> int:
    """What a length becomes that is filled up to whole blocks."""
    block = _block(length)
    return -(-length // block) * block


def _block(length: int) -> int:
    """Tokens of a block: such that the blocks are even, and few."""
    blocks = -(-length // _BLOCK)
    return -(-length // (blocks * _LANES)) * _LANES


def _filled(array: Array, length: int) -> Array:
    """[B, L, ...] with zeros behind it, up to `length`."""
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, length - array.shape[1])
    return jnp.pad(array, padding)


@functools.lru_cache(maxsize=32)
def _kernel(mask: MergedMask, heads: int, blocks: tuple[int, int], interpret: bool) -> Any:
    queries, keys = blocks
    sizes = splash_attention.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )
    with jax.ensure_compile_time_eval():
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask([mask] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=RESULTS,
            interpret=interpret,
        )
    # Constants of numpy belong to no device and to no trace.
    return jax.tree.map(np.asarray, kernel)
