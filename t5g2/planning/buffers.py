"""What a compiled step should have and never hold or send, found in XLA's text of it."""

import collections
import math
import re
from typing import NamedTuple

from t5g2.kernels.attention import SCOPE
from t5g2.kernels.splash import filled_length
from t5g2.kernels.vocabulary_loss import TILE
from t5g2.models.config import ModelConfig
from t5g2.planning.collectives import Exchange, exchanges
from t5g2.planning.hlo import arrays, computations, inner, instructions

# Of TPU's kernels and of GPU's, whose call depends on jax's version.
_KERNEL = re.compile(
    r'%splash_mha_([a-z]+)\S* = .*custom_call_target="tpu_custom_call"'
    r'|custom_call_target="(?:__gpu\$xla\.gpu\.triton|triton_kernel_call_ffi)"'
    r'.*\bname = "attention_([a-z]+)"'
)
_ATTENDS = re.compile(rf'op_name="[^"]*\b{SCOPE}\b')


def score_matrices(text: str, config: ModelConfig, lengths: tuple[int, int]) -> list[str]:
    """Arrays of all queries by all keys: attention that costs memory in the square of the length.

    Queries and keys are those of either side or of both, filled up to whole blocks or not. A length
    that is a size of the model besides counts in attention alone.

    Args:
        text: of the compiled module.
        config: its model.
        lengths: encoder and decoder tokens of a row (S, T).

    Returns:
        Their shapes, each once.
    """
    inputs, targets = lengths
    filled = filled_length(targets)
    tokens = {inputs, targets, inputs + targets, filled_length(inputs), filled}
    tokens.add(filled_length(filled + inputs))
    model = {config.hidden_size, config.mlp_dim, config.vocab_size, config.head_dim}
    return [
        shape
        for shape, (sizes, attends) in _held(text).items()
        if sum(size in tokens and (attends or size not in model) for size in sizes) > 1
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
    for shape, (sizes, _) in _held(text).items():
        others = [size for size in sizes if size not in vocabulary]
        rows = math.prod(others)
        if len(others) == len(sizes) - 1 and rows > TILE and rows not in table:
            found.append(shape)
    return found


def attention_kernels(text: str) -> dict[str, int]:
    """How many calls of the fused attention kernels a module has: "fwd", "dq" and "dkv"."""
    return dict(collections.Counter(tpu or gpu for tpu, gpu in _KERNEL.findall(text)))


def table_exchanges(text: str, config: ModelConfig, mesh: dict[str, int]) -> list[Exchange]:
    """Collectives that make whole columns of the vocabulary's table, or of its gradient.

    Args:
        text: of the compiled module.
        config: its model.
        mesh: sizes of the mesh axes, by name, in order.
    """
    vocabulary = {config.vocab_size, config.vocab_size // mesh["tensor"]}
    return [
        exchange
        for exchange in exchanges(text, mesh)
        if any(vocabulary & set(shape) and len(shape) > 1 for shape in exchange.shapes)
    ]


class Check(NamedTuple):
    """Something that a compiled step must be.

    Attributes:
        what: in words.
        holds: whether it is.
        found: what was found.
    """

    what: str
    holds: bool
    found: str


def checks(
    text: str, config: ModelConfig, room: tuple[int, int], mesh: dict[str, int], microbatches: int
) -> list[Check]:
    """What every compiled step with a fused attention must be.

    Args:
        text: of the compiled module.
        config: its model.
        room: encoder and decoder tokens of a row (S, T).
        mesh: sizes of the mesh axes, by name, in order.
        microbatches: of a step.
    """
    kernels = attention_kernels(text)
    scores, logits = score_matrices(text, config, room), whole_logits(text, config, mesh)
    moved = table_exchanges(text, config, mesh)
    gathers = sum(e.times for e in moved if e.kind == "all-gather")
    # Copies of the model sum their parts of the gradient besides: a part is no table.
    whole = config.vocab_size // mesh["tensor"] * config.hidden_size
    sums = sum(
        e.times
        for e in moved
        if e.kind == "reduce-scatter"
        or (e.kind == "all-reduce" and max(map(math.prod, e.shapes)) >= whole)
    )
    others = sorted({e.kind for e in moved} - {"all-gather", "all-reduce", "reduce-scatter"})
    found = f"{gathers} gathers and {sums} sums in {microbatches} microbatches"
    return [
        Check(
            "attention is fused kernels, forward and backward",
            {"fwd", "dq", "dkv"} <= set(kernels),
            ", ".join(f"{count} x {name}" for name, count in sorted(kernels.items())) or "none",
        ),
        Check(
            "the backward pass attends anew under remat 'full' alone",
            config.remat == "full" or kernels.get("fwd") == kernels.get("dq"),
            f"remat '{config.remat}'",
        ),
        Check("no array of queries by keys", not scores, ", ".join(scores) or "none"),
        Check("no array of all logits", not logits, ", ".join(logits) or "none"),
        Check(
            "the vocabulary's table is gathered at most twice a microbatch, its gradient summed "
            "once",
            gathers <= 2 * microbatches and sums <= microbatches and not others,
            ", ".join([found, *others]),
        ),
    ]


def _held(text: str) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shapes of all results outside of fusions, whose inner ones are never in memory.

    Returns:
        Of each, as XLA prints it, its sizes, and whether attention makes such an array.
    """
    parts = computations(text)
    within = inner(parts)
    shapes: dict[str, tuple[tuple[int, ...], bool]] = {}
    for part in parts:
        if part.name not in within:
            for made in instructions(part.lines):
                attends = _ATTENDS.search(made.attributes) is not None
                for kind, sizes in arrays(made.shape):
                    name = f"{kind}[{','.join(map(str, sizes))}]"
                    shapes[name] = sizes, attends or shapes.get(name, ((), False))[1]
    return shapes
