"""T5Gemma 2's hyperparameters as Hugging Face's `config.json` spells them."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

from t5g2.errors import UserError
from t5g2.interop.hf_vision import (
    ACTIVATION,
    IMAGE_ID,
    from_hf_vision,
    image_token,
    to_hf_vision,
)
from t5g2.models.config import ModelConfig, VisionConfig

WeightDtype = Literal["float32", "bfloat16", "float16"]
ComputeDtype = Literal["float32", "bfloat16"]

logger = logging.getLogger(__name__)

# The transformers release whose files these are.
FORMAT_VERSION = "5.23.0"
LAYER_TYPES = ("sliding_attention", "full_attention")
END_OF_IMAGE_ID = 256_000

# What a setting is when `config.json` leaves it out: released ones were written by versions that
# omit whatever equals the class's default. No released size has all of these.
TEXT_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": ACTIVATION,
    "max_position_embeddings": 131_072,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "rope_parameters": None,
}


def to_hf_config(config: ModelConfig, dtype: WeightDtype = "float32") -> dict[str, Any]:
    """The `config.json` of a `T5Gemma2ForConditionalGeneration`.

    Args:
        config: the model.
        dtype: dtype of the weights beside it.

    Raises:
        UserError: transformers cannot build such a model.
    """
    if config.hidden_size % config.num_heads:
        raise UserError(
            f"hidden_size {config.hidden_size} is not a multiple of num_heads {config.num_heads}, "
            "which transformers requires; export a model where it is"
        )
    if config.query_pre_attn_scalar != int(config.query_pre_attn_scalar):
        raise UserError(
            f"query_pre_attn_scalar {config.query_pre_attn_scalar} is not a whole number, which "
            "transformers requires; export a model where it is"
        )
    rope_global: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta_global}
    if config.rope_factor_global != 1:
        rope_global |= {"rope_type": "linear", "factor": config.rope_factor_global}
    tokens = {
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
        "vocab_size": config.vocab_size,
    }
    text = {
        **tokens,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_activation": ACTIVATION,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "use_cache": True,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": rope_global,
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_theta_local},
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dropout_rate": 0.0,
        "query_pre_attn_scalar": int(config.query_pre_attn_scalar),
        "sliding_window": config.sliding_window,
        "layer_types": [LAYER_TYPES[config.is_global(i)] for i in range(config.num_layers)],
        "final_logit_softcapping": config.final_logit_softcap,
        "attn_logit_softcapping": None,
    }
    images = to_hf_vision(config.vision)
    return {
        "architectures": ["T5Gemma2ForConditionalGeneration"],
        "model_type": "t5gemma2",
        "is_encoder_decoder": True,
        "dtype": dtype,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "dropout_rate": 0.0,
        "classifier_dropout_rate": 0.0,
        "initializer_range": config.initializer_range,
        "image_token_index": images["image_token_index"],
        "eoi_token_index": config.eoi_id,
        **tokens,
        "encoder": {
            "model_type": "t5gemma2_encoder",
            "text_config": {"model_type": "t5gemma2_text", **text},
            **images,
            "eoi_token_index": config.eoi_id,
            "initializer_range": config.initializer_range,
            "tie_word_embeddings": True,
        },
        "decoder": {"model_type": "t5gemma2_decoder", **text},
        "transformers_version": FORMAT_VERSION,
    }


def generation_config(config: ModelConfig) -> dict[str, Any]:
    """The `generation_config.json` beside it: greedy by default, the decoder starts with bos."""
    return {
        "bos_token_id": config.bos_id,
        "decoder_start_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
        "transformers_version": FORMAT_VERSION,
    }


def from_hf_config(config: Mapping[str, Any], *, text_only: bool = False) -> ModelConfig:
    """The model that a `config.json` of model type `t5gemma2` describes.

    Settings that transformers itself ignores are accepted and logged.

    Args:
        config: its content.
        text_only: leave out the vision tower, whatever it is.

    Raises:
        UserError: another model type, or a setting that t5g2 does not have.
    """
    if config.get("model_type") != "t5gemma2":
        raise UserError(
            f"config.json: model_type is {config.get('model_type')!r}; t5g2 reads 't5gemma2', and "
            "`t5g2 import` turns 'gemma3_text' and 'gemma3' into it"
        )
    encoder = config.get("encoder") or {}
    decoder = {**TEXT_DEFAULTS, **(config.get("decoder") or {})}
    text = {**TEXT_DEFAULTS, **(encoder.get("text_config") or {})}
    differing = [name for name in TEXT_DEFAULTS if text[name] != decoder[name]]
    if differing:
        raise UserError(
            "config.json: encoder and decoder must have the same shape, but differ in "
            + ", ".join(f"{name} ({text[name]} and {decoder[name]})" for name in differing)
        )
    eoi_id = image_token(encoder, "eoi", END_OF_IMAGE_ID)
    # transformers takes this one from the top, whatever the encoder's settings say.
    image_id = image_token(config, "image", IMAGE_ID)
    vision = None if text_only else from_hf_vision(encoder, image_id)
    return model_of(config, decoder, eoi_id, vision)


def model_of(
    config: Mapping[str, Any], text: Mapping[str, Any], eoi_id: int, vision: VisionConfig | None
) -> ModelConfig:
    """The model whose layers `text` describes: T5Gemma 2's, or Gemma 3's, which are the same.

    Args:
        config: the whole `config.json`.
        text: its settings of the text layers, on top of `TEXT_DEFAULTS`.
        eoi_id: the end-of-image token.
        vision: the tower.

    Raises:
        UserError: a setting that t5g2 does not have.
    """
    _refuse_unsupported(config, text)
    factor, theta_global, theta_local = _rope(text)
    try:
        return ModelConfig(
            vocab_size=_whole(text, "vocab_size"),
            hidden_size=_whole(text, "hidden_size"),
            mlp_dim=_whole(text, "intermediate_size"),
            num_layers=_whole(text, "num_hidden_layers"),
            num_heads=_whole(text, "num_attention_heads"),
            num_kv_heads=_whole(text, "num_key_value_heads"),
            head_dim=_whole(text, "head_dim"),
            sliding_window=_whole(text, "sliding_window"),
            global_every=_global_every(text),
            rope_theta_local=theta_local,
            rope_theta_global=theta_global,
            rope_factor_global=factor,
            rms_norm_eps=text["rms_norm_eps"],
            query_pre_attn_scalar=float(text["query_pre_attn_scalar"]),
            final_logit_softcap=text["final_logit_softcapping"],
            max_position_embeddings=_whole(text, "max_position_embeddings"),
            initializer_range=text["initializer_range"],
            pad_id=_whole(text, "pad_token_id"),
            eos_id=_first_eos(text),
            bos_id=_whole(text, "bos_token_id"),
            eoi_id=eoi_id,
            vision=vision,
            dtype=_compute_dtype(config),
        )
    except ValueError as error:
        raise UserError(f"config.json: {error}") from error


def _refuse_unsupported(config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    for name, only in (("attention_bias", False), ("hidden_activation", ACTIVATION)):
        if text[name] != only:
            raise UserError(f"config.json: {name} is {text[name]!r}; t5g2 has only {only!r}")
    for where in (config, text):
        if not where.get("tie_word_embeddings", True):
            raise UserError(
                "config.json: tie_word_embeddings is false; t5g2 has only tied embeddings"
            )
    for name in ("dropout_rate", "attention_dropout"):
        if config.get(name):
            logger.warning("config.json: %s %s is ignored: no dropout here", name, config[name])
    if text["attn_logit_softcapping"] is not None:
        logger.warning(
            "config.json: attn_logit_softcapping %s is ignored, as transformers does",
            text["attn_logit_softcapping"],
        )


def _whole(text: Mapping[str, Any], name: str) -> int:
    if not isinstance(text[name], int):
        raise UserError(f"config.json: {name} must be a whole number, not {text[name]!r}")
    return text[name]


def _first_eos(text: Mapping[str, Any]) -> int:
    ids = text["eos_token_id"]
    if isinstance(ids, list) and ids:
        if len(ids) > 1:
            logger.warning("config.json: of eos_token_id %s only the first is used", ids)
        return _whole({"eos_token_id": ids[0]}, "eos_token_id")
    return _whole(text, "eos_token_id")


def _global_every(text: Mapping[str, Any]) -> int:
    """The period of global layers; Gemma's 6 wherever that, too, explains the layers given."""
    layers, given = _whole(text, "num_hidden_layers"), text["layer_types"]
    periods = (6, *range(1, layers + 2))
    if given is None:
        return text.get("sliding_window_pattern", 6)
    for period in periods:
        if given == [LAYER_TYPES[(i + 1) % period == 0] for i in range(layers)]:
            return period
    raise UserError(
        f"config.json: layer_types must make every n-th of {layers} layers 'full_attention' and "
        f"the others 'sliding_attention', not {given}"
    )


def _rope(text: Mapping[str, Any]) -> tuple[float, float, float]:
    """(factor of global layers, base of global layers, base of local layers)."""
    given: dict[str, Any] = dict(text["rope_parameters"] or {})
    # Before transformers 5 these were three settings of their own.
    global_rope = {
        "rope_theta": text.get("rope_theta", 1_000_000.0),
        **(given.pop("full_attention", None) or {}),
        **(text.get("rope_scaling") or {}),
    }
    local_rope = {
        "rope_theta": text.get("rope_local_base_freq", 10_000.0),
        **(given.pop("sliding_attention", None) or {}),
    }
    kinds = [
        rope.pop("rope_type", rope.pop("type", "default")) for rope in (global_rope, local_rope)
    ]
    theta_global, theta_local = global_rope.pop("rope_theta"), local_rope.pop("rope_theta")
    factor = global_rope.pop("factor", 1.0) if kinds[0] == "linear" else 1.0
    rest = {**given, **global_rope, **local_rope}
    if kinds[0] not in ("default", "linear") or kinds[1] != "default" or rest:
        raise UserError(
            "config.json: t5g2 has rope_type 'default' for sliding_attention and 'default' or "
            f"'linear' (with a factor) for full_attention, not {text['rope_parameters']}"
        )
    return float(factor), float(theta_global), float(theta_local)


def _compute_dtype(config: Mapping[str, Any]) -> ComputeDtype:
    """The dtype to compute in: that of the weights, or float32 where t5g2 does not have it."""
    dtype = config.get("dtype", config.get("torch_dtype")) or "float32"
    if dtype == "bfloat16":
        return "bfloat16"
    if dtype != "float32":
        logger.warning("config.json: dtype %s is computed in float32", dtype)
    return "float32"
