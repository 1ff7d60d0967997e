"""One layer, and the stack of layers that encoder and decoder each are."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from t5g2.kernels.attention import RESULTS, KeyValues, Window
from t5g2.kernels.layout import LENGTH, ROWS, place
from t5g2.kernels.projection import PRODUCTS
from t5g2.models.attention import Attention, Rotate
from t5g2.models.config import ModelConfig
from t5g2.models.layers import FeedForward, RMSNorm, Rotation

_kept = jax.checkpoint_policies.save_only_these_names
# What each `ModelConfig.remat` keeps of a layer for the backward pass.
_KEPT = {
    "dots": _kept(RESULTS, PRODUCTS),
    "attention": _kept(RESULTS),
    "full": None,
}


class Tokens(NamedTuple):
    """Where tokens stand: [B, S] segment ids (0 is padding) and [B, S] positions within each."""

    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]


class Memory(NamedTuple):
    """The encoder's output as the decoder sees it: [B, S, D] states and where they stand."""

    states: Float[Array, "B S D"]
    tokens: Tokens


def rotations(config: ModelConfig, positions: Int[Array, "B S"]) -> tuple[Rotation, Rotation]:
    """Rotary tables of local and of global layers, indexed by `is_global`."""
    local, everywhere = (
        Rotation(positions, config.head_dim, theta, factor, config.dtype)
        for theta, factor in (
            (config.rope_theta_local, 1.0),
            (config.rope_theta_global, config.rope_factor_global),
        )
    )
    return local, everywhere


class Layer(nnx.Module):
    """Attention and feed-forward, each between two norms, each added to the residual stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, "embed", config.rms_norm_eps, rngs=rngs)

        self.pre_attention_norm, self.post_attention_norm = norm(), norm()
        self.pre_mlp_norm, self.post_mlp_norm = norm(), norm()
        self.attention = Attention(config, rngs=rngs)
        self.mlp = FeedForward(config, rngs=rngs)

    def memory(self, memory: Memory) -> KeyValues:
        """The encoder's keys and values as this decoder layer projects them."""
        return self.attention.key_values(memory.states, *memory.tokens, None)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        rotate: Rotate,
        window: Window,
        memory: KeyValues | None = None,
        extend: Callable[[KeyValues], KeyValues] = lambda keys: keys,
    ) -> Float[Array, "B T D"]:
        """Applies the layer to states `x`.

        Args:
            x: residual stream.
            tokens: segments and positions of `x`.
            rotate: rotary positions of `x`.
            window: reach of the self-attention.
            memory: in the decoder, the encoder's keys and values.
            extend: given the keys and values of `x`, returns those to attend to: itself, or a cache
                to which they were appended.
        """
        normed = self.pre_attention_norm(x)
        keys = extend(self.attention.key_values(normed, *tokens, rotate))
        mixed = self.attention(normed, *tokens, rotate, keys, memory, window)
        x = x + self.post_attention_norm(mixed)
        x = x + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x)))
        return place("residual stream", x, ROWS, LENGTH, None)


class Stack(nnx.Module):
    """`num_layers` layers, whose parameters are stacked on a leading axis, and a final norm.

    The parameters have this one layout whether the forward pass scans or unrolls.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs=rngs)

        self.config = config
        self.layers = layers(rngs)
        self.final_norm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps, rngs=rngs)

    def unstacked(self) -> list[Layer]:
        """The layers one by one, as views of the stacked parameters."""
        graph, state = nnx.split(self.layers)
        return [
            nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], state))
            for i in range(self.config.num_layers)
        ]

    def __call__(
        self,
        x: Float[Array, "B T D"],
        apply: Callable[[Layer, bool, Array], Array],
    ) -> Float[Array, "B T D"]:
        """Runs `x = apply(layer, is_global, x)` for each layer, then the final norm."""
        config, (graph, state) = self.config, nnx.split(self.layers)
        period = config.global_every

        @functools.partial(jax.jit, static_argnums=2, inline=True)
        def layer(x: Array, layer_state: nnx.State, is_global: bool) -> Array:
            # Jitted, so that layers alike are traced once. Inlined: across calls the partitioner
            # makes more collectives.
            return apply(nnx.merge(graph, layer_state), is_global, x)

        def one(x: Array, states: nnx.State, i: int, is_global: bool) -> Array:
            # Sliced in here: slices would be kept for the backward pass, a copy of all weights.
            return layer(x, jax.tree.map(lambda p: p[i], states), is_global)

        if config.remat != "none":
            one = jax.checkpoint(one, policy=_KEPT[config.remat], static_argnums=(2, 3))

        def run(x: Array, states: nnx.State, first: int, count: int) -> Array:
            for i in range(count):
                x = one(x, states, i, config.is_global(first + i))
            return x

        blocks = config.num_layers // period
        if not config.scan_layers or blocks < 2:
            x = run(x, state, 0, config.num_layers)
        else:
            scanned = blocks * period
            head = jax.tree.map(lambda p: p[:scanned].reshape(blocks, period, *p.shape[1:]), state)
            x, _ = jax.lax.scan(lambda x, block: (run(x, block, 0, period), None), x, head)
            rest = jax.tree.map(lambda p: p[scanned:], state)
            x = run(x, rest, scanned, config.num_layers - scanned)
        return self.final_norm(x)
