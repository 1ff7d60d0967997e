"""What may be wrong with data, looked for in the rows and documents of a run's first batches."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from t5g2.data.image_examples import ImagePrefix
from t5g2.data.packing import Piece, RowStream
from t5g2.data.watched import REPETITIVE, Note

# So many places are named.
_NAMED = 3
# A task that should have had so many examples and had none is odd.
_EXPECTED = 3


class Oddity(NamedTuple):
    """Something that was looked for.

    Attributes:
        what: it is.
        found: how much of it.
        where: the first places; "" if there are none to name.
        odd: whether it is a reason to look closer.
    """

    what: str
    found: str
    where: str
    odd: bool


def find_oddities(
    stream: RowStream,
    packed: Sequence[Sequence[Piece]],
    read: Mapping[str, Mapping[int, Note]],
    bad_records: Mapping[str, int],
) -> Iterator[Oddity]:
    """Everything that is looked for, found or not.

    Args:
        stream: that the rows came from.
        packed: the rows.
        read: notes on the documents that were read, by source and number.
        bad_records: how many were passed over, by source.
    """
    longest = _longest_pieces(stream)

    def documents(what: str, is_odd: Callable[[str, Note], bool], say: str = "") -> Oddity:
        odd = [
            (name, i, note)
            for name, notes in read.items()
            for i, note in notes.items()
            if is_odd(name, note)
        ]
        total = sum(map(len, read.values()))
        found = f"{len(odd):,} of {total:,} documents read{say if odd else ''}"
        return Oddity(what, found, _places([(name, i) for name, i, _ in odd]), bool(odd))

    yield documents("empty documents", lambda _, note: not note.tokens)
    skipped = {name: count for name, count in bad_records.items() if count}
    yield Oddity(
        "bad records passed over",
        f"{sum(skipped.values()):,}",
        _named([f"{name}: {count:,}" for name, count in skipped.items()]),
        bool(skipped),
    )
    long = documents(
        "documents longer than a row takes",
        lambda name, note: note.tokens > longest.get(name, math.inf),
        _splitting(stream, packed, read, longest),
    )
    yield long._replace(odd=False)  # that is what they are split for
    yield documents(
        f"very repetitive documents (compress to less than {REPETITIVE:.0%})",
        lambda _, note: note.repetitive,
    )
    yield documents(
        "documents with replacement characters (U+FFFD)", lambda _, n: n.replacements > 0
    )
    yield _byte_tokens(read)
    yield _sentinels(stream, packed)
    rates = stream.mixture.rates
    met = {piece.task for row in packed for piece in row}
    missing = [i for i in np.flatnonzero(rates) if i not in met]
    examples = sum(map(len, packed))
    yield Oddity(
        "tasks that did not occur",
        f"{len(missing):,} of {np.count_nonzero(rates):,} tasks",
        _named([stream.tasks[i].name for i in missing]),
        any(rates[i] * examples >= _EXPECTED for i in missing),
    )


def _longest_pieces(stream: RowStream) -> dict[str, int]:
    """The most tokens that an example of a source can take, of sources that are ever split."""
    found: dict[str, int] = {}
    for task in stream.tasks:
        name = stream.mixture.sources[task.source].name
        if not isinstance(task.denoiser, ImagePrefix):
            longest = task.denoiser.longest(*stream.room, stream.mixture.special)
            found[name] = max(found.get(name, 0), longest)
    return found


def _splitting(
    stream: RowStream,
    packed: Sequence[Sequence[Piece]],
    read: Mapping[str, Mapping[int, Note]],
    longest: Mapping[str, int],
) -> str:
    """Into how many pieces the longest document must be split, and long ones were."""
    sizes = [
        (note.tokens, longest[name])
        for name, notes in read.items()
        for note in notes.values()
        if name in longest
    ]
    tokens, most = max(sizes, default=(0, 1))
    said = f"; the longest, {tokens:,} tokens, is split into at least {-(-tokens // most):,}"
    begun: dict[tuple[int, int], int] = {}
    finished = []
    for place, pieces in enumerate(packed):
        row = place % stream.rows
        for piece in pieces:
            source = stream.tasks[piece.task].source
            name = stream.mixture.sources[source].name
            if piece.start and (row, source) not in begun:
                continue  # Begun before these batches.
            begun[row, source] = 1 if not piece.start else begun[row, source] + 1
            size = read[name][piece.document].tokens
            if piece.start + piece.length == size > longest.get(name, math.inf):
                finished.append(begun[row, source])
    if finished:
        said += (
            f", {sum(finished) / len(finished):.1f} on average of the {len(finished):,} finished"
        )
    return said


def _byte_tokens(read: Mapping[str, Mapping[int, Note]]) -> Oddity:
    totals = {
        name: (sum(n.byte_tokens for n in notes.values()), sum(n.tokens for n in notes.values()))
        for name, notes in read.items()
    }
    shares = {name: of / tokens for name, (of, tokens) in totals.items() if of}
    count, tokens = (sum(side) for side in zip(*totals.values(), strict=True))
    highest = sorted(shares, key=lambda name: -shares[name])
    return Oddity(
        "tokens that stand for single bytes",
        f"{count / max(tokens, 1):.2%} of {tokens:,} tokens read",
        _named([f"{name}: {shares[name]:.2%}" for name in highest]),
        any(share > 0.05 for share in shares.values()),
    )


def _sentinels(stream: RowStream, packed: Sequence[Sequence[Piece]]) -> Oddity:
    special = stream.mixture.special
    needs = {
        task.denoiser.name: task.denoiser.counts(task.denoiser.longest(*stream.room, special))[1]
        for task in stream.tasks
        if not isinstance(task.denoiser, ImagePrefix)
    }
    block, used = special.sentinel_ids, 0
    for row in packed:
        for piece in row:
            targets = piece.example.targets
            used = max(used, int(((targets >= block.start) & (targets < block.stop)).sum()))
    where = f"the longest piece of {max(needs, key=needs.__getitem__)} needs {max(needs.values())}"
    return Oddity(
        "sentinels in one example", f"at most {used} of {len(block)}", where if needs else "", False
    )


def _places(found: Sequence[tuple[str, int]]) -> str:
    by_source: dict[str, list[int]] = {}
    for name, number in found:
        by_source.setdefault(name, []).append(number)
    named = [f"{name}: {_named([str(i) for i in sorted(own)])}" for name, own in by_source.items()]
    more = len(named) - _NAMED
    return "; ".join([*named[:_NAMED], *([f"{more:,} more sources"] if more > 0 else [])])


def _named(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    shown = ", ".join(names[:_NAMED])
    return f"{shown} and {more:,} more" if more > 0 else shown
