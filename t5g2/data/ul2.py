"""UL2 denoisers (arXiv:2205.05131, section 3.1) in plain numpy: tokens in, examples out."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Int, UInt64

from t5g2.errors import UserError

Tokens = Int[np.ndarray, " n"]
# Draws that many random 64-bit integers.
Bits = Callable[[int], UInt64[np.ndarray, " n"]]


class SpecialTokens(NamedTuple):
    """Ids that are no text.

    Attributes:
        bos_id: what decoder inputs start with, and encoder inputs unless `bos_on_inputs` is False.
        eos_id: ends the targets.
        sentinel_ids: stand for the hidden spans, in this order.
        bos_on_inputs: whether encoder inputs start with bos.
    """

    bos_id: int
    eos_id: int
    sentinel_ids: range
    bos_on_inputs: bool = True


class Example(NamedTuple):
    """A denoised piece of a document: int32 encoder inputs and decoder targets."""

    inputs: Tokens
    targets: Tokens


def philox(seed: int, *counter: int) -> Bits:
    """Random bits that are a pure function of a seed and up to three counters.

    Raw Philox output is stable over numpy versions, which the methods of `Generator` are not.
    """
    generator = np.random.Philox(key=seed, counter=[0, *counter, *[0] * (3 - len(counter))])
    return cast(Bits, generator.random_raw)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
    """One denoising task: which share of a piece is hidden, in spans of which length.

    Attributes:
        name: what it is called in metrics.
        corruption_rate: share of tokens that are hidden (r).
        mean_span: average length of a hidden span in tokens (μ); None hides one span that ends the
            piece: prefix language modelling.
        weight: its rate in the mixture, relative to the others'.
    """

    name: str
    corruption_rate: float
    mean_span: float | None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.corruption_rate < 1:
            raise UserError(
                f"denoiser {self.name}: corruption_rate must lie between 0 and 1, "
                f"not {self.corruption_rate}"
            )
        if self.mean_span is not None and self.mean_span < 1:
            raise UserError(
                f"denoiser {self.name}: mean_span must be at least 1 token, not {self.mean_span}"
            )
        if self.weight < 0:
            raise UserError(f"denoiser {self.name}: weight must not be negative")

    def counts(self, length: int) -> tuple[int, int]:
        """How many tokens of a piece of `length` are hidden, and in how many spans.

        Both never fall as the length grows, nor does the number of tokens left.
        """
        hidden = int(length * self.corruption_rate + 0.5)
        hidden = min(max(hidden, 1), max(length - 1, 1))
        if self.mean_span is None:
            return hidden, 1
        spans = max(int(hidden / self.mean_span + 0.5), 1)
        # Spans are kept apart by at least one token.
        return hidden, min(spans, hidden, length - hidden + 1)

    def lengths(self, length: int, special: SpecialTokens) -> tuple[int, int]:
        """Lengths of inputs and targets that a piece of `length` >= 1 tokens becomes."""
        hidden, spans = self.counts(length)
        return special.bos_on_inputs + length - hidden + spans, hidden + spans + 1

    def longest(self, inputs: int, targets: int, special: SpecialTokens) -> int:
        """Longest piece that fits in so much room on both sides; 0 if not even one token fits."""
        low, high = 0, inputs + targets  # every token of a piece stands on one of the sides
        while low < high:
            middle = (low + high + 1) // 2
            needs = self.lengths(middle, special)
            if needs[0] <= inputs and needs[1] <= targets:
                low = middle
            else:
                high = middle - 1
        return low

    def __call__(self, tokens: Tokens, bits: Bits, special: SpecialTokens) -> Example:
        """Hides random spans of a piece of a document.

        Inputs: (bos,) the piece with each hidden span replaced by the next sentinel. Targets: for
        each span its sentinel and its tokens; then eos.

        Args:
            tokens: the piece, at least one token.
            bits: random bits of this example.
            special: ids to add.

        Raises:
            UserError: the piece needs more sentinels than there are.
        """
        length = len(tokens)
        hidden, spans = self.counts(length)
        if spans > len(special.sentinel_ids):
            raise UserError(
                f"denoiser {self.name} needs {spans} sentinels for a piece of {length} tokens but "
                f"the vocabulary has {len(special.sentinel_ids)}: shorten feature_lengths or use a "
                "tokenizer with more sentinels"
            )
        if self.mean_span is None:
            runs = np.array([length - hidden, hidden, 0])
        else:
            runs = np.empty(2 * spans + 1, np.int64)
            runs[1::2] = _composition(hidden, spans, bits)
            # The outer gaps may be empty, so that either end of a piece may be hidden.
            runs[0::2] = _composition(length - hidden + 2, spans + 1, bits)
            runs[[0, -1]] -= 1
        ends = np.cumsum(runs)
        starts = ends[0::2][:spans]  # where each hidden span begins
        is_hidden = np.repeat(np.arange(2 * spans + 1) % 2 == 1, runs)
        sentinels = np.arange(spans, dtype=np.int32) + special.sentinel_ids.start
        kept = ~is_hidden
        kept[starts] = True
        corrupted = tokens.copy()
        corrupted[starts] = sentinels
        head = [special.bos_id] if special.bos_on_inputs else []
        inputs = np.concatenate([np.array(head, np.int32), corrupted[kept]])
        targets = np.empty(hidden + spans + 1, np.int32)
        targets[-1] = special.eos_id
        at = np.cumsum(runs[1::2]) - runs[1::2] + np.arange(spans)
        is_token = np.ones(hidden + spans, bool)
        is_token[at] = False
        targets[:-1][is_token] = tokens[is_hidden]
        targets[at] = sentinels
        return Example(inputs, targets)


def _composition(total: int, parts: int, bits: Bits) -> Int[np.ndarray, " parts"]:
    """A uniformly random way to write `total` as an ordered sum of `parts` positive integers."""
    if parts == 1:
        return np.array([total])
    # The smallest of as many random keys as there are places to cut: a uniform subset.
    cuts = np.argpartition(bits(total - 1), parts - 2)[: parts - 1] + 1
    return np.diff(np.sort(cuts), prepend=0, append=total)


# T5Gemma 2 (arXiv:2512.14856, section 3): (μ, r) and the rates 1:1:1:1:4. Its fifth, (3/4 L, .75)
# with one span, is prefix language modelling.
T5GEMMA2_UL2 = (
    Denoiser(name="span3_15", mean_span=3.0, corruption_rate=0.15),
    Denoiser(name="span12_50", mean_span=12.0, corruption_rate=0.5),
    Denoiser(name="span32_15", mean_span=32.0, corruption_rate=0.15),
    Denoiser(name="span32_50", mean_span=32.0, corruption_rate=0.5),
    Denoiser(name="prefix_75", mean_span=None, corruption_rate=0.75, weight=4.0),
)


def denoisers_from(specs: Sequence[Mapping[str, Any]]) -> tuple[Denoiser, ...]:
    """Denoisers from the dictionaries that a gin file lists.

    Raises:
        UserError: a key that is no field of `Denoiser`, a missing one, or two of one name.
    """
    fields = {field.name for field in dataclasses.fields(Denoiser)}
    made = []
    for spec in specs:
        unknown = sorted(set(spec) - fields)
        missing = sorted({"name", "corruption_rate", "mean_span"} - set(spec))
        if unknown or missing:
            problem = f"has no setting {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
            raise UserError(f"denoiser {dict(spec)} {problem}; settings are {sorted(fields)}")
        made.append(Denoiser(**spec))
    names = [denoiser.name for denoiser in made]
    if len(set(names)) < len(names) or not any(denoiser.weight > 0 for denoiser in made):
        raise UserError(f"denoisers need names of their own and a weight above 0; got {names}")
    return tuple(made)
