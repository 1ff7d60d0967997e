"""A summary of a run's data as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from t5g2.data.inspection import Group, Part, Shown, SourceSummary, Summary, histogram
from t5g2.reporting.numbers import compact

WIDTH = 100
# White space that would break a line or could not be told from another.
VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍", "\f": "␌", "\v": "␋"})
_BINS, _BLOCKS = 24, " ▁▂▃▄▅▆▇█"


def as_text(summary: Summary) -> str:
    """The whole summary, for a terminal."""
    many = len(summary.sources) > 1
    blocks = [
        *(_examples(summary, group, many) for group in summary.denoisers),
        _denoisers(summary),
        _histograms(summary),
        *([_aligned(source_table(summary))] if many or summary.sources[0].epochs else []),
        *([_aligned(group_table("language", summary.languages))] if summary.languages else []),
        f"{packing_title(summary)}\n{_aligned(packing_table(summary))}",
        _oddities(summary),
    ]
    return "\n\n".join(blocks) + "\n"


def visible(text: str, width: int = WIDTH) -> str:
    """Text on one line: line ends and tabs as symbols, cut to `width` with the cut said."""
    line = text.translate(VISIBLE)
    if len(line) <= width:
        return line
    return f"{line[:width]} … (+{len(line) - width:,} characters)"


def example_place(shown: Shown) -> str:
    """Which tokens of which document an example is."""
    stop = shown.start + shown.length
    return f"document {shown.document:,}, tokens {shown.start:,} to {stop:,}"


def group_table(what: str, groups: Sequence[Group]) -> list[list[str]]:
    """Shares against rates, and lengths: a heading and a line for each group."""
    table = [[what, "examples", "share", "rate", "inputs", "targets", "sentinels"]]
    for group in groups:
        lengths = [_mean_median_max(group.lengths[:, side]) for side in (0, 1)]
        sentinels = f"{group.sentinels.mean():.1f}" if group.examples else "-"
        shares = [f"{group.examples:,}", f"{group.share:.1%}", f"{group.rate:.1%}"]
        table.append([group.name, *shares, *lengths, sentinels])
    return table


def source_table(summary: Summary) -> list[list[str]]:
    """Sources: shares, sizes and epochs; columns that would be empty are left out."""
    sources = summary.sources
    columns = {
        "source": [source.group.name for source in sources],
        "language": [source.facts.language or "" for source in sources],
        "examples": [f"{source.group.examples:,}" for source in sources],
        "share": [f"{source.group.share:.1%}" for source in sources],
        "rate": [f"{source.group.rate:.1%}" for source in sources],
        "documents": [f"{source.documents:,}" for source in sources],
        "tokens": [_known(source.facts.tokens) for source in sources],
        "epochs": [_epochs(source) for source in sources],
        "bytes": [f"{source.byte_share:.1%}" for source in sources],
    }
    shown = {head: cells for head, cells in columns.items() if any(map(str.strip, cells))}
    return [list(shown), *map(list, zip(*shown.values(), strict=True))]


def packing_title(summary: Summary) -> str:
    """What the rows are."""
    inputs, targets = summary.room
    return f"{summary.rows:,} rows of {inputs:,} inputs and {targets:,} targets"


def packing_table(summary: Summary) -> list[list[str]]:
    """How full rows are, packed and not."""
    packed, unpacked = summary.packed, summary.unpacked
    mean, most = summary.documents_in_row
    return [
        ["", "packed", "one a row"],
        *([what, f"{packed[what]:.1%}", f"{unpacked[what]:.1%}"] for what in packed),
        ["examples in a row", f"{summary.examples_in_row:.2f}", "1.00"],
        ["documents in a row", f"{mean:.2f}, at most {most:,}", "1.00"],
    ]


def notes(summary: Summary) -> Iterator[str]:
    """What the tables leave to be said."""
    yield "Lengths in tokens: mean / median / max. Sentinels: mean of an example."
    if summary.total_steps is not None:
        yield (
            f"Epochs: of the whole run of {summary.total_steps:,} steps, at the pace of these "
            f"{summary.batches:,} batches; unknown where the tokens of a source were not counted."
        )
    yield "Bytes: share of the tokens read that stand for a single byte."


def _examples(summary: Summary, group: Group, many: bool) -> str:
    name = group.name
    lines = [f"{name}: {summary.describe[name]}, {group.rate:.1%} of the examples"]
    own = [shown for shown in summary.shown if shown.denoiser == name]
    if summary.shown and not own:
        lines.append("  (none in these batches)")
    for shown in own:
        images = "" if shown.images is None else f", images: {len(shown.images)}"
        source = f"{shown.source}, " if many else ""
        lines.append(f"  {source}{example_place(shown)}{images}")
        for side, parts in (("inputs", shown.inputs), ("targets", shown.targets)):
            count = getattr(shown.tokens, side)
            lines.append(f"    {side:7} {count:6,}  {visible(_joined(parts))}")
    return "\n".join(lines)


def _joined(parts: Sequence[Part]) -> str:
    return "".join(f"[{part.text}]" if part.kind == "image" else part.text for part in parts)


def _denoisers(summary: Summary) -> str:
    title = f"{summary.examples:,} examples; lengths: mean / median / max; sentinels: mean"
    return f"{title}\n{_aligned(group_table('denoiser', summary.denoisers))}"


def _histograms(summary: Summary) -> str:
    table = [
        ["lengths", *(f"{side} 0 to {room:,}" for side, room in summary.room._asdict().items())]
    ]
    for group in summary.denoisers:
        bars = [
            _bars(histogram(group.lengths[:, side], room, _BINS)[0])
            for side, room in enumerate(summary.room)
        ]
        table.append([group.name, *bars])
    return _aligned(table)


def _bars(counts: Sequence[int]) -> str:
    most = max(max(counts), 1)
    # Whatever is there is seen.
    bars = [_BLOCKS[-(-count * (len(_BLOCKS) - 1) // most)] for count in counts]
    return f"|{''.join(bars)}|"


def _oddities(summary: Summary) -> str:
    lines = ["Looked for"]
    for oddity in summary.oddities:
        where = f"  ({oddity.where})" if oddity.where else ""
        lines.append(f"{'!' if oddity.odd else ' '} {oddity.what}: {oddity.found}{where}")
    return "\n".join(lines)


def _mean_median_max(lengths: Int[np.ndarray, " n"]) -> str:
    if not len(lengths):
        return "-"
    return f"{lengths.mean():.1f} / {np.median(lengths):g} / {lengths.max()}"


def _known(count: int | None) -> str:
    return "" if count is None else compact(count)


def _epochs(source: SourceSummary) -> str:
    return "" if source.epochs is None else f"{source.epochs:.2f}"


def _aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table
    )
    return "\n".join(line.rstrip() for line in lines)
