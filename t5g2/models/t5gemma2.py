"""T5Gemma 2: the encoder-decoder, in one page."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from t5g2.kernels import vocabulary_loss
from t5g2.kernels.layout import LENGTH, ROWS, place
from t5g2.models.attention import decoder_window, encoder_window
from t5g2.models.config import ModelConfig
from t5g2.models.layers import Embedder
from t5g2.models.stack import Layer, Memory, Stack, Tokens, rotations
from t5g2.models.vision import Projector, VisionTower

# What pretraining leaves as it is, at the top of `parameter_tree`.
FROZEN = frozenset({"vision"})


class T5Gemma2(nnx.Module):
    """T5Gemma 2 (arXiv:2512.14856): bidirectional encoder, decoder with merged attention.

    Embeddings are tied three ways: encoder input, decoder input and output head. With
    `config.vision` the encoder also reads images.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embedder = Embedder(config, rngs=rngs)
        self.encoder = Stack(config, rngs=rngs)
        self.decoder = Stack(config, rngs=rngs)
        if config.vision is not None:
            self.vision = VisionTower(config, rngs=rngs)
            self.projector = Projector(config, rngs=rngs)

    def visual_tokens(self, images: Shaped[Array, "B I size size 3"]) -> Float[Array, "B N D"]:
        """What the frozen tower makes of each row's I images, one after the other (N = I * 256).

        Args:
            images: bytes, or floats in [-1, 1].
        """
        rows, count = images.shape[:2]
        tokens = self.vision(images.reshape(rows * count, *images.shape[2:]))
        return tokens.reshape(rows, -1, tokens.shape[-1])

    def embed(
        self, ids: Int[Array, "B S"], visual: Float[Array, "B N W"] | None
    ) -> Float[Array, "B S D"]:
        embedded = self.embedder(ids)
        if visual is None:
            return place("embeddings", embedded, ROWS, LENGTH, None)
        assert self.config.vision is not None
        is_visual = ids == self.config.vision.image_id
        # The n-th place for a visual token in a row takes the row's n-th, unscaled.
        nth = jnp.clip(jnp.cumsum(is_visual, axis=1) - 1, 0, visual.shape[1] - 1)
        placed = jnp.take_along_axis(self.projector(visual), nth[..., None], axis=1)
        merged = jnp.where(is_visual[..., None], placed.astype(embedded.dtype), embedded)
        return place("embeddings", merged, ROWS, LENGTH, None)

    def encode(
        self,
        ids: Int[Array, "B S"],
        tokens: Tokens,
        visual: Float[Array, "B N W"] | None = None,
    ) -> Memory:
        """Encodes token ids; each token sees its own segment, within its layer's window.

        Args:
            ids: encoder tokens.
            tokens: where they stand.
            visual: each row's `visual_tokens`, in the order of its places for them (`image_id`),
                of which there may be fewer than N; None: such places are plain tokens.
        """
        rotate = rotations(self.config, tokens.positions)

        def apply(layer: Layer, is_global: bool, x: Array) -> Array:
            window = encoder_window(self.config, is_global)
            return layer(x, tokens, rotate[is_global], window)

        return Memory(self.encoder(self.embed(ids, visual), apply), tokens)

    def decode(
        self, ids: Int[Array, "B T"], tokens: Tokens, memory: Memory
    ) -> Float[Array, "B T D"]:
        """Final hidden states [B, T, D] of the decoder, given its (shifted) inputs and the encoder.

        Each token sees its own segment: its past in the decoder, all of it in the encoder.
        """
        rotate = rotations(self.config, tokens.positions)

        def apply(layer: Layer, is_global: bool, x: Array) -> Array:
            window = decoder_window(self.config, is_global)
            return layer(x, tokens, rotate[is_global], window, layer.memory(memory))

        return self.decoder(self.embed(ids, None), apply)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Output logits, float32, of final hidden states."""
        return vocabulary_loss.logits(
            hidden, self.embedder.output_table(), self.config.final_logit_softcap
        )

    def token_losses(
        self, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]
    ) -> Float[Array, "B T"]:
        """Negative log-likelihood of each target in nats, without holding all logits."""
        softcap = self.config.final_logit_softcap
        return vocabulary_loss.token_losses(
            hidden, self.embedder.output_table(), targets, softcap=softcap
        )

    def summed_losses(
        self,
        hidden: Float[Array, "B T D"],
        targets: Int[Array, "B T"],
        weights: Float[Array, "B T"],
        z_loss: float = 0.0,
        teaching: vocabulary_loss.Teaching | None = None,
    ) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
        """The loss that is trained on, and `token_losses` (see `vocabulary_loss.summed_losses`)."""
        return vocabulary_loss.summed_losses(
            hidden,
            self.embedder.table[...],
            targets,
            weights,
            softcap=self.config.final_logit_softcap,
            z_loss=z_loss,
            teaching=teaching,
        )

    def teaching(
        self, hidden: Float[Array, "B T D"], teaches: Bool[Array, "B T"]
    ) -> vocabulary_loss.Teaching:
        """What the model, as a teacher, says of tokens with these final hidden states."""
        return vocabulary_loss.Teaching(
            hidden, self.embedder.output_table(), teaches, self.config.final_logit_softcap
        )

    def __call__(
        self,
        input_ids: Int[Array, "B S"],
        decoder_input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B S"] | None = None,
        images: Shaped[Array, "B I size size 3"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of unpacked rows, one example each, with positions counted from the row's start.

        Args:
            input_ids: encoder tokens.
            decoder_input_ids: decoder tokens, shifted right (they start with bos).
            attention_mask: 1 for real encoder tokens, 0 for padding; None: all are real.
            images: of each row, in order; see `visual_tokens`.
        """
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        visual = None if images is None else self.visual_tokens(images)
        tokens = Tokens(mask.astype(jnp.int32), _arange(input_ids))
        memory = self.encode(input_ids, tokens, visual)
        tokens = Tokens(jnp.ones_like(decoder_input_ids), _arange(decoder_input_ids))
        return self.logits(self.decode(decoder_input_ids, tokens, memory))


def _arange(ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    return jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)


def abstract_model(config: ModelConfig) -> Any:
    """The model with shapes in place of arrays: its graph and parameter shapes, no memory."""
    return nnx.eval_shape(lambda: T5Gemma2(config, rngs=nnx.Rngs(0)))


def parameter_tree(model: T5Gemma2) -> dict[str, Any]:
    """The parameters as nested dicts of arrays (stacked layers: [L, ...])."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def split_frozen(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters that pretraining changes, and those that it leaves as they are."""
    frozen = {name: tree for name, tree in params.items() if name in FROZEN}
    return {name: tree for name, tree in params.items() if name not in FROZEN}, frozen


def from_parameters(config: ModelConfig, params: dict[str, Any]) -> T5Gemma2:
    """The model that computes with given parameters (the inverse of `parameter_tree`)."""
    graph, state = nnx.split(abstract_model(config))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """For each parameter, in the structure of `parameter_tree`, its tuple of logical axis names."""
    model = abstract_model(config)

    def axes(variable: nnx.Variable[Any]) -> tuple[str, ...]:
        names = variable.get_metadata("axes")
        return ("layers",) * (len(variable.shape) - len(names)) + names

    state = nnx.state(model, nnx.Param)
    return nnx.to_pure_dict(nnx.map_state(lambda path, v: axes(v), state))
