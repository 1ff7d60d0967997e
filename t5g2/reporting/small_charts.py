"""Charts as small as a cell of a table, as HTML and inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from t5g2.reporting.numbers import tick
from t5g2.reporting.series import Points

_SIDE = 100  # of the square that the SVG's coordinates span


def sparkline(line: Points, dots: Points, low: float, high: float, colour: str, said: str) -> str:
    """A curve without axes.

    Args:
        line: By x.
        dots: Measurements over the same axis.
        low: The value at the bottom.
        high: The value at the top.
        colour: A class of `report.css`.
        said: What the curve shows, for those who cannot see it.
    """
    xs = [x for x, _ in (*line, *dots)]
    if not xs:
        return ""
    first, width = min(xs), max(max(xs) - min(xs), 1e-9)
    height = max(high - low, 1e-9)

    def placed(points: Points) -> list[str]:
        return [
            f"{_SIDE * (x - first) / width:.1f} {_SIDE - _SIDE * (y - low) / height:.1f}"
            for x, y in points
        ]

    curve = f'<path class="line" d="M{"L".join(placed(line))}"/>' if len(line) > 1 else ""
    marks = "".join(f"M{place}h0" for place in placed(dots if dots or curve else line))
    return (
        f'<span class="spark {colour}" role="img" aria-label="{escape(said)}">{_svg()}{curve}'
        f'<path class="small dot" d="{marks}"/></svg></span>'
    )


def histogram(counts: Sequence[int], edges: Sequence[float], unit: str, colour: str) -> str:
    """Bars over a range that starts and ends where the axis says.

    Args:
        counts: How many fall between two neighbouring edges, at least one count.
        edges: One more than counts, ascending.
        unit: What the edges measure.
        colour: A class of `report.css`.
    """
    most, total = max(max(counts), 1), max(sum(counts), 1)
    width = _SIDE / len(counts)
    bars = []
    for i, count in enumerate(counts):
        if not count:
            continue
        left, top = i * width, _SIDE - max(_SIDE * count / most, 1)
        text = f"{edges[i]:,.0f} to {edges[i + 1]:,.0f} {unit}: {count:,} ({count / total:.1%})"
        bars.append(
            f'<g class="bars"><title>{escape(text)}</title>'
            f'<path d="M{left + 0.05 * width:.2f} {_SIDE}V{top:.1f}'
            f'H{left + 0.95 * width:.2f}V{_SIDE}Z"/></g>'
        )
    said = f"{unit}: {total:,} examples, from {edges[0]:,.0f} to {edges[-1]:,.0f}"
    return (
        f'<div class="histogram"><div class="{colour}" role="img" aria-label="{escape(said)}">'
        f"{_svg()}{''.join(bars)}</svg></div>"
        f"<span>{tick(edges[0])}</span><span>{escape(unit)}</span><span>{tick(edges[-1])}</span>"
        "</div>"
    )


def _svg() -> str:
    return f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none">'
