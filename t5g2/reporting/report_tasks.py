"""Sections of the report on losses by denoiser, by source and by language."""

from __future__ import annotations

import dataclasses
import math
from html import escape

from t5g2.reporting import report_charts
from t5g2.reporting.metrics_log import Row, RunHistory
from t5g2.reporting.numbers import compact
from t5g2.reporting.page import table
from t5g2.reporting.series import Points, inner_names, is_number
from t5g2.reporting.small_charts import sparkline
from t5g2.reporting.task_losses import (
    By,
    TaskNames,
    averaged,
    mean_of,
    regrouped,
    shares,
    targets_of,
)

_RECENT = 100  # at most so many records make up the training loss of the tables
_DRAWN = report_charts.COLOURS  # so many sources at most share a chart
_SPARK_POINTS = 40
_SHOWN = 8  # a table of more rows is shown when it is asked for
_TITLES: dict[By, str] = {"denoiser": "Denoisers", "source": "Sources", "language": "Languages"}


@dataclasses.dataclass(frozen=True)
class _Group:
    """A denoiser, source or language and what became of it; losses in nats per target token."""

    name: str
    share: float | None
    targets: int | None
    training: float | None
    last: float | None
    averaged: float | None
    line: Points
    dots: Points


def task_sections(history: RunHistory) -> list[tuple[str, str]]:
    """Headings and HTML: denoisers, then sources and languages where there are several."""
    names = TaskNames.of(history)
    found = [(_TITLES[by], _section(history, names, by)) for by in names.kinds()]
    if len(found) > 1:
        found.append(("Sources and denoisers", _crossed(history, names)))
    return found


def _section(history: RunHistory, names: TaskNames, by: By) -> str:
    train = regrouped(history.train, names, by)
    last, mean = (
        regrouped([row for row in history.eval if row.get("weights") == weights], names, by)
        for weights in ("last", "averaged")
    )
    # The end of the run, but not the steep start of a short one.
    recent = train[-max(1, min(_RECENT, len(train) // 20)) :]
    rates = shares(history.fact("data_shares") or {}, names, by)
    targets = targets_of(train)
    groups = [
        _Group(
            name,
            rates.get(name),
            targets.get(name),
            mean_of(recent, name),
            mean_of(last[-1:], name),
            mean_of(mean[-1:], name),
            averaged(train, name, _SPARK_POINTS),
            [(float(row["step"]), loss) for row in last if (loss := mean_of([row], name))],
        )
        for name in dict.fromkeys([*rates, *inner_names([*train, *last, *mean], "by_task")])
    ]
    if not groups:
        return f'<p class="soft">No losses by {by} were recorded.</p>'
    largest = sorted(groups, key=lambda group: -(group.share or 0))[:_DRAWN]
    drawn = [group.name for group in (groups if by == "denoiser" else largest)]
    span = "the last record" if len(recent) <= 1 else f"mean of the last {len(recent)} records"
    notes = [f"Nats per target token. Training: {span}."]
    if len(drawn) < len(groups):
        notes.append(
            f"The chart shows the {len(drawn)} largest of {len(groups)}; the small curves, all on "
            "one scale, show all: training as a line, held-out as dots."
        )
    chart = report_charts.losses_by(by, drawn, train, last)
    return (
        f'<div class="middle">{chart}</div>{_table(history, by, groups, drawn)}'
        f'<p class="note">{" ".join(notes)}</p>'
    )


def _table(history: RunHistory, by: By, groups: list[_Group], drawn: list[str]) -> str:
    # The losses first: on a phone the columns behind them are out of sight.
    columns = {
        by: [group.name for group in groups],
        "training": [_loss(group.training) for group in groups],
        "held-out, last": [_loss(group.last) for group in groups],
        "held-out, averaged": [_loss(group.averaged) for group in groups],
        "over the run": _sparklines(groups, drawn),
        "share of data": [_percent(group.share) for group in groups],
        "target tokens": [_count(group.targets) for group in groups],
        **(_source_columns(history, groups) if by == "source" else {}),
    }
    words = (by, "over the run", "language")
    return table(
        list(columns),
        list(zip(*columns.values(), strict=True)),
        numbers=[i for i, head in enumerate(columns) if head not in words],
        markup=[list(columns).index("over the run")],
    )


def _source_columns(history: RunHistory, groups: list[_Group]) -> dict[str, list[str]]:
    """Facts of sources; a column that would say nothing is left out."""
    facts = {
        head: [(history.fact(name) or {}).get(group.name) for group in groups]
        for head, name in (
            ("language", "source_languages"),
            ("documents", "source_documents"),
            ("tokens in all", "source_tokens"),
            ("bad records", "source_bad_records"),
        )
    }
    return {
        head: [value if isinstance(value, str) else _count(value) for value in values]
        for head, values in facts.items()
        if any(values)
    }


def _sparklines(groups: list[_Group], drawn: list[str]) -> list[str]:
    """A small curve of each group, in its colour in the chart if it is drawn there."""
    values = [y for group in groups for _, y in (*group.line, *group.dots) if y > 0]
    if not values:
        return [""] * len(groups)
    low, high = math.log(min(values)), math.log(max(values))

    def logs(points: Points) -> Points:
        return [(x, math.log(y)) for x, y in points if y > 0]

    return [
        sparkline(
            logs(group.line),
            logs(group.dots),
            low,
            high,
            report_charts.colour(drawn.index(group.name)) if group.name in drawn else "soft",
            f"loss of {group.name} over the run",
        )
        for group in groups
    ]


def _crossed(history: RunHistory, names: TaskNames) -> str:
    """Held-out losses of all tasks, sources down and denoisers across."""
    best = [row for row in history.eval if isinstance(row.get("by_task"), dict)][-1:]
    losses: Row = best[0]["by_task"] if best else {}
    rows, columns = (
        list(dict.fromkeys(group for task in losses if (group := names.group(task, by))))
        for by in ("source", "denoiser")
    )
    if not rows:
        return '<p class="soft">No held-out losses were recorded.</p>'
    cells = {
        (names.group(task, "source"), names.group(task, "denoiser")): loss
        for task, loss in losses.items()
    }
    lines = [[row, *(_loss(cells.get((row, column))) for column in columns)] for row in rows]
    drawn = table(["source", *columns], lines, numbers=range(1, len(columns) + 1))
    said = f"Held-out loss of each task, {best[0].get('weights')} weights, step {best[0]['step']:,}"
    state = " open" if len(rows) <= _SHOWN else ""
    return f"<details{state}><summary>{escape(said)}</summary>{drawn}</details>"


def _loss(value: object) -> str:
    return f"{value:.3f}" if is_number(value) else "–"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _count(value: float | None) -> str:
    return "–" if value is None else compact(value)
