"""The SigLIP vision tower (arXiv:2303.15343) of Gemma 3 and T5Gemma 2, and the way to the encoder.

The tower is frozen in pretraining (arXiv:2512.14856, section 3); the projector trains.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from t5g2.errors import UserError
from t5g2.kernels.layout import ROWS, place
from t5g2.kernels.projection import project
from t5g2.kernels.split_attention import placed_bidirectional_attention
from t5g2.models.config import ModelConfig, VisionConfig
from t5g2.models.layers import RMSNorm, parameter

CHANNELS = 3


def normalised(pixels: Shaped[Array, "... 3"]) -> Float[Array, "... 3"]:
    """Bytes as the tower was trained on them, float32 in [-1, 1]; floats are taken as they are."""
    if pixels.dtype == jnp.uint8:
        return (pixels.astype(jnp.float32) * (1 / 255) - 0.5) / 0.5
    return pixels


def images_by_row(
    config: ModelConfig, ids: Int[np.ndarray, "B S"], images: Shaped[np.ndarray, "M size size 3"]
) -> Shaped[np.ndarray, "B I size size 3"]:
    """Deals images out to the rows in whose tokens they have their places, in order.

    Args:
        config: of the model.
        ids: encoder tokens; an image has `tokens_per_image` places in a row.
        images: bytes, or floats in [-1, 1].

    Returns:
        As many slots in each row as the row with most images needs; the slots left over are zero.

    Raises:
        UserError: a model without vision tower, images of another size, or rows whose places are
            not those of all the images.
    """
    vision = config.vision
    if vision is None:
        raise UserError(
            "images were given, but this model reads text alone: it has no vision tower"
        )
    size = vision.image_size
    if images.ndim != 4 or images.shape[1:] != (size, size, CHANNELS):
        raise UserError(
            f"images must be [images, {size}, {size}, {CHANNELS}], not {list(images.shape)}"
        )
    places = np.sum(ids == vision.image_id, axis=1)
    counts = places // vision.tokens_per_image
    if np.any(places % vision.tokens_per_image) or counts.sum() != len(images):
        raise UserError(
            f"{len(images)} images need {vision.tokens_per_image} tokens {vision.image_id} each, "
            f"but the rows of input_ids have {places.tolist()} such tokens"
        )
    slots = np.zeros((len(ids), max(counts.max(initial=0), 1), *images.shape[1:]), images.dtype)
    slots[np.arange(slots.shape[1]) < counts[:, None]] = images
    return slots


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias, computed in float32 and cast back once."""

    def __init__(self, width: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=("vision_embed",))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32), axes=("vision_embed",))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.eps)
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return (normed * scale + bias).astype(x.dtype)


class Linear(nnx.Module):
    """`x @ weight + bias`."""

    def __init__(
        self, sizes: tuple[int, int], axes: tuple[str, str], std: float, *, rngs: nnx.Rngs
    ) -> None:
        self.weight = parameter(rngs, sizes, axes, std)
        self.bias = parameter(rngs, sizes[1:], axes[1:], 0.0)

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        return project(x, self.weight[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)


class VisionLayer(nnx.Module):
    """Pre-norm bidirectional attention and MLP."""

    def __init__(self, config: VisionConfig, std: float, *, rngs: nnx.Rngs) -> None:
        def linear(inputs: str, outputs: str) -> Linear:
            axes = (f"vision_{inputs}", f"vision_{outputs}")
            return Linear((sizes[inputs], sizes[outputs]), axes, std, rngs=rngs)

        width = config.hidden_size
        sizes = {"embed": width, "heads": width, "mlp": config.mlp_dim}
        self.heads = config.num_heads
        self.norm1 = LayerNorm(width, config.layer_norm_eps)
        self.norm2 = LayerNorm(width, config.layer_norm_eps)
        self.q, self.k, self.v = (linear("embed", "heads") for _ in range(3))
        self.o = linear("heads", "embed")
        self.up, self.down = linear("embed", "mlp"), linear("mlp", "embed")

    def __call__(self, x: Float[Array, "M P D"]) -> Float[Array, "M P D"]:
        def heads(linear: Linear) -> Float[Array, "M P H N"]:
            return linear(normed).reshape(*x.shape[:2], self.heads, -1)

        normed = self.norm1(x)
        mixed = placed_bidirectional_attention(heads(self.q), heads(self.k), heads(self.v))
        x = x + self.o(mixed.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x)), approximate=True))


class VisionTower(nnx.Module):
    """Images to visual tokens: patches, transformer layers, average pooling."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        assert config.vision is not None
        self.config, self.dtype = config.vision, config.dtype
        vision, std = config.vision, config.initializer_range

        @nnx.split_rngs(splits=vision.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs: nnx.Rngs) -> VisionLayer:
            return VisionLayer(vision, std, rngs=rngs)

        width, side = vision.hidden_size, vision.patch_size
        self.patch = parameter(
            rngs, (CHANNELS, side, side, width), ("", "", "", "vision_embed"), std
        )
        self.patch_bias = parameter(rngs, (width,), ("vision_embed",), 0.0)
        self.positions = parameter(rngs, (vision.patches, width), ("", "vision_embed"), std)
        self.layers = layers(rngs)
        self.final_norm = LayerNorm(width, vision.layer_norm_eps)

    def __call__(self, images: Shaped[Array, "M size size 3"]) -> Float[Array, "M N D"]:
        """The N = `tokens_per_image` visual tokens of each image, row by row, before projection.

        Args:
            images: bytes, or floats in [-1, 1].

        Returns:
            Means over squares of patches, in the model's dtype. No gradient flows back from them.
        """
        config = self.config
        side, grid = config.patch_size, config.image_size // config.patch_size
        count = images.shape[0]
        pixels = normalised(images).astype(self.dtype)
        patches = pixels.reshape(count, grid, side, grid, side, CHANNELS)
        patches = patches.transpose(0, 1, 3, 5, 2, 4).reshape(count, grid * grid, -1)
        kernel = self.patch[...].astype(self.dtype).reshape(patches.shape[-1], -1)
        embedded = project(patches, kernel) + self.patch_bias[...].astype(self.dtype)
        x = embedded + self.positions[...].astype(self.dtype)
        x = place("patches", x, ROWS, "patches", None)

        graph, state = nnx.split(self.layers)
        x, _ = jax.lax.scan(lambda x, layer: (nnx.merge(graph, layer)(x), None), x, state)
        x = self.final_norm(x)
        pooled = config.tokens_per_side
        squares = x.reshape(count, pooled, grid // pooled, pooled, grid // pooled, -1)
        tokens = jnp.mean(squares, axis=(2, 4)).reshape(count, config.tokens_per_image, -1)
        return jax.lax.stop_gradient(tokens)


class Projector(nnx.Module):
    """Visual tokens to embeddings of the encoder: a norm and a projection."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        assert config.vision is not None
        width = config.vision.hidden_size
        self.norm = RMSNorm(width, "vision_embed", config.vision.layer_norm_eps, rngs=rngs)
        # Both widths would be split over the same devices.
        axes = ("", "embed")
        self.weight = parameter(rngs, (width, config.hidden_size), axes, config.initializer_range)

    def __call__(self, tokens: Float[Array, "... D"]) -> Float[Array, "... E"]:
        return project(self.norm(tokens), self.weight[...].astype(tokens.dtype))
