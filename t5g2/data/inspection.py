"""What a model is shown, for people: examples as text, their lengths, and how full rows are."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from t5g2.data.mixture import Mixture
from t5g2.data.packing import Piece, RowStream
from t5g2.data.sampling import TaskChoice
from t5g2.data.tokenizer import Tokenizer
from t5g2.errors import UserError

WIDTH = 100
# White space that would break a line of the report or could not be told from another.
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍", "\f": "␌", "\v": "␋"})


class Lengths(NamedTuple):
    """Tokens of an example on both sides."""

    inputs: int
    targets: int


def describe(
    mixture: Mixture,
    tokenizer: Tokenizer,
    *,
    rows: int,
    inputs_length: int,
    targets_length: int,
    seed: int,
    examples: int,
    batches: int,
) -> str:
    """A report on the first batches of a run, for people.

    Args:
        mixture: what the run is trained on.
        tokenizer: what its documents were tokenised with.
        rows: rows of a global batch.
        inputs_length: encoder tokens in a row.
        targets_length: decoder tokens in a row.
        seed: the run's data seed.
        examples: how many examples of each task to show as text.
        batches: how many batches the figures are taken from.

    Returns:
        Lines of text: examples, a table of the tasks, a table of how full the rows are.

    Raises:
        UserError: `rows` or `batches` below 1, or data that no row can be made of.
    """
    for name, value in (("rows", rows), ("batches", batches)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    stream = RowStream(mixture, rows, inputs_length, targets_length, seed)
    packed = list(_rows(stream, batches))
    pieces = list(itertools.chain(*packed))
    tasks = range(len(stream.tasks))
    blocks = [
        *(_examples(stream, number, pieces, tokenizer, examples) for number in tasks),
        _task_table(stream, pieces),
        _packing_table(stream, packed, _unpacked(stream, len(pieces), seed)),
    ]
    return "\n\n".join(blocks) + "\n"


def visible(text: str, width: int = WIDTH) -> str:
    """Text on one line: line ends and tabs as symbols, cut to `width` with the cut said."""
    line = text.translate(_VISIBLE)
    if len(line) <= width:
        return line
    return f"{line[:width]} … (+{len(line) - width:,} characters)"


def _rows(stream: RowStream, batches: int) -> Iterator[list[Piece]]:
    cursors = stream.start()
    for _ in range(batches):
        for row in range(stream.rows):
            pieces, cursors[row] = stream.next_row(row, cursors[row])
            yield pieces


def _unpacked(stream: RowStream, count: int, seed: int) -> list[Lengths]:
    """Lengths of as many examples of row 0 if each had a row to itself."""
    mixture, choose = stream.mixture, TaskChoice(stream.mixture.rates, seed)
    draws = [itertools.count() for _ in mixture.sources]
    remaining = [0] * len(mixture.sources)
    lengths = []
    for j in range(count):
        task = stream.tasks[choose(0, j)]
        while not remaining[task.source]:
            number = stream.document_number(task.source, 0, next(draws[task.source]))
            remaining[task.source] = len(mixture.sources[task.source].documents[number])
        longest = task.denoiser.longest(*stream.room, mixture.special)
        length = min(remaining[task.source], longest)
        remaining[task.source] -= length
        lengths.append(Lengths(*task.denoiser.lengths(length, mixture.special)))
    return lengths


def _examples(
    stream: RowStream, number: int, pieces: Sequence[Piece], tokenizer: Tokenizer, count: int
) -> str:
    task = stream.tasks[number]
    denoiser = task.denoiser
    hidden = f"{denoiser.corruption_rate:.0%} hidden"
    spans = "one span at the end"
    if denoiser.mean_span is not None:
        spans = f"spans of {denoiser.mean_span:g} tokens on average"
    lines = [f"{task.name}: {hidden}, {spans}, {stream.mixture.rates[number]:.1%} of the examples"]
    own = [piece for piece in pieces if piece.task == number]
    if count and not own:
        lines.append("  (none in these batches)")
    for piece in own[:count]:
        stop = piece.start + piece.length
        lines.append(f"  document {piece.document}, tokens {piece.start:,} to {stop:,}")
        for side, ids in piece.example._asdict().items():
            lines.append(f"    {side:7} {len(ids):6,}  {visible(tokenizer.decode(ids))}")
    return "\n".join(lines)


def _task_table(stream: RowStream, pieces: Sequence[Piece]) -> str:
    table = [["task", "examples", "share", "rate", *Lengths._fields, "sentinels"]]
    for number, task in enumerate(stream.tasks):
        own = [piece for piece in pieces if piece.task == number]
        share, rate = len(own) / len(pieces), stream.mixture.rates[number]
        lengths = (
            _summary(np.array([len(piece.example[side]) for piece in own])) for side in (0, 1)
        )
        spans = [task.denoiser.counts(piece.length)[1] for piece in own]
        sentinels = f"{np.mean(spans):.1f}" if spans else "-"
        shares = (f"{len(own):,}", f"{share:.1%}", f"{rate:.1%}")
        table.append([task.name, *shares, *lengths, sentinels])
    title = f"{len(pieces):,} examples; lengths: mean / median / max; sentinels: mean"
    return f"{title}\n{_aligned(table)}"


def _summary(lengths: Int[np.ndarray, " n"]) -> str:
    if not len(lengths):
        return "-"
    return f"{lengths.mean():.1f} / {np.median(lengths):g} / {lengths.max()}"


def _packing_table(
    stream: RowStream, packed: Sequence[Sequence[Piece]], unpacked: Sequence[Lengths]
) -> str:
    used = [[sum(len(p.example[side]) for p in row) for side in (0, 1)] for row in packed]
    columns = [_filling(np.array(lengths), stream.room) for lengths in (used, unpacked)]
    per_row = len(list(itertools.chain(*packed))) / len(packed)
    table = [["", "packed", "one a row"]]
    table += [[what, *(f"{c[what]:.1%}" for c in columns)] for what in columns[0]]
    table.append(["examples in a row", f"{per_row:.2f}", "1.00"])
    inputs, targets = stream.room
    title = f"{len(packed):,} rows of {inputs:,} inputs and {targets:,} targets"
    return f"{title}\n{_aligned(table)}"


def _filling(
    lengths: Int[np.ndarray, "rows 2"], room: tuple[int, int]
) -> dict[str, Float[np.ndarray, ""]]:
    """Mean shares of rows that hold tokens, or padding."""
    shares = lengths / np.array(room)
    inputs, targets = shares.mean(0)
    both = lengths.sum(1).mean() / sum(room)
    return {
        "inputs filled": inputs,
        "targets filled": targets,
        "both sides filled": both,
        "fuller side filled": shares.max(1).mean(),
        "padding in inputs": 1 - inputs,
        "padding in targets": 1 - targets,
        "padding in both": 1 - both,
    }


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table
    )
    return "\n".join(line.rstrip() for line in lines)
