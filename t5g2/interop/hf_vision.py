"""The vision tower's settings as Hugging Face's `config.json` spells them."""

from collections.abc import Mapping
from typing import Any

from t5g2.errors import UserError
from t5g2.models.config import VisionConfig

SIGLIP = "siglip_vision_model"
ACTIVATION = "gelu_pytorch_tanh"

# T5Gemma 2's image tokens. Gemma 3's stands one beyond the vocabulary that both have.
BEGIN_OF_IMAGE_ID = 255_999
IMAGE_ID = 256_001
GEMMA3_IMAGE_ID = 262_144

# What a setting is when `config.json` leaves it out. No released tower has all of these.
DEFAULTS: Mapping[str, Any] = {
    "model_type": SIGLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": ACTIVATION,
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}

# transformers always builds a vision tower, so a text model is exported with the least one: one
# pixel, one channel of width, no layers. Its tensors are `minimal_vision_shapes`, all zero: an
# image would become a zero embedding.
MINIMAL_VISION: Mapping[str, Any] = {
    **DEFAULTS,
    "hidden_size": 1,
    "intermediate_size": 1,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "image_size": 1,
    "patch_size": 1,
    "vision_use_head": False,
}


def minimal_vision_shapes(hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Names on disk and shapes of the tensors of `MINIMAL_VISION` and its projector.

    Args:
        hidden_size: width of the model.
    """
    tower, projector = "model.encoder.vision_tower.", "model.encoder.multi_modal_projector."
    return {
        f"{tower}embeddings.patch_embedding.weight": (1, 3, 1, 1),
        f"{tower}embeddings.patch_embedding.bias": (1,),
        f"{tower}embeddings.position_embedding.weight": (1, 1),
        f"{tower}post_layernorm.weight": (1,),
        f"{tower}post_layernorm.bias": (1,),
        f"{projector}mm_input_projection_weight": (1, hidden_size),
        f"{projector}mm_soft_emb_norm.weight": (1,),
    }


def to_hf_vision(vision: VisionConfig | None) -> dict[str, Any]:
    """The settings of an encoder's `config.json` that tell of images.

    Args:
        vision: the tower; None: the least one is told of.
    """
    if vision is None:
        return {
            "vision_config": dict(MINIMAL_VISION),
            "mm_tokens_per_image": 1,
            "boi_token_index": BEGIN_OF_IMAGE_ID,
            "image_token_index": IMAGE_ID,
        }
    return {
        "vision_config": {
            **DEFAULTS,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.mlp_dim,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "vision_use_head": False,
        },
        "mm_tokens_per_image": vision.tokens_per_image,
        "boi_token_index": vision.boi_id,
        "image_token_index": vision.image_id,
    }


def from_hf_vision(encoder: Mapping[str, Any], image_id: int) -> VisionConfig | None:
    """The tower that a `config.json` describes; None if it is the least one.

    Args:
        encoder: T5Gemma 2's settings of the encoder, or all of Gemma 3's.
        image_id: token at whose places visual tokens stand; Gemma 3's becomes T5Gemma 2's.

    Raises:
        UserError: a tower that t5g2 does not have.
    """
    tower = {**DEFAULTS, **(encoder.get("vision_config") or {})}
    if all(tower[name] == value for name, value in MINIMAL_VISION.items()):
        return None
    for name, only in (
        ("model_type", SIGLIP),
        ("num_channels", 3),
        ("hidden_act", ACTIVATION),
        ("vision_use_head", False),
    ):
        if tower[name] != only:
            raise UserError(
                f"config.json: vision_config.{name} is {tower[name]!r}; t5g2 has only {only!r}; "
                "`t5g2 import --no_vision` leaves the tower out"
            )
    for name in ("image_size", "patch_size"):
        if not isinstance(tower[name], int):
            raise UserError(
                f"config.json: vision_config.{name} must be a whole number, not {tower[name]!r}"
            )
    try:
        return VisionConfig(
            hidden_size=tower["hidden_size"],
            mlp_dim=tower["intermediate_size"],
            num_layers=tower["num_hidden_layers"],
            num_heads=tower["num_attention_heads"],
            image_size=tower["image_size"],
            patch_size=tower["patch_size"],
            tokens_per_image=encoder.get("mm_tokens_per_image", 256),
            layer_norm_eps=tower["layer_norm_eps"],
            boi_id=image_token(encoder, "boi", BEGIN_OF_IMAGE_ID),
            image_id=IMAGE_ID if image_id == GEMMA3_IMAGE_ID else image_id,
        )
    except ValueError as error:
        raise UserError(f"config.json: {error}") from error


def image_token(config: Mapping[str, Any], kind: str, default: int) -> int:
    """The id of the `boi`, `eoi` or `image` token, under either spelling of its setting."""
    return config.get(f"{kind}_token_index", config.get(f"{kind}_token_id", default))
