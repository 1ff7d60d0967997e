"""What all pages share: one file without network or other files, and its tables."""

from __future__ import annotations

import datetime
import importlib.resources
import time
from collections.abc import Collection, Sequence
from html import escape


def page(title: str, header: str, sections: Sequence[tuple[str, str]], source: str) -> str:
    """A whole page.

    Args:
        title: Of the window; escaped.
        header: HTML at the top.
        sections: Headings (none if "") and the HTML below them.
        source: What the page was written from, for its last line.
    """
    resources = importlib.resources.files("t5g2.reporting")
    style, script = ((resources / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    body = "".join(f"<h2>{name}</h2>{text}" if name else text for name, text in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title} · t5g2</title><style>\n{style}</style></head>\n"
        f"<body><header>{header}</header>\n<main>{body}</main>\n"
        f"<footer>Written by t5g2 on {clock_time(time.time())} {source}.</footer>"
        f"<script>\n{script}</script></body></html>\n"
    )


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Collection[int] = (),
    markup: Collection[int] = (),
) -> str:
    """A table in a card that scrolls sideways where it must.

    Args:
        heads: Of the columns.
        rows: Their cells.
        numbers: Columns that stand to the right.
        markup: Columns whose cells are HTML already.
    """

    def cells(tag: str, texts: Sequence[str]) -> str:
        made = []
        for index, text in enumerate(texts):
            kind = ' class="number"' if index in numbers else ""
            shown = text if tag == "td" and index in markup else escape(text)
            made.append(f"<{tag}{kind}>{shown}</{tag}>")
        return "".join(made)

    lines = [f"<tr>{cells('th', heads)}</tr>", *(f"<tr>{cells('td', row)}</tr>" for row in rows)]
    return f'<div class="card wide"><table>{"".join(lines)}</table></div>'


def clock_time(seconds: float) -> str:
    """A moment, given in seconds since 1970, as date and time in UTC."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
