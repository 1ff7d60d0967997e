"""UL2 denoisers (arXiv:2205.05131, section 3.1) in plain numpy: tokens in, examples out."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        # Plain lists: a state is set number by number, which numpy's arrays are slow at.
        self._state: Any = {
            **self._generator.state,
            "state": {"key": [seed & 0xFFFFFFFFFFFFFFFF, seed >> 64]},
            "buffer": [0] * 4,
        }
        self._lock = threading.Lock()  # of the generator, which threads share

    def __reduce__(self) -> Any:
        return Philox, (self._seed,)

    def __call__(self, *counter: int) -> Bits:
        """The bits at `counter`."""
        return lambda count: self.bits([counter], [count])[0]

    def bits(
        self, counters: Iterable[tuple[int, ...]], counts: Iterable[int]
    ) -> list[UInt64[np.ndarray, " n"]]:
        """The first so many of the bits at each of some counters."""
        found = []
        with self._lock:
            for counter, count in zip(counters, counts, strict=True):
                # Setting the state costs a fifth of making a generator.
                self._state["state"]["counter"] = [0, *counter, *[0] * (3 - len(counter))]
                self._generator.state = self._state
                found.append(cast(Any, self._generator.random_raw(count)))
        return found


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
        lengths = np.array([self.lengths(len(tokens), special)])
        example = Example(*(np.empty(length, np.int32) for length in lengths[0]))
        jobs = Jobs([self], np.zeros(1, int), [tokens], lambda _, counts: [bits(*counts)], lengths)
        denoise(jobs, np.zeros_like(lengths), special, *example)
        return example


class Jobs(NamedTuple):
    """Pieces of documents that are to be denoised.

    Attributes:
        denoisers: what may be done with them.
        denoiser: number among these of what is to be done with each.
        tokens: each piece, at least one token.
        bits: gives, of the examples of these numbers, the first so many random 64-bit integers.
        lengths: of their inputs and targets, as the denoisers announce them.
    """

    denoisers: Sequence[Denoiser]
    denoiser: Int[np.ndarray, " jobs"]
    tokens: Sequence[Tokens]
    bits: Callable[[list[int], list[int]], list[UInt64[np.ndarray, " n"]]]
    lengths: Int[np.ndarray, "jobs 2"]


def denoise(
    jobs: Jobs,
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
        inputs: int32 memory that examples are written to; what lies between them is set to 0.
        targets: the same of the other side.

    Raises:
        UserError: a piece needs more sentinels than there are.
    """
    if not len(jobs.tokens):
        inputs[:], targets[:] = 0, 0
        return
    # What inputs start with stands in front of the piece, as tokens that are never hidden.
    heads = [
        np.array([*[special.bos_id] * special.bos_on_inputs, *denoiser.mode_ids], np.int32)
        for denoiser in jobs.denoisers
    ]
    head = np.array([len(ids) for ids in heads])[jobs.denoiser]
    length = np.array([len(tokens) for tokens in jobs.tokens])
    # Both sides together hold the piece, eos, what inputs start with, and every sentinel twice.
    spans = (jobs.lengths.sum(1) - length - head - 1) // 2
    hidden = jobs.lengths[:, 1] - spans - 1
    _check_sentinels(jobs, spans, special)

    # Of each span, all pieces' in a line: its piece, its number in it, and how many tokens are kept
    # and how many are hidden before it.
    owner = np.repeat(np.arange(len(length)), spans)
    number = _counts(spans)
    kept, before = (length - hidden)[owner], np.zeros(len(owner), np.int64)
    is_cut = np.array([denoiser.mean_span is not None for denoiser in jobs.denoisers])
    is_cut = is_cut[jobs.denoiser]
    cut = is_cut.nonzero()[0]
    if len(cut):
        # The hidden tokens are cut between two of them. Spans go into different gaps of the kept
        # ones, outer gaps among them, so that either end of a piece may be hidden.
        ways = np.stack([hidden - 1, length - hidden + 1], 1)[cut].reshape(-1)
        wanted = np.stack([spans - 1, spans], 1)[cut].reshape(-1)
        sizes = length[cut]
        bits = jobs.bits(cut.tolist(), ((sizes + 1) // 2).tolist())
        keys = [  # a random one for each token
            found.view(np.uint32)[:size] for found, size in zip(bits, sizes.tolist(), strict=True)
        ]
        chosen = _subsets(np.concatenate(keys), ways, wanted)
        is_gap = np.repeat(np.arange(len(wanted)) % 2 == 1, wanted)
        before[number > 0] = chosen[~is_gap] + 1
        kept[is_cut[owner]] = chosen[is_gap]
    last = np.cumsum(spans) - 1
    sizes = np.append(before[1:], 0) - before
    sizes[last] = hidden - before[last]

    # Every side is runs of what lies side by side in `pool`: kept tokens or sentinel, in turn, a
    # last run of the piece, and padding up to the next.
    gaps = [
        _gaps(begins[:, side], jobs.lengths[:, side], len(out))
        for side, out in enumerate((inputs, targets))
    ]
    padding = np.zeros(max(gap.max() for gap in gaps), np.int32)
    sentinel_ids = np.arange(spans.max(), dtype=np.int32) + special.sentinel_ids.start
    pieces = [
        part
        for number, tokens in zip(jobs.denoiser.tolist(), jobs.tokens, strict=True)
        for part in (heads[number], tokens)
    ]
    pool = np.concatenate([*pieces, sentinel_ids, np.array([special.eos_id], np.int32), padding])
    ends = np.cumsum(head + length)
    sentinels = ends[-1] + number
    eos, nothing = ends[-1] + len(sentinel_ids), ends[-1] + len(sentinel_ids) + 1
    starts = (ends - length)[owner] + kept + before
    stops = starts + sizes
    # Where what is kept before a span begins: behind the span before it.
    since = np.append(0, stops[:-1])
    since[last - spans + 1] = ends - length - head

    at_span = 1 + 2 * (np.arange(len(owner)) + owner)
    at_last = at_span[last] + 2
    ones = np.ones(len(owner), np.int64)
    for out, gap, first, second, rest in (
        (
            inputs,
            gaps[0],
            (since, starts - since),
            (sentinels, ones),
            (stops[last], ends - stops[last]),
        ),
        (targets, gaps[1], (sentinels, ones), (starts, sizes), (eos, 1)),
    ):
        begin, size = np.empty((2, at_last[-1] + 2), np.int64)
        begin[0], size[0] = nothing, gap[0]
        for place, (what, how_many) in (
            (at_span, first),
            (at_span + 1, second),
            (at_last, rest),
            (at_last + 1, (nothing, gap[1:])),
        ):
            begin[place], size[place] = what, how_many
        _gather(pool, begin, size, out)


def _gaps(
    at: Int[np.ndarray, " n"], sizes: Int[np.ndarray, " n"], length: int
) -> Int[np.ndarray, " n+1"]:
    """Places before, between and behind stretches, which stand in order and do not overlap."""
    return np.append(at, length) - np.append(0, at + sizes)


def _gather(
    pool: Int[np.ndarray, " pool"],
    starts: Int[np.ndarray, " n"],
    sizes: Int[np.ndarray, " n"],
    out: Int[np.ndarray, " out"],
) -> None:
    """Fills an array with stretches of a pool, one behind the other."""
    places = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    places += counting(len(out))
    # All are in the pool. "raise" would write to a copy of `out` first, "clip" takes longer.
    np.take(pool, places, out=out, mode="wrap")


@functools.lru_cache(maxsize=8)
def counting(length: int, dtype: type[np.signedinteger] = np.int64) -> Int[np.ndarray, " length"]:
    """0, 1, ... of the lengths that batches have: to make it costs as much as to add it."""
    made = np.arange(length, dtype=dtype)
    made.flags.writeable = False
    return made


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


def _check_sentinels(jobs: Jobs, spans: Int[np.ndarray, " pieces"], special: SpecialTokens) -> None:
    worst = int(np.argmax(spans))
    if spans[worst] > len(special.sentinel_ids):
        denoiser = jobs.denoisers[jobs.denoiser[worst]]
        raise UserError(
            f"denoiser {denoiser.name} needs {spans[worst]} sentinels for a piece of "
            f"{len(jobs.tokens[worst])} tokens but the vocabulary has "
            f"{len(special.sentinel_ids)}: shorten feature_lengths or use a tokenizer with more "
            "sentinels"
        )


class Sizes:
    """What pieces need in rows of one size, of many denoisers, looked up instead of computed."""

    def __init__(
        self, denoisers: Sequence[Denoiser], room: tuple[int, int], special: SpecialTokens
    ) -> None:
        longest = [denoiser.longest(*room, special) for denoiser in denoisers]
        # The last row, which -1 finds, is of none: nothing fits.
        self._lengths = np.zeros((len(denoisers) + 1, max(longest, default=0) + 1, 2), np.int64)
        # Of each side alone: the longest piece that fits in the room that is left.
        self._by_side = [np.zeros((len(denoisers) + 1, most + 1), np.int64) for most in room]
        for number, (denoiser, most) in enumerate(zip(denoisers, longest, strict=True)):
            needs = self._lengths[number, : most + 1]
            needs[:] = [(0, 0), *(denoiser.lengths(n, special) for n in range(1, most + 1))]
            for side, table in enumerate(self._by_side):
                left = np.arange(table.shape[1])
                table[number] = np.searchsorted(needs[:, side], left, "right") - 1

    def lengths(
        self, denoiser: Int[np.ndarray, "*n"], length: Int[np.ndarray, "*n"]
    ) -> Int[np.ndarray, "*n 2"]:
        """As `Denoiser.lengths`, of the denoisers of these numbers."""
        return self._lengths[denoiser, length]

    def longest(
        self, denoiser: Int[np.ndarray, "*k n"], room: Int[np.ndarray, "n 2"]
    ) -> Int[np.ndarray, "*k n"]:
        """As `Denoiser.longest`, of the denoisers of these numbers."""
        inputs, targets = self._by_side
        return np.minimum(inputs[denoiser, room[:, 0]], targets[denoiser, room[:, 1]])


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
