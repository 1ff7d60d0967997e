"""The model's hyperparameters: frozen dataclasses, nothing that runs."""

import dataclasses
import math
from typing import Literal

RematPolicy = Literal["none", "dots", "attention", "full"]
AttentionBackend = Literal["auto", "reference", "blockwise", "splash", "triton"]

# What changes how the model is computed but not which function it computes: a run may be resumed
# with other values of these.
EXECUTION_FIELDS = frozenset({"dtype", "scan_layers", "remat", "attention"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The frozen SigLIP tower (arXiv:2303.15343) and how its output enters the encoder.

    The defaults are those of all released sizes.

    Attributes:
        hidden_size: width of the tower.
        mlp_dim: width of its feed-forward layers.
        num_layers: number of its layers.
        num_heads: attention heads; divides `hidden_size`.
        image_size: height and width of an image, in pixels.
        patch_size: height and width of a patch, in pixels; divides `image_size`.
        tokens_per_image: visual tokens of an image, a square number; patches are averaged in equal
            squares to as many.
        layer_norm_eps: epsilon of its norms and of the projector's.
        boi_id: token that stands before an image's tokens.
        image_id: token at whose places the visual tokens stand.
    """

    hidden_size: int = 1152
    mlp_dim: int = 4304
    num_layers: int = 27
    num_heads: int = 16
    image_size: int = 896
    patch_size: int = 14
    tokens_per_image: int = 256
    layer_norm_eps: float = 1e-6
    boi_id: int = 255_999
    image_id: int = 256_001

    def __post_init__(self) -> None:
        for name in ("hidden_size", "mlp_dim", "num_heads", "image_size", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"vision {name} must be at least 1, not {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"vision num_heads ({self.num_heads}) must divide its hidden_size "
                f"({self.hidden_size})"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size ({self.patch_size}) must divide image_size ({self.image_size})"
            )
        side = self.tokens_per_side
        if side**2 != self.tokens_per_image or side < 1 or self.patches % self.tokens_per_image:
            raise ValueError(
                f"tokens_per_image ({self.tokens_per_image}) must be a square number that divides "
                f"the {self.patches} patches of an image into squares"
            )

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_side(self) -> int:
        """Visual tokens along one side of an image."""
        return math.isqrt(self.tokens_per_image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A T5Gemma 2 encoder-decoder (arXiv:2512.14856); encoder and decoder have the same shape.

    Attributes:
        vocab_size: rows of the tied embedding table (V).
        hidden_size: width of the residual stream (D).
        mlp_dim: width of the gated feed-forward layer (F).
        num_layers: layers of the encoder, and again of the decoder (L).
        num_heads: query heads (H).
        num_kv_heads: key and value heads (K); divides `num_heads`.
        head_dim: width of one head (N).
        sliding_window: keys that a local layer sees. Decoder: the last `sliding_window` positions;
            encoder: about half of them on either side.
        global_every: every n-th layer attends globally, the others locally.
        rope_theta_local: RoPE base of local layers.
        rope_theta_global: RoPE base of global layers.
        rope_factor_global: linear position interpolation of global layers (positions are divided
            by it); 8 in the released models.
        rms_norm_eps: epsilon of every RMSNorm.
        query_pre_attn_scalar: attention logits are scaled by its inverse square root.
        final_logit_softcap: c in `c * tanh(logits / c)`, or None.
        max_position_embeddings: longest context the model is meant for; recorded, not enforced.
        initializer_range: standard deviation of the initial projections and embeddings.
        pad_id: padding token.
        eos_id: end of sequence.
        bos_id: start of the decoder's input.
        eoi_id: end-of-image token, whose embedding is a parameter of its own.
        vision: the vision tower; None: a model of text alone.
        dtype: dtype of activations and of the weights as they are multiplied; the parameters
            themselves are float32.
        scan_layers: scan over the local/global pattern instead of unrolling the layers: compiles
            faster, same function.
        remat: what the backward pass recomputes of a layer: all but products with weights and
            attention ("dots"), all but attention ("attention"), all ("full"), or nothing ("none"),
            which takes more memory and is no faster where memory is slow.
        attention: what training and evaluation attend with; auto: what suits the devices (see
            `kernels.attention.choose_backend`).
    """

    vocab_size: int
    hidden_size: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int
    global_every: int = 6
    rope_theta_local: float = 10_000.0
    rope_theta_global: float = 1_000_000.0
    rope_factor_global: float = 8.0
    rms_norm_eps: float = 1e-6
    query_pre_attn_scalar: float = 256.0
    final_logit_softcap: float | None = None
    max_position_embeddings: int = 32_768
    initializer_range: float = 0.02
    pad_id: int = 0
    eos_id: int = 1
    bos_id: int = 2
    eoi_id: int = 256_000
    vision: VisionConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = True
    remat: RematPolicy = "dots"
    attention: AttentionBackend = "auto"

    def __post_init__(self) -> None:
        sizes = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.default is dataclasses.MISSING
        }
        sizes["global_every"] = self.global_every
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads})"
            )
        if self.vision is not None and max(self.vision.image_id, self.vision.boi_id) >= (
            self.vocab_size
        ):
            raise ValueError(
                f"vocab_size ({self.vocab_size}) must exceed vision's image_id "
                f"({self.vision.image_id}) and boi_id ({self.vision.boi_id})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, not {self.head_dim}")

    def is_global(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) attends globally: every `global_every`-th does."""
        return (layer + 1) % self.global_every == 0


# The three released sizes and the one that a laptop trains in minutes.
T5GEMMA2_270M = ModelConfig(
    vocab_size=262_144,
    hidden_size=640,
    mlp_dim=2048,
    num_layers=18,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    sliding_window=512,
    vision=VisionConfig(),
    dtype="bfloat16",
)
T5GEMMA2_1B = dataclasses.replace(T5GEMMA2_270M, hidden_size=1152, mlp_dim=6912, num_layers=26)
T5GEMMA2_4B = dataclasses.replace(
    T5GEMMA2_270M,
    hidden_size=2560,
    mlp_dim=10_240,
    num_layers=34,
    num_heads=8,
    num_kv_heads=4,
    sliding_window=1024,
    max_position_embeddings=131_072,
)
TINY = ModelConfig(
    vocab_size=4096,
    hidden_size=64,
    mlp_dim=256,
    num_layers=6,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    sliding_window=64,
    query_pre_attn_scalar=32.0,
    rope_factor_global=1.0,
    max_position_embeddings=2048,
    initializer_range=0.125,
)
