"""Norms, embeddings, rotary positions and the feed-forward layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from t5g2.kernels.embedding import lookup
from t5g2.kernels.layout import LENGTH, ROWS, place
from t5g2.kernels.projection import project
from t5g2.models.config import ModelConfig


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], stddev: float
) -> nnx.Param[Any]:
    """A float32 parameter ~ N(0, stddev²), or zeros, that knows its logical axes.

    Args:
        rngs: source of the initial values.
        shape: its shape.
        axes: a logical name for each dimension; sharding rules map names to mesh axes.
        stddev: standard deviation; 0 gives zeros.
    """
    if stddev == 0:
        return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)
    return nnx.Param(stddev * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


class RMSNorm(nnx.Module):
    """`x / rms(x) * (1 + scale)`, computed in float32 and cast back once."""

    def __init__(self, width: int, axis: str, eps: float, *, rngs: nnx.Rngs) -> None:
        self.scale = parameter(rngs, (width,), (axis,), 0.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)


class Embedder(nnx.Module):
    """Token embeddings, scaled by sqrt(D), tied to the output head.

    The end-of-image token has an unscaled embedding of its own.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.table = parameter(rngs, shape, ("vocab", "embed"), config.initializer_range)
        self.eoi_embedding = parameter(rngs, (config.hidden_size,), ("embed",), 0.0)

    def output_table(self) -> Float[Array, "V D"]:
        """The embedding table as the output head multiplies by it."""
        return self.table[...].astype(self.config.dtype)

    def __call__(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        dtype = self.config.dtype
        # sqrt(D) is rounded to the activations' dtype, as the released models were trained.
        scale = jnp.asarray(self.config.hidden_size**0.5, dtype)
        embedded = lookup(self.table[...], tokens, dtype) * scale
        is_eoi = (tokens == self.config.eoi_id)[..., None]
        return jnp.where(is_eoi, self.eoi_embedding[...].astype(dtype), embedded)


class FeedForward(nnx.Module):
    """GeGLU: `down(gelu_tanh(gate x) * up x)`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.mlp_dim
        std = config.initializer_range
        self.gate = parameter(rngs, (width, inner), ("embed", "mlp"), std)
        self.up = parameter(rngs, (width, inner), ("embed", "mlp"), std)
        self.down = parameter(rngs, (inner, width), ("mlp", "embed"), std)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up, down = (p[...].astype(x.dtype) for p in (self.gate, self.up, self.down))
        gated = jax.nn.gelu(project(x, gate), approximate=True) * project(x, up)
        return project(place("feed-forward", gated, ROWS, LENGTH, "mlp"), down)


class Rotation(nnx.Pytree):
    """Cosines and sines of rotary position embedding, [B, T, 1, N/2], in the activations' dtype."""

    def __init__(
        self, positions: Int[Array, "B T"], head_dim: int, theta: float, factor: float, dtype: str
    ) -> None:
        inverse_frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
        angles = positions[:, :, None, None].astype(jnp.float32) * (inverse_frequency / factor)
        self.cos = nnx.data(jnp.cos(angles).astype(dtype))
        self.sin = nnx.data(jnp.sin(angles).astype(dtype))

    def __call__(self, x: Float[Array, "B T H N"]) -> Float[Array, "B T H N"]:
        """Rotates the halves of each head of `x` against each other (RoFormer, section 3.4.2)."""
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate(
            [first * self.cos - second * self.sin, second * self.cos + first * self.sin], axis=-1
        )
