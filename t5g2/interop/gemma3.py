"""Gemma 3 as the start of a T5Gemma 2 (arXiv:2512.14856, section 2).

Every Gemma layer is copied into encoder and decoder. Merged attention has no weights of its own,
so nothing but the end-of-image embedding is new, and the function is kept: the decoder that sees
no encoder, and the encoder under a causal mask, compute what Gemma 3 computes.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from t5g2.errors import UserError
from t5g2.interop import names
from t5g2.interop.hf import open_parameters, read_hf_config, without_vision
from t5g2.interop.hf_config import END_OF_IMAGE_ID, TEXT_DEFAULTS, model_of
from t5g2.interop.hf_vision import GEMMA3_IMAGE_ID, from_hf_vision, image_token
from t5g2.interop.weights import open_weights
from t5g2.lazy_array import LazyArray
from t5g2.models.config import ModelConfig

MODEL_TYPES = ("gemma3_text", "gemma3")

# Multimodal Gemma 3 has these rows; those beyond T5Gemma 2's stand for images.
_MULTIMODAL_ROWS, _ROWS = 262_208, 262_144

_TABLE = "model.embed_tokens.weight"
_TIED = {"lm_head.weight": _TABLE}
_EOI = "embedder/eoi_embedding"

# Of T5Gemma 2's and of Gemma 3's names on disk.
_RENAMED = (
    ("model.encoder.", "model."),
    ("model.decoder.", "model."),
    (".pre_self_attn_layernorm.", ".input_layernorm."),
    (".post_self_attn_layernorm.", ".post_attention_layernorm."),
)
# Of a multimodal directory (before transformers 5, and since), as if it were text-only.
_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


def _gemma_key(key: str) -> str:
    for t5gemma2, gemma3 in _RENAMED:
        key = key.replace(t5gemma2, gemma3)
    return key


_VISION_PREFIXES = tuple(_gemma_key(prefix) for prefix in names.VISION_PREFIXES)


def names_of(config: ModelConfig) -> tuple[names.Name, ...]:
    """The names of all parameters but one; those of layers twice, for encoder and decoder."""
    return tuple(
        dataclasses.replace(name, key=_gemma_key(name.key))
        for name in names.names_of(config)
        if name.path != _EOI
    )


def from_gemma3_config(config: Mapping[str, Any], *, text_only: bool = False) -> ModelConfig:
    """The T5Gemma 2 that a Gemma 3 of this `config.json` becomes; its RoPE is Gemma's own.

    Args:
        config: its content.
        text_only: leave out the vision tower, whatever it is.

    Raises:
        UserError: another model type, or a setting that t5g2 does not have.
    """
    text = _text(config)
    if text.get("use_bidirectional_attention"):
        raise UserError(
            "config.json: use_bidirectional_attention is true; t5g2 imports causal models only"
        )
    vision = None
    if config["model_type"] == "gemma3" and not text_only:
        vision = from_hf_vision(config, image_token(config, "image", GEMMA3_IMAGE_ID))
    model = model_of(config, text, image_token(config, "eoi", END_OF_IMAGE_ID), vision)
    rows = _ROWS if model.vocab_size == _MULTIMODAL_ROWS else model.vocab_size
    return dataclasses.replace(model, vocab_size=rows)


def open_gemma3(path: Path, *, text_only: bool = False) -> tuple[ModelConfig, dict[str, Any]]:
    """Opens a Gemma 3 directory, text-only or multimodal, as a T5Gemma 2.

    Args:
        path: the directory.
        text_only: leave out the vision tower; a logged line says how many tensors it has.

    Returns:
        The configuration, and the parameters structured as by `parameter_tree`: lazy arrays of
        the dtypes on disk.

    Raises:
        UserError: as `t5g2.interop.hf.open_hf`.
    """
    content = read_hf_config(path)
    config = from_gemma3_config(content, text_only=text_only)
    stored = {_canonical(key): tensor for key, tensor in open_weights(path).items()}
    if config.vision is None:
        stored = without_vision(path, stored, _VISION_PREFIXES, {})
    rows = _text(content)["vocab_size"]
    for key in (_TABLE, *_TIED):
        if key in stored and stored[key].shape[:1] == (rows,):
            stored[key] = _first_rows(stored[key], config.vocab_size)
    params = open_parameters(path, config, names_of(config), stored, _TIED)
    params[_EOI] = _eoi_embedding(params["embedder/table"], config)
    return config, traverse_util.unflatten_dict(params, sep="/")


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the text layers, defaults (those of T5Gemma 2) included."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(f"config.json: model_type is {kind!r}, not one of {', '.join(MODEL_TYPES)}")
    return {
        **TEXT_DEFAULTS,
        **(config if kind == "gemma3_text" else config.get("text_config") or {}),
    }


def _canonical(key: str) -> str:
    for prefix, canonical in _PREFIXES:
        if key.startswith(prefix):
            key = canonical + key.removeprefix(prefix)
            break
    return key.replace("model.vision_tower.vision_model.", "model.vision_tower.", 1)


def _first_rows(tensor: LazyArray, rows: int) -> LazyArray:
    return LazyArray((rows, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[:rows])


def _eoi_embedding(table: LazyArray, config: ModelConfig) -> LazyArray:
    """What Gemma 3, which has no embedding of its own for it, embeds the end of an image as."""

    def read() -> Float[np.ndarray, " D"]:
        if config.eoi_id >= table.shape[0]:
            return np.zeros(table.shape[1:], table.dtype)
        # As `Embedder` scales all other tokens, rounding included.
        scale = jnp.asarray(config.hidden_size**0.5, config.dtype)
        row = table.read()[config.eoi_id].astype(np.float32)
        return (row * np.float32(scale)).astype(table.dtype)

    return LazyArray(table.shape[1:], table.dtype, read)
