"""FLOPs that a train step needs, whatever computes it: the numerator of MFU.

A product [m, k] x [k, n] is 2 m k n FLOPs. Counted are the products of tokens with weights and of
queries with the keys they see, of rows that are full and hold one example each; norms, softmax,
embedding look-ups and the optimizer are left out, as they are in the field. Training a part takes
three times its forward pass: the gradients of both factors take as much each.
"""

import dataclasses

from t5g2.kernels.attention import Window
from t5g2.models.attention import decoder_window, encoder_window
from t5g2.models.config import ModelConfig, VisionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What a step works on.

    Attributes:
        rows: of the global batch (B).
        inputs: encoder tokens of a row (S).
        targets: decoder tokens of a row (T).
        images: places for images in a row (I).
        image_features: whether the tower has read the images already.
    """

    rows: int
    inputs: int
    targets: int
    images: int = 0
    image_features: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a batch, of both sides."""
        return self.rows * (self.inputs + self.targets)


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one step on the whole batch.

    Attributes:
        trained: forward FLOPs of each part that has a gradient.
        frozen: forward FLOPs of each part without.
    """

    trained: dict[str, int]
    frozen: dict[str, int]

    @property
    def forward(self) -> int:
        """Of the forward pass."""
        return sum(self.trained.values()) + sum(self.frozen.values())

    @property
    def total(self) -> int:
        """Of forward and backward pass."""
        return 3 * sum(self.trained.values()) + sum(self.frozen.values())


def model_flops(config: ModelConfig, load: Load) -> ModelFlops:
    """Model FLOPs of a train step, by part."""
    trained = {
        f"{side} {part}": load.rows * flops
        for side, parts in (
            ("encoder", _encoder(config, load)),
            ("decoder", _decoder(config, load)),
        )
        for part, flops in parts.items()
    }
    frozen = {}
    trained["vocabulary head"] = load.rows * load.targets * head_flops(config)
    if load.images:
        assert config.vision is not None
        vision, images = config.vision, load.rows * load.images
        # The norm before the projection trains, so its gradient passes through the projection.
        trained["vision projector"] = (
            images * 2 * vision.tokens_per_image * vision.hidden_size * config.hidden_size
        )
        if not load.image_features:
            frozen["vision tower"] = images * tower_flops(vision)
    return ModelFlops(trained, frozen)


def teacher_flops(config: ModelConfig, load: Load) -> int:
    """FLOPs of a teacher's forward pass on the batch."""
    return model_flops(config, load).forward


def head_flops(config: ModelConfig) -> int:
    """Logits of one token: 2 D V."""
    return 2 * config.hidden_size * config.vocab_size


def tower_flops(vision: VisionConfig) -> int:
    """The tower on one image of P patches: P (2 * 3 p^2 D + L (8 D^2 + 4 D F + 4 D P))."""
    width, patches = vision.hidden_size, vision.patches
    layer = 8 * width**2 + 4 * width * vision.mlp_dim + 4 * width * patches
    return patches * (6 * vision.patch_size**2 * width + vision.num_layers * layer)


def visible_keys(length: int, window: Window) -> int:
    """Pairs of a query and a key that it sees, in one example of `length` tokens.

    Query q sees keys max(0, q - left) to min(length - 1, q + right); summed over q.
    """

    def side(reach: int | None) -> int:
        reach = length - 1 if reach is None else min(reach, length - 1)
        # q = 0, 1, ... have 0, 1, ... tokens on one side of them, but no more than `reach`.
        return reach * (reach + 1) // 2 + (length - 1 - reach) * reach

    return length + side(window.left) + side(window.right)


def _layer(config: ModelConfig) -> dict[str, int]:
    """A layer's products with weights, for one token: 2 D (2 H + 2 K) N and 6 D F."""
    width = config.hidden_size
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return {"projections": 2 * width * heads, "feed-forward": 6 * width * config.mlp_dim}


def _pairs(config: ModelConfig) -> int:
    """A query with a key and its value, in all heads: 4 H N."""
    return 4 * config.num_heads * config.head_dim


def _windows(config: ModelConfig) -> dict[str, int]:
    local = sum(not config.is_global(layer) for layer in range(config.num_layers))
    return {"local attention": local, "global attention": config.num_layers - local}


def _encoder(config: ModelConfig, load: Load) -> dict[str, int]:
    """The encoder on one row."""
    parts = {
        part: config.num_layers * load.inputs * flops for part, flops in _layer(config).items()
    }
    for part, layers in _windows(config).items():
        window = encoder_window(config, part == "global attention")
        parts[part] = layers * visible_keys(load.inputs, window) * _pairs(config)
    return parts


def _decoder(config: ModelConfig, load: Load) -> dict[str, int]:
    """The decoder on one row; every layer projects the encoder's states anew: 4 D K N a token."""
    parts = {
        part: config.num_layers * load.targets * flops for part, flops in _layer(config).items()
    }
    memory = 4 * config.hidden_size * config.num_kv_heads * config.head_dim
    parts["projections of the encoder's states"] = config.num_layers * load.inputs * memory
    for part, layers in _windows(config).items():
        window = decoder_window(config, part == "global attention")
        parts[part] = layers * visible_keys(load.targets, window) * _pairs(config)
    crossed = load.targets * load.inputs * _pairs(config)
    parts["attention to the encoder"] = config.num_layers * crossed
    return parts
