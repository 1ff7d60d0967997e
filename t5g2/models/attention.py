"""Grouped-query attention with QK-norm, and how far each kind of layer sees."""

from typing import Protocol

from flax import nnx
from jaxtyping import Array, Float, Int

from t5g2.kernels.attention import KeyValues, Window
from t5g2.kernels.layout import LENGTH, ROWS, place
from t5g2.kernels.projection import project
from t5g2.kernels.split_attention import placed_attention
from t5g2.models.config import ModelConfig
from t5g2.models.layers import RMSNorm, parameter


class Rotate(Protocol):
    """Applies rotary positions to queries or keys."""

    def __call__(self, x: Float[Array, "B T H N"]) -> Float[Array, "B T H N"]: ...


def encoder_window(config: ModelConfig, is_global: bool) -> Window:
    """Reach of an encoder layer: everything, or about half the window on either side."""
    if is_global:
        return Window(None, None)
    return Window((config.sliding_window + 1) // 2 - 1, config.sliding_window // 2)


def decoder_window(config: ModelConfig, is_global: bool) -> Window:
    """Reach of a decoder layer: the past, or its last `sliding_window` positions."""
    return Window(None if is_global else config.sliding_window - 1, 0)


class Attention(nnx.Module):
    """The one attention of an encoder or decoder layer: q, k, v, o and the norms of q and k.

    A decoder layer uses the same projections for its own states and for the encoder's (merged
    attention); the encoder's keys are normed but not rotated.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        width, head_dim, std = config.hidden_size, config.head_dim, config.initializer_range
        heads, kv_heads = config.num_heads, config.num_kv_heads
        kv_axes = ("embed", "kv_heads", "head_dim")
        self.q = parameter(rngs, (width, heads, head_dim), ("embed", "heads", "head_dim"), std)
        self.k = parameter(rngs, (width, kv_heads, head_dim), kv_axes, std)
        self.v = parameter(rngs, (width, kv_heads, head_dim), kv_axes, std)
        self.o = parameter(rngs, (heads, head_dim, width), ("heads", "head_dim", "embed"), std)
        self.q_norm = RMSNorm(head_dim, "head_dim", config.rms_norm_eps, rngs=rngs)
        self.k_norm = RMSNorm(head_dim, "head_dim", config.rms_norm_eps, rngs=rngs)
        self.scale = config.query_pre_attn_scalar**-0.5
        self.backend = config.attention

    def key_values(
        self,
        x: Float[Array, "B S D"],
        segment_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        rotate: Rotate | None,
    ) -> KeyValues:
        """Keys and values of states `x`; without `rotate` they are the encoder's, for merging."""
        key = self.k_norm(project(x, self.k[...].astype(x.dtype)))
        value = project(x, self.v[...].astype(x.dtype))
        key, value = (
            place(what, states, ROWS, LENGTH, "kv_heads", None)
            for what, states in (("keys", rotate(key) if rotate else key), ("values", value))
        )
        return KeyValues(key, value, segment_ids, positions)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        rotate: Rotate,
        keys: KeyValues,
        memory: KeyValues | None,
        window: Window,
    ) -> Float[Array, "B T D"]:
        """Attends from `x` to `keys` (within `window`) and to `memory` (all of it)."""
        query = rotate(self.q_norm(project(x, self.q[...].astype(x.dtype))))
        query = place("queries", query, ROWS, LENGTH, "heads", None)
        mixed = placed_attention(
            query,
            segment_ids,
            positions,
            keys,
            memory,
            window=window,
            scale=self.scale,
            backend=self.backend,
        )
        return project(mixed, self.o[...].astype(x.dtype))
