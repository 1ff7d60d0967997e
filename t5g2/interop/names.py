"""What T5Gemma 2's tensors are called, and how they lie, in t5g2 and on a Hugging Face disk.

t5g2 stacks the layers of a stack on a leading axis and keeps heads on an axis of their own, inputs
before outputs; on disk every layer has its own tensors, a projection is `[outputs, inputs]` and
heads are merged with their width. `TEXT_NAMES` and `VISION_NAMES` are the only place that knows
both.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Shaped

from t5g2.models.config import ModelConfig

_TILE = 128  # rows and columns transposed at a time


@dataclasses.dataclass(frozen=True)
class Name:
    """One parameter of t5g2 and its tensor, or tensors, on disk.

    Attributes:
        path: where it is in `parameter_tree(model)`, separated by slashes.
        key: its name on disk; `{layer}` stands for the layer, where layers are stacked.
        inputs: how many leading axes (without the layers') are the inputs of a projection, which
            come last on disk; None: stored as it is.
        merged: whether, on disk, inputs are one axis and outputs another; a convolution's are not.
    """

    path: str
    key: str
    inputs: int | None = None
    merged: bool = True

    def keys(self, config: ModelConfig) -> Iterator[tuple[int | None, str]]:
        """(layer, name on disk) of each of its tensors; layer is None where there is one tensor."""
        if "{layer}" not in self.key:
            yield None, self.key
            return
        stack = config.vision if self.path.startswith("vision/") else config
        for layer in range(0 if stack is None else stack.num_layers):
            yield layer, self.key.format(layer=layer)

    def disk_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape on disk of a tensor that has `shape` (of one layer) in t5g2."""
        if self.inputs is None:
            return shape
        inputs, outputs = shape[: self.inputs], shape[self.inputs :]
        return (math.prod(outputs), math.prod(inputs)) if self.merged else outputs + inputs

    def to_disk(self, array: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """The tensor (of one layer) as it lies on disk."""
        if self.inputs is None:
            return array
        stored = np.empty(self.disk_shape(array.shape), array.dtype)
        matrix = array.reshape(math.prod(array.shape[: self.inputs]), -1)
        _transpose(matrix, stored.reshape(matrix.shape[::-1]))
        return stored

    def from_disk(self, tensor: Float[np.ndarray, "..."], out: Float[np.ndarray, "..."]) -> None:
        """The inverse of `to_disk`: fills `out`, in one piece, with the tensor (of one layer)."""
        if self.inputs is None:
            out[...] = tensor
            return
        matrix = out.reshape(math.prod(out.shape[: self.inputs]), -1, copy=False)
        _transpose(tensor.reshape(matrix.shape[::-1]), matrix)


def _transpose(matrix: Shaped[np.ndarray, "M N"], out: Shaped[np.ndarray, "N M"]) -> None:
    """Fills `out` by tiles that the processor's cache holds: else every element is a line of it."""
    if matrix.dtype == out.dtype and matrix.dtype.itemsize == 2:
        # numpy copies numbers that are not its own, as bfloat16, one call each.
        matrix, out = matrix.view(np.uint16), out.view(np.uint16)
    rows, columns = matrix.shape
    for row in range(0, rows, _TILE):
        for column in range(0, columns, _TILE):
            tile = matrix[row : row + _TILE, column : column + _TILE]
            out[column : column + _TILE, row : row + _TILE] = tile.T


# Of one layer: t5g2, disk, input axes. Encoder and decoder layers have the same ones.
_LAYER: tuple[tuple[str, str, int | None], ...] = (
    ("pre_attention_norm/scale", "pre_self_attn_layernorm.weight", None),
    ("attention/q", "self_attn.q_proj.weight", 1),  # [D, H, N] | [H·N, D]
    ("attention/k", "self_attn.k_proj.weight", 1),  # [D, K, N] | [K·N, D]
    ("attention/v", "self_attn.v_proj.weight", 1),  # [D, K, N] | [K·N, D]
    ("attention/o", "self_attn.o_proj.weight", 2),  # [H, N, D] | [D, H·N]
    ("attention/q_norm/scale", "self_attn.q_norm.weight", None),
    ("attention/k_norm/scale", "self_attn.k_norm.weight", None),
    ("post_attention_norm/scale", "post_self_attn_layernorm.weight", None),
    ("pre_mlp_norm/scale", "pre_feedforward_layernorm.weight", None),
    ("mlp/gate", "mlp.gate_proj.weight", 1),  # [D, F] | [F, D]
    ("mlp/up", "mlp.up_proj.weight", 1),  # [D, F] | [F, D]
    ("mlp/down", "mlp.down_proj.weight", 1),  # [F, D] | [D, F]
    ("post_mlp_norm/scale", "post_feedforward_layernorm.weight", None),
)

TEXT_NAMES: tuple[Name, ...] = (
    Name("embedder/table", "model.encoder.embed_tokens.weight"),
    Name("embedder/eoi_embedding", "model.encoder.embed_tokens.eoi_embedding"),
    *(
        Name(f"{stack}/layers/{path}", f"model.{stack}.layers.{{layer}}.{key}", inputs)
        for stack in ("encoder", "decoder")
        for path, key, inputs in _LAYER
    ),
    Name("encoder/final_norm/scale", "model.encoder.norm.weight"),
    Name("decoder/final_norm/scale", "model.decoder.norm.weight"),
)

_TOWER, _PROJECTOR = "model.encoder.vision_tower.", "model.encoder.multi_modal_projector."

# Of one layer of the tower: t5g2, disk, input axes of the weight (None: a norm).
_TOWER_LAYER: tuple[tuple[str, str, int | None], ...] = (
    ("norm1", "layer_norm1", None),
    ("norm2", "layer_norm2", None),
    ("q", "self_attn.q_proj", 1),
    ("k", "self_attn.k_proj", 1),
    ("v", "self_attn.v_proj", 1),
    ("o", "self_attn.out_proj", 1),
    ("up", "mlp.fc1", 1),
    ("down", "mlp.fc2", 1),
)

VISION_NAMES: tuple[Name, ...] = (
    # [3, P, P, D] | [D, 3, P, P]
    Name("vision/patch", f"{_TOWER}embeddings.patch_embedding.weight", 3, merged=False),
    Name("vision/patch_bias", f"{_TOWER}embeddings.patch_embedding.bias"),
    Name("vision/positions", f"{_TOWER}embeddings.position_embedding.weight"),
    *(
        Name(f"vision/layers/{path}/{ours}", f"{_TOWER}encoder.layers.{{layer}}.{key}.{theirs}", n)
        for path, key, inputs in _TOWER_LAYER
        for ours, theirs, n in (
            ("scale" if inputs is None else "weight", "weight", inputs),
            ("bias", "bias", None),
        )
    ),
    Name("vision/final_norm/scale", f"{_TOWER}post_layernorm.weight"),
    Name("vision/final_norm/bias", f"{_TOWER}post_layernorm.bias"),
    Name("projector/norm/scale", f"{_PROJECTOR}mm_soft_emb_norm.weight"),
    # [W, D] on both sides: torch, too, multiplies by it from the right.
    Name("projector/weight", f"{_PROJECTOR}mm_input_projection_weight"),
)

# Tied to the tensor on the right; normally left out on disk.
TIED = {
    "lm_head.out_proj.weight": "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight": "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.eoi_embedding": "model.encoder.embed_tokens.eoi_embedding",
}

# Tensors that start so are the image side.
VISION_PREFIXES = (_TOWER, _PROJECTOR)


def names_of(config: ModelConfig) -> tuple[Name, ...]:
    """The names of all parameters of a model."""
    return TEXT_NAMES if config.vision is None else TEXT_NAMES + VISION_NAMES


def canonical(key: str) -> str:
    """The name on disk as `save_pretrained` writes it, given that or the name in torch's memory."""
    key = key.replace("model.encoder.text_model.", "model.encoder.", 1)
    return key.replace(f"{_TOWER}vision_model.", _TOWER, 1)
