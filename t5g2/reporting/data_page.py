"""A summary of a run's data as one HTML page, without network or other files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

import numpy as np

from t5g2.data.inspection import Group, Part, Shown, Summary, histogram
from t5g2.reporting.data_text import (
    VISIBLE,
    example_place,
    group_table,
    notes,
    packing_table,
    packing_title,
    source_table,
)
from t5g2.reporting.numbers import compact, grouped
from t5g2.reporting.page import page, table
from t5g2.reporting.pictures import data_url
from t5g2.reporting.report_charts import colour
from t5g2.reporting.small_charts import histogram as drawn_histogram

_BINS = 32
_CHARACTERS = 4000  # of a side of an example
_PICTURE = 160  # pixels
_OPEN = 3  # examples of a denoiser that are seen without being asked for
_BLANKS = re.compile(r"\n|[\t\r\f\v]|  +")


def as_page(summary: Summary, title: str) -> str:
    """The page.

    Args:
        summary: Of the data.
        title: What the data is of: a run's name or a recipe's.
    """
    odd = sum(oddity.odd for oddity in summary.oddities)
    badge = ("open", f"{odd} to look at") if odd else ("done", "nothing odd")
    name = escape(title)
    header = (
        f'<h1>{name}: data <span class="badge {badge[0]}">{badge[1]}</span></h1>'
        f'<p class="headline">{escape(_headline(summary))}</p>'
    )
    sections = [
        ("", _tiles(summary)),
        ("Examples", _examples(summary)),
        ("Denoisers", _groups("denoiser", summary.denoisers)),
        ("Lengths", _lengths(summary)),
        ("Sources", _numbers(source_table(summary), words=("source", "language"))),
        *([("Languages", _groups("language", summary.languages))] if summary.languages else []),
        ("", f'<p class="note">{escape(" ".join(notes(summary)))}</p>'),
        ("Rows", _rows(summary)),
        ("Looked for", _oddities(summary)),
    ]
    return page(f"{name}: data", header, sections, "from the first batches of the data")


def _headline(summary: Summary) -> str:
    sources = len(summary.sources)
    return (
        f"The first {grouped(summary.batches)} batches: {packing_title(summary)}, with "
        f"{grouped(summary.examples)} examples from "
        f"{'one source' if sources == 1 else f'{sources} sources'} under "
        f"{len(summary.denoisers)} denoisers."
    )


def _tiles(summary: Summary) -> str:
    mean, _ = summary.documents_in_row
    tokens = sum(source.facts.tokens or 0 for source in summary.sources)
    pairs = [
        (f"{summary.packed['fuller side filled']:.1%}", "of the fuller side of a row filled"),
        (f"{summary.packed['both sides filled']:.1%}", "of both sides filled"),
        (f"{summary.unpacked['both sides filled']:.1%}", "of both sides if not packed"),
        (f"{mean:.2f}", "documents in a row, on average"),
        (compact(sum(s.documents for s in summary.sources)), "documents"),
        *([(compact(tokens), "tokens in all sources")] if tokens else []),
    ]
    tiles = "".join(f'<div class="tile"><b>{b}</b><span>{label}</span></div>' for b, label in pairs)
    return f'<div class="tiles">{tiles}</div>'


def _examples(summary: Summary) -> str:
    blocks = []
    for index, group in enumerate(summary.denoisers):
        own = [shown for shown in summary.shown if shown.denoiser == group.name]
        cards = [_example(shown, len(summary.sources) > 1) for shown in own]
        rest = "".join(cards[_OPEN:])
        if rest:
            more = f"More examples of {group.name}: {len(cards) - _OPEN}"
            rest = f"<details><summary>{escape(more)}</summary>{rest}</details>"
        blocks.append(
            f'<h3><span class="{colour(index)}">■</span> {escape(group.name)} <span class="unit">'
            f"{escape(summary.describe[group.name])}; {group.rate:.1%} of the examples</span></h3>"
            + ("".join(cards[:_OPEN]) + rest or '<p class="soft">None in these batches.</p>')
        )
    return "".join(blocks)


def _example(shown: Shown, many: bool) -> str:
    source = f"<b>{escape(shown.source)}</b> " if many else ""
    sides = "".join(
        f'<div class="code" data-label="{side}">{_marked(parts, hidden=side == "targets")}</div>'
        for side, parts in (("inputs", shown.inputs), ("targets", shown.targets))
    )
    return (
        f'<div class="card sample">{source}<span class="soft">{example_place(shown)}</span>'
        f"{_pictures(shown)}"
        f'<div class="sides shown"><div class="head">inputs, {shown.tokens.inputs:,} tokens</div>'
        f'<div class="head">targets, {shown.tokens.targets:,} tokens</div>{sides}</div></div>'
    )


def _marked(parts: Sequence[Part], *, hidden: bool) -> str:
    """A side of an example; in targets the hidden spans are set off."""
    made = []
    left = _CHARACTERS
    for place, part in enumerate(parts):
        if left <= 0:
            rest = sum(len(other.text) for other in parts[place:])
            made.append(f'<span class="soft"> … {rest:,} more characters</span>')
            break
        left -= len(part.text)
        text = _visible(part.text[: max(left + len(part.text), 0)])
        if part.kind == "sentinel":
            made.append(f'<mark title="{escape(part.text)}">{part.number}</mark>')
        elif part.kind == "text":
            made.append(f'<span class="gap">{text}</span>' if hidden else text)
            if left < 0:
                made.append(f'<span class="soft"> … {-left:,} more characters</span>')
        else:
            made.append(f'<span class="special">{escape(part.text)}</span>')
    return "".join(made)


def _visible(text: str) -> str:
    """Escaped text whose line ends, tabs and repeated spaces can be seen."""
    made, end = [], 0
    for blank in _BLANKS.finditer(text):
        symbol = blank[0].translate(VISIBLE).replace(" ", "·")
        after = "\n" if blank[0] == "\n" else ""
        made.append(
            f'{escape(text[end : blank.start()])}<span class="blank">{symbol}</span>{after}'
        )
        end = blank.end()
    return "".join(made) + escape(text[end:])


def _pictures(shown: Shown) -> str:
    """The images of an example, if they are pixels, small."""
    if shown.images is None:
        return ""
    if shown.images.dtype != np.uint8:
        return f'<p class="soft">{len(shown.images)} images, stored as features.</p>'
    made = [f'<img alt="" src="{data_url(pixels, _PICTURE)}">' for pixels in shown.images]
    return f'<div class="pictures">{"".join(made)}</div>'


def _groups(what: str, groups: Sequence[Group]) -> str:
    return _numbers(group_table(what, groups), words=(what,))


def _numbers(lines: Sequence[Sequence[str]], words: Sequence[str]) -> str:
    heads, *rows = lines
    return table(heads, rows, numbers=[i for i, head in enumerate(heads) if head not in words])


def _lengths(summary: Summary) -> str:
    cards = []
    for index, group in enumerate(summary.denoisers):
        bars = "".join(
            drawn_histogram(
                *histogram(group.lengths[:, side], room, _BINS), f"tokens of {name}", colour(index)
            )
            for side, (name, room) in enumerate(summary.room._asdict().items())
        )
        cards.append(f'<div class="card"><b>{escape(group.name)}</b>{bars}</div>')
    return f'<div class="few">{"".join(cards)}</div>'


def _rows(summary: Summary) -> str:
    heads, *rows = packing_table(summary)
    return f'<div class="narrow">{table(heads, rows, numbers=(1, 2))}</div>'


def _oddities(summary: Summary) -> str:
    rows = [
        [
            f'<span class="{"odd" if oddity.odd else "fine"}">{escape(oddity.what)}</span>',
            oddity.found,
            oddity.where,
        ]
        for oddity in summary.oddities
    ]
    return table(["", "found", "where"], rows, markup=(0,))
