"""UL2 denoisers (arXiv:2205.05131, section 3.1) in plain numpy: tokens in, examples out."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Int, UInt64

from t5g2.errors import UserError

Tokens = Int[np.ndarray, " n"]
# Gives the first so many of an example's random 64-bit integers.
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


class Philox:
    """Random bits that are a pure function of a seed and up to three counters.

    Raw Philox output is stable over numpy versions, which the methods of `Generator` are not.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator = np.random.Philox(key=seed)
        self._state = self._generator.state
        self._lock = threading.Lock()  # of the generator, which threads share

    def __reduce__(self) -> Any:
        return Philox, (self._seed,)

    def __call__(self, *counter: int) -> Bits:
        """The bits at `counter`."""
        return functools.partial(self._bits, counter)

    def _bits(self, counter: tuple[int, ...], count: int) -> UInt64[np.ndarray, " count"]:
        words = np.array([0, *counter, *[0] * (3 - len(counter))], np.uint64)
        with self._lock:
            # Setting the state costs a fifth of making a generator.
            self._state["state"]["counter"] = words
            self._generator.state = self._state
            return cast(Any, self._generator.random_raw(count))


def philox(seed: int, *counter: int) -> Bits:
    """Random bits as `Philox` gives them, of a generator of their own."""
    return Philox(seed)(*counter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
    """One denoising task: which share of a piece is hidden, in spans of which length.

    Attributes:
        name: what it is called in metrics.
        corruption_rate: share of tokens that are hidden (r).
        mean_span: average length of a hidden span in tokens (μ); None hides one span that ends the
            piece: prefix language modelling.
        weight: its rate in the mixture, relative to the others'.
        mode: text put in front of the encoder input (after bos) to tell the model what it is asked
            for, such as "[R]"; None: nothing.
        mode_ids: the tokens of `mode`; `with_mode_ids` fills them in.
    """

    name: str
    corruption_rate: float
    mean_span: float | None
    weight: float = 1.0
    mode: str | None = None
    mode_ids: tuple[int, ...] = ()

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
        head = special.bos_on_inputs + len(self.mode_ids)
        return head + length - hidden + spans, hidden + spans + 1

    def head(self, special: SpecialTokens) -> list[int]:
        """What inputs start with."""
        return [*([special.bos_id] if special.bos_on_inputs else []), *self.mode_ids]

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

        Inputs: (bos,) (mode,) the piece with each hidden span replaced by the next sentinel.
        Targets: for each span its sentinel and its tokens; then eos.

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
        head = self.head(special)
        inputs = np.empty(len(head) + length - hidden + spans, np.int32)
        targets = np.empty(hidden + spans + 1, np.int32)
        inputs[: len(head)] = head
        targets[-1] = special.eos_id
        left, right = inputs[len(head) :], targets[:-1]
        if self.mean_span is None:
            left[:-1], right[1:] = tokens[:-hidden], tokens[-hidden:]
            left[-1] = right[0] = special.sentinel_ids.start
            return Example(inputs, targets)
        # How many tokens are hidden, and how many kept, before each hidden span.
        keys = bits(length)
        before = np.zeros(spans, np.int64)
        before[1:] = _cuts(keys[: hidden - 1], spans)
        # The outer gaps may be empty, so that either end of a piece may be hidden.
        kept = _cuts(keys[hidden - 1 :], spans + 1) - 1
        edges = np.zeros(length + 1, np.int8)
        edges[kept + before] = 1
        edges[kept[:-1] + before[1:]] = -1  # spans never touch: no edge is two
        edges[kept[-1] + hidden] = -1
        is_hidden = np.cumsum(edges[:-1], dtype=np.int8).view(bool)
        numbers = np.arange(spans, dtype=np.int32)
        sentinels = numbers + np.int32(special.sentinel_ids.start)
        _interleave(left, tokens[~is_hidden], sentinels, kept + numbers)
        _interleave(right, tokens[is_hidden], sentinels, before + numbers)
        return Example(inputs, targets)


def _interleave(
    out: Tokens, tokens: Tokens, sentinels: Tokens, places: Int[np.ndarray, " spans"]
) -> None:
    """Fills `out` with tokens, and with sentinels at their places."""
    is_sentinel = np.zeros(len(out), bool)
    is_sentinel[places] = True
    out[~is_sentinel] = tokens
    out[places] = sentinels


def _cuts(keys: UInt64[np.ndarray, " total-1"], parts: int) -> Int[np.ndarray, " parts-1"]:
    """Where to cut a line into `parts` of at least 1: uniformly random.

    Args:
        keys: a random one for each place to cut; the line is one longer.
        parts: how many.
    """
    if parts == 1:
        return np.zeros(0, np.int64)
    # The places of the smallest keys are a uniform subset.
    largest = np.partition(keys, parts - 2)[parts - 2]
    return (keys <= largest).nonzero()[0][: parts - 1] + 1


class Sizes:
    """What pieces of a denoiser need in rows of one size, looked up instead of computed."""

    def __init__(self, denoiser: Denoiser, room: tuple[int, int], special: SpecialTokens) -> None:
        longest = denoiser.longest(*room, special)
        needs = [denoiser.lengths(n, special) for n in range(1, longest + 1)]
        self._needs = np.array([(0, 0), *needs], np.int32)
        # Of each side alone: the longest piece that fits in the room that is left.
        self._longest = [
            np.searchsorted(self._needs[:, side], np.arange(room[side] + 1), "right") - 1
            for side in (0, 1)
        ]

    def lengths(self, length: int) -> tuple[int, int]:
        """As `Denoiser.lengths`."""
        return self._needs.item(length, 0), self._needs.item(length, 1)

    def longest(self, inputs: int, targets: int) -> int:
        """As `Denoiser.longest`."""
        by_inputs, by_targets = self._longest
        return min(by_inputs.item(inputs), by_targets.item(targets))


# T5Gemma 2 (arXiv:2512.14856, section 3): (μ, r) and the rates 1:1:1:1:4. Its fifth, (3/4 L, .75)
# with one span, is prefix language modelling.
T5GEMMA2_UL2 = (
    Denoiser(name="span3_15", mean_span=3.0, corruption_rate=0.15),
    Denoiser(name="span12_50", mean_span=12.0, corruption_rate=0.5),
    Denoiser(name="span32_15", mean_span=32.0, corruption_rate=0.15),
    Denoiser(name="span32_50", mean_span=32.0, corruption_rate=0.5),
    Denoiser(name="prefix_75", mean_span=None, corruption_rate=0.75, weight=4.0),
)
# UL2 (arXiv:2205.05131, section 3.1), at equal rates: two R-denoisers, the S-denoiser, and four
# X-denoisers. The modes are the paper's.
UL2_WITH_MODES = (
    Denoiser(name="span3_15", mean_span=3.0, corruption_rate=0.15, mode="[R]"),
    Denoiser(name="span8_15", mean_span=8.0, corruption_rate=0.15, mode="[R]"),
    Denoiser(name="prefix_25", mean_span=None, corruption_rate=0.25, mode="[S]"),
    Denoiser(name="span3_50", mean_span=3.0, corruption_rate=0.5, mode="[X]"),
    Denoiser(name="span8_50", mean_span=8.0, corruption_rate=0.5, mode="[X]"),
    Denoiser(name="span64_15", mean_span=64.0, corruption_rate=0.15, mode="[X]"),
    Denoiser(name="span64_50", mean_span=64.0, corruption_rate=0.5, mode="[X]"),
)
UL2 = tuple(dataclasses.replace(denoiser, mode=None) for denoiser in UL2_WITH_MODES)

PRESETS = {"t5gemma2": T5GEMMA2_UL2, "ul2": UL2, "ul2_with_modes": UL2_WITH_MODES}


def denoisers_from(specs: str | Sequence[Mapping[str, Any]]) -> tuple[Denoiser, ...]:
    """Denoisers from a preset's name or from the dictionaries that a gin file lists.

    Raises:
        UserError: no such preset, a key that is no setting of a denoiser, a missing one, or two of
            one name.
    """
    if isinstance(specs, str):
        if specs not in PRESETS:
            raise UserError(
                f"there are no denoisers called {specs!r}; presets are {', '.join(PRESETS)}"
            )
        return PRESETS[specs]
    fields = {field.name for field in dataclasses.fields(Denoiser)} - {"mode_ids"}
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


def with_mode_ids(
    denoisers: Sequence[Denoiser], encode: Callable[[str], Tokens]
) -> tuple[Denoiser, ...]:
    """The denoisers with the tokens of their modes.

    Args:
        denoisers: some of which may have a `mode`.
        encode: a tokenizer's, without bos and eos.

    Raises:
        UserError: a mode that no token stands for.
    """
    made = []
    for denoiser in denoisers:
        ids = () if denoiser.mode is None else tuple(encode(denoiser.mode).tolist())
        if denoiser.mode is not None and not ids:
            raise UserError(f"denoiser {denoiser.name}: mode {denoiser.mode!r} is no text")
        made.append(dataclasses.replace(denoiser, mode_ids=ids))
    return tuple(made)
