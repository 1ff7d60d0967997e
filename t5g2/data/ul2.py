"""UL2 denoisers (arXiv:2205.05131, section 3.1) in plain numpy: tokens in, examples out."""

import dataclasses
import functools
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Int, Shaped, UInt32, UInt64

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
        with self._lock:
            # Setting the state costs a fifth of making a generator.
            words = self._state["state"]["counter"]
            words[:] = 0
            for place, number in enumerate(counter, start=1):
                words[place] = number
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
        lengths = self.lengths(len(tokens), special)
        example = Example(*(np.empty(length, np.int32) for length in lengths))
        denoise([Job(self, tokens, bits, lengths)], np.zeros((1, 2), np.int64), special, *example)
        return example


class Job(NamedTuple):
    """A piece of a document that is to be denoised.

    Attributes:
        denoiser: what to do.
        tokens: the piece, at least one token.
        bits: random bits of this example.
        lengths: of its inputs and targets, as the denoiser announces them.
    """

    denoiser: Denoiser
    tokens: Tokens
    bits: Bits
    lengths: tuple[int, int]


def denoise(
    jobs: Sequence[Job],
    begins: Int[np.ndarray, "jobs 2"],
    special: SpecialTokens,
    inputs: Int[np.ndarray, " inputs"],
    targets: Int[np.ndarray, " targets"],
) -> None:
    """Hides random spans of many pieces, as `Denoiser` says of one, with few calls of numpy.

    Args:
        jobs: in the order of the places that their examples go to.
        begins: where the inputs and the targets of each begin.
        special: ids to add.
        inputs: int32 memory that examples are written to; what lies between them stays as it is.
        targets: the same of the other side.

    Raises:
        UserError: a piece needs more sentinels than there are.
    """
    if not jobs:
        return
    numbers = [
        (len(tokens), *lengths, len(denoiser.mode_ids), denoiser.mean_span is None)
        for denoiser, tokens, _, lengths in jobs
    ]
    length, inputs_length, targets_length, modes, is_prefix = np.array(numbers).T
    inputs_at, targets_at = begins.T
    head = modes + special.bos_on_inputs
    # Both sides together hold the piece, eos, what inputs start with, and every sentinel twice.
    spans = (inputs_length + targets_length - length - head - 1) // 2
    hidden = targets_length - spans - 1
    _check_sentinels(jobs, spans, special)

    # Of each span, all pieces' in a line: its piece, its number in it, and how many tokens are kept
    # and how many are hidden before it.
    owner = np.repeat(np.arange(len(jobs)), spans)
    number = _counts(spans)
    kept, before = (length - hidden)[owner], np.zeros(len(owner), np.int64)
    cut = (is_prefix == 0).nonzero()[0]
    if len(cut):
        # The hidden tokens are cut between two of them. Spans go into different gaps of the kept
        # ones, outer gaps among them, so that either end of a piece may be hidden.
        ways = np.stack([hidden - 1, length - hidden + 1], 1)[cut].reshape(-1)
        wanted = np.stack([spans - 1, spans], 1)[cut].reshape(-1)
        keys = np.concatenate([_keys(jobs[i]) for i in cut.tolist()])
        chosen = _subsets(keys, ways, wanted)
        is_gap = np.repeat(np.arange(len(wanted)) % 2 == 1, wanted)
        before[number > 0] = chosen[~is_gap] + 1
        kept[is_prefix[owner] == 0] = chosen[is_gap]
    sizes = np.append(before[1:], 0) - before
    last = np.cumsum(spans) - 1
    sizes[last] = hidden - before[last]

    tokens = np.concatenate([job.tokens for job in jobs])
    starts = (np.cumsum(length) - length)[owner] + kept + before
    is_hidden = spread(np.ones(len(owner), bool), starts, sizes, len(tokens))
    sentinels = special.sentinel_ids.start + number
    for out, at, size, places, own in (
        (inputs, inputs_at + head, inputs_length - head, kept + number, ~is_hidden),
        (targets, targets_at, targets_length - 1, before + number, is_hidden),
    ):
        places = places + at[owner]
        is_token = spread(np.ones(len(at), bool), at, size, len(out))
        is_token[places] = False
        out[is_token] = tokens[own]
        out[places] = sentinels
    targets[targets_at + targets_length - 1] = special.eos_id
    if special.bos_on_inputs:
        inputs[inputs_at] = special.bos_id
    for i in modes.nonzero()[0].tolist():
        text = inputs_at[i] + head[i]
        inputs[text - modes[i] : text] = jobs[i].denoiser.mode_ids


def spread(
    values: Shaped[np.ndarray, " n"],
    starts: Int[np.ndarray, " n"],
    sizes: Int[np.ndarray, " n"],
    length: int,
) -> Shaped[np.ndarray, " length"]:
    """An array of `length` that holds each value from its start on, `sizes` times; else zeros.

    The stretches stand in order and do not overlap.
    """
    bounds = np.empty(2 * len(values) + 2, np.int64)
    bounds[0], bounds[-1] = 0, length
    bounds[1:-1:2], bounds[2:-1:2] = starts, starts + sizes
    filled = np.zeros(2 * len(values) + 1, values.dtype)
    filled[1::2] = values
    return np.repeat(filled, bounds[1:] - bounds[:-1])


def _counts(sizes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " total"]:
    """0, 1, ... of each size, one after the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)


def _keys(job: Job) -> UInt32[np.ndarray, " length"]:
    """A random key for each token of a piece."""
    length = len(job.tokens)
    return job.bits((length + 1) // 2).view(np.uint32)[:length]


def _subsets(
    keys: UInt32[np.ndarray, " total"], sizes: Int[np.ndarray, " n"], counts: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " chosen"]:
    """Uniformly random subsets of range(sizes[i]), of counts[i] elements each, ascending.

    Args:
        keys: a random one for each element of each range.
        sizes: of the ranges; their sum is the number of keys.
        counts: of the subsets.
    """
    starts = np.cumsum(sizes) - sizes
    ranked = keys.copy()
    for start, size, count in zip(starts.tolist(), sizes.tolist(), counts.tolist(), strict=True):
        if count:
            ranked[start : start + size].partition(count - 1)
    # The elements of the smallest keys are a uniform subset; of equal keys the first count.
    limits = ranked[np.maximum(starts + counts - 1, 0)]
    small = (keys <= np.repeat(limits, sizes)).nonzero()[0]
    first = np.searchsorted(small, starts)
    return small[np.repeat(first, counts) + _counts(counts)] - np.repeat(starts, counts)


def _check_sentinels(
    jobs: Sequence[Job], spans: Int[np.ndarray, " pieces"], special: SpecialTokens
) -> None:
    worst = int(np.argmax(spans))
    if spans[worst] > len(special.sentinel_ids):
        denoiser, tokens, *_ = jobs[worst]
        raise UserError(
            f"denoiser {denoiser.name} needs {spans[worst]} sentinels for a piece of "
            f"{len(tokens)} tokens but the vocabulary has {len(special.sentinel_ids)}: shorten "
            "feature_lengths or use a tokenizer with more sentinels"
        )


class Sizes:
    """What pieces of a denoiser need in rows of one size, looked up instead of computed."""

    def __init__(self, denoiser: Denoiser, room: tuple[int, int], special: SpecialTokens) -> None:
        longest = denoiser.longest(*room, special)
        needs = np.array([(0, 0), *(denoiser.lengths(n, special) for n in range(1, longest + 1))])
        # Plain arrays: numpy's take four times as long to look one number up.
        self._inputs, self._targets = (array("l", side) for side in needs.T.tolist())
        # Of each side alone: the longest piece that fits in the room that is left.
        self._by_inputs, self._by_targets = (
            array("l", (np.searchsorted(side, np.arange(most + 1), "right") - 1).tolist())
            for side, most in zip(needs.T, room, strict=True)
        )

    def lengths(self, length: int) -> tuple[int, int]:
        """As `Denoiser.lengths`."""
        return self._inputs[length], self._targets[length]

    def longest(self, inputs: int, targets: int) -> int:
        """As `Denoiser.longest`."""
        return min(self._by_inputs[inputs], self._by_targets[targets])


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
