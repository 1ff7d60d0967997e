"""Arrays that a compiled step should never hold, found in XLA's text of it."""

import math
import re

from t5g2.kernels.vocabulary_loss import TILE
from t5g2.models.config import ModelConfig
from t5g2.planning.hlo import computations

_RESULT = re.compile(r"^\s*(?:ROOT )?%\S+ = (.*?) [a-z][\w-]*\(")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+\d+(?:[a-z]\w*)?)\[([\d,]+)\]")
_FUSED = re.compile(r" fusion\(.*\bcalls=%([^\s,]+)")


def score_matrices(text: str, config: ModelConfig, lengths: tuple[int, int]) -> list[str]:
    """Arrays of all queries by all keys: attention that costs memory in the square of the length.

    Args:
        text: of the compiled module.
        config: its model.
        lengths: encoder and decoder tokens of a row (S, T).

    Returns:
        Their shapes, each once.

    Raises:
        ValueError: a length is also a size of the model, so that nothing can be told from shapes.
    """
    tokens = {*lengths, sum(lengths)}
    sizes = {config.hidden_size, config.mlp_dim, config.vocab_size, config.head_dim}
    if shared := tokens & sizes:
        raise ValueError(f"{min(shared)} is a length of rows and a size of the model")
    return [
        shape for shape, sizes in _held(text).items() if sum(size in tokens for size in sizes) > 1
    ]


def whole_logits(text: str, config: ModelConfig, mesh: dict[str, int]) -> list[str]:
    """Arrays of the vocabulary by more tokens than the loss takes at a time; shapes, each once.

    Args:
        text: of the compiled module.
        config: its model.
        mesh: sizes of the mesh axes, by name.
    """
    vocabulary = {config.vocab_size, config.vocab_size // mesh["tensor"]}
    table = {config.hidden_size, config.hidden_size // mesh["fsdp"]}
    found = []
    for shape, sizes in _held(text).items():
        others = [size for size in sizes if size not in vocabulary]
        rows = math.prod(others)
        if len(others) == len(sizes) - 1 and rows > TILE and rows not in table:
            found.append(shape)
    return found


def _held(text: str) -> dict[str, list[int]]:
    """Shapes of all results outside of fusions, whose inner ones are never in memory."""
    parts = computations(text)
    fused = {match[1] for part in parts for line in part.lines if (match := _FUSED.search(line))}
    shapes = {}
    for part in parts:
        if part.name not in fused:
            for line in part.lines:
                if match := _RESULT.match(line):
                    for array in _ARRAY.finditer(match[1]):
                        shapes[array[0]] = [int(size) for size in array[1].split(",")]
    return shapes
