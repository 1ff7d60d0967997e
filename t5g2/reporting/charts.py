"""Line charts as HTML and inline SVG, drawn here; `report.js` adds the read-outs.

The SVG stretches to the width of the page with strokes that keep theirs, and the labels are HTML
beside it, so one drawing is legible on a phone and on a desktop, and without any script.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from html import escape
from typing import Literal

from t5g2.reporting.numbers import tick
from t5g2.reporting.series import Curve, Points, decimate, view_top

_SIDE = 1000  # of the square that the SVG's coordinates span
_POINTS = 6000  # drawn of one chart, all its curves together
_FINE_POINTS = 12_000  # kept of it for a closer look
# Shown by report.js, without which they would do nothing.
_BUTTONS = (
    '<span class="zoom" hidden><button type="button" data-by="0.5" title="closer">+</button>'
    '<button type="button" data-by="2" title="further away">−</button>'
    '<button type="button" data-by="0" title="all of it">all</button></span>'
)
Form = Literal["fixed", "scientific", "compact", "percent"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One curve of a chart.

    Attributes:
        name: What the legend and the read-out call it.
        curve: Its values by step.
        colour: A class of `report.css`: "train", "heldout", "averaged", "c0" to "c5".
        look: "line"; "faint" for raw values behind a smoothed line; "dots" for few measurements.
        dashed: Told from another series of the same colour by dashes.
        in_legend: False for the companion of another series.
    """

    name: str
    curve: Curve
    colour: str
    look: Literal["line", "faint", "dots"] = "line"
    dashed: bool = False
    in_legend: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart over training steps, or over tokens.

    Attributes:
        title: Its heading.
        unit: Of the vertical axis, in words.
        series: The curves, the hindmost first.
        form: How the read-out writes values.
        from_zero: The vertical axis begins at 0.
        logarithmic: The vertical axis is logarithmic, where all values are positive.
        level: A horizontal line: its value and name.
        resumes: Steps at which the run was resumed.
        axis: What the horizontal axis counts.
    """

    title: str
    unit: str
    series: Sequence[Series]
    form: Form = "fixed"
    from_zero: bool = False
    logarithmic: bool = False
    level: tuple[float, str] | None = None
    resumes: Sequence[int] = ()
    axis: str = "step"


def draw(chart: Chart) -> str:
    """Returns the chart as an HTML `<figure>`."""
    full = [series for series in chart.series if series.curve.points or series.curve.bad]
    heading = f'<figcaption>{escape(chart.title)} <span class="unit">{escape(chart.unit)}</span>'
    if not any(series.curve.points for series in full):
        notes = _notes(full, chart.axis, 0, 0, None, math.inf) or ["No values recorded yet."]
        return f'<figure class="chart">{heading}</figcaption>{_paragraph(notes)}</figure>'

    values = [y for series in full if series.look != "dots" for _, y in series.curve.points]
    keep = values[:1] + [y for s in full if s.look == "dots" for _, y in s.curve.points]
    keep += [chart.level[0]] if chart.level else []
    top = view_top(values, keep, tolerated=10 if chart.logarithmic else 1.5)
    bottom = 0.0 if chart.from_zero else min([*values, *keep])
    y_axis = _Axis.over(bottom, top, logarithmic=chart.logarithmic and bottom > 0)
    steps = [x for series in full for x, _ in series.curve.points[:1] + series.curve.points[-1:]]
    first = min(steps) if min(steps) > 0.05 * max(steps) else 0
    # The little more than the last step keeps a dot there whole.
    x_axis = _Axis(low=first, high=first + 1.015 * max(max(steps) - first, 1))

    buckets = max(50, min(400, _POINTS // (2 * len(full))))
    thinned = [(series, decimate(series.curve.points, buckets)) for series in full]
    drawn: list[str] = []
    for value in y_axis.ticks(6):
        height = f"{_SIDE - y_axis.place(value):.0f}"
        drawn.append(f'<path class="grid" d="M0 {height}H{_SIDE}"/>')
    for step in chart.resumes:
        if x_axis.low <= step <= x_axis.high:
            drawn.append(f'<path class="resume" d="M{x_axis.place(step):.1f} 0V{_SIDE}"/>')
    if chart.level:
        height = f"{_SIDE - y_axis.place(chart.level[0]):.1f}"
        drawn.append(f'<path class="level" d="M0 {height}H{_SIDE}"/>')
    drawn += [_curve(series, points, x_axis, y_axis) for series, points in thinned]
    drawn.append(_bad_marks(full, x_axis))

    label = _percent if chart.form == "percent" else tick
    labels = [
        f'<span class="y" style="top:{100 - y_axis.place(value) / 10:.1f}%">{label(value)}</span>'
        for value in y_axis.ticks(6)
    ] + [
        f'<span class="x" style="left:{x_axis.place(value) / 10:.1f}%">{tick(value)}</span>'
        for value in x_axis.ticks(5)
    ]
    if chart.level:
        place = 100 - y_axis.place(chart.level[0]) / 10
        labels.append(
            f'<span class="level" style="top:{place:.1f}%">{escape(chart.level[1])}</span>'
        )
    legend = "".join(
        f'<span class="{series.colour}{" dashed" if series.dashed else ""}">'
        f'<i class="{series.look}"></i>{escape(series.name)}</span>'
        for series in full
        if series.in_legend
    )
    fine = max(50, min(2000, _FINE_POINTS // (2 * len(full))))
    data = {
        "form": chart.form,
        "axis": chart.axis,
        "logarithmic": y_axis.logarithmic,
        "resumes": list(chart.resumes),
        "low": x_axis.low,
        "high": x_axis.high,
        "series": [
            {
                "name": series.name,
                "colour": series.colour,
                "look": series.look,
                "dashed": series.dashed,
                "x": [x for x, _ in points],
                "y": [float(f"{y:.5g}") for _, y in points],
            }
            for series in full
            if (points := decimate(series.curve.points, fine))
        ],
    }
    notes = _notes(full, chart.axis, buckets, fine, chart.resumes, y_axis.high)
    return (
        f'<figure class="chart">{heading}{_BUTTONS}</figcaption>'
        f'<div class="legend">{legend}</div>'
        f'<div class="plot" tabindex="0" role="img" aria-label="{escape(_spoken(chart, full))}">'
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" aria-hidden="true">'
        f"<g>{''.join(drawn)}</g></svg>{''.join(labels)}"
        f'<span class="cursor" hidden></span><div class="readout" hidden></div></div>'
        f'<p class="axis">{escape(chart.axis)}</p>{_paragraph(notes)}'
        f'<script type="application/json">{embedded(data)}</script></figure>'
    )


def embedded(data: object) -> str:
    """JSON that is safe inside a `<script>`: no `<` can end the element early."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


@dataclasses.dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    logarithmic: bool = False

    @classmethod
    def over(cls, low: float, high: float, *, logarithmic: bool) -> _Axis:
        """An axis with a little room above and below, but none below zero."""
        if logarithmic:
            return cls(low / 1.15, high * 1.15, logarithmic=True)
        room = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(max(0.0, low - room) if low >= 0 else low - room, high + room)

    def place(self, value: float) -> float:
        """Where a value lies, from 0 (low) to _SIDE (high), and kept near these."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return max(-0.5, min(1.5, (value - low) / (high - low))) * _SIDE

    def ticks(self, most: int) -> list[float]:
        """Round values in range, at most `most` of them."""
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in (range(1, 10), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
                found = [f * 10.0**d for d in decades for f in factors]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= most:
                    break
            if len(found) >= 3:  # fewer round values than that: linear ones say more
                return found[:: math.ceil(len(found) / most)]
        unit = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
        for spacing in (unit, 2 * unit, 5 * unit, 10 * unit):
            first, last = math.ceil(self.low / spacing), math.floor(self.high / spacing)
            if last - first < most:
                break
        return [index * spacing for index in range(first, last + 1)]


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def _curve(series: Series, points: Points, x_axis: _Axis, y_axis: _Axis) -> str:
    places = [(x_axis.place(x), _SIDE - y_axis.place(y)) for x, y in points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    look = "line" if series.look == "dots" else series.look
    classes = f"{series.colour} {look}{' dashed' if series.dashed else ''}"
    drawn = f'<path class="{classes}" d="M{path}"/>' if len(places) > 1 else ""
    if series.look == "dots" or len(places) == 1:
        # A line of no length with round ends is a dot that stays round however the SVG stretches.
        size = "dot" if len(places) <= 60 else "small dot"
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
        drawn += f'<path class="{series.colour} {size}" d="{dots}"/>'
    return drawn


def _bad_marks(full: Sequence[Series], x_axis: _Axis) -> str:
    places = sorted({round(x_axis.place(x)) for series in full for x in series.curve.bad})
    marks = "".join(f"M{x} 0v30" for x in places if 0 <= x <= _SIDE)
    return f'<path class="bad" d="{marks}"/>' if marks else ""


def _notes(
    full: Sequence[Series],
    axis: str,
    buckets: int,
    fine: int,
    resumes: Sequence[int] | None,
    top: float,
) -> list[str]:
    notes = []
    for series in full:
        if series.curve.bad and series.in_legend:
            count, first = len(series.curve.bad), series.curve.bad[0]
            what = "1 value" if count == 1 else f"{count:,} values"
            notes.append(
                f"{series.name}: {what} not finite, marked at the top; the first at "
                f"{axis} {first:,.0f}."
            )
        highest = max((y for _, y in series.curve.points), default=0.0)
        if highest > top:
            notes.append(f"{series.name}: spikes up to {tick(float(f'{highest:.3g}'))} cut off.")
    most = max((len(series.curve.points) for series in full), default=0)
    if most > 2 * buckets + 2:
        notes.append(
            f"{most:,} records, drawn as the lowest and the highest of each of {buckets} groups"
            + (f" ({fine} zoomed in)." if fine > buckets else ".")
        )
    if resumes:
        notes.append("Dotted verticals: the run was resumed there.")
    return notes


def _paragraph(notes: Sequence[str]) -> str:
    return f'<p class="note">{escape(" ".join(notes))}</p>' if notes else ""


def _spoken(chart: Chart, full: Sequence[Series]) -> str:
    ends = [
        f"{series.name} ends at {series.curve.points[-1][1]:.4g}"
        for series in full
        if series.curve.points and series.in_legend
    ]
    return f"{chart.title}, {chart.unit}: {'; '.join(ends)}"
