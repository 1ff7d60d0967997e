"""Runs beside each other on one page, aligned by the real tokens that they have seen."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from t5g2.reporting import health, report_charts
from t5g2.reporting.charts import Chart, Series, draw
from t5g2.reporting.metrics_log import Row, RunHistory, placed_by_tokens, read_metrics
from t5g2.reporting.numbers import compact, grouped
from t5g2.reporting.page import page, table
from t5g2.reporting.report import heldout_loss
from t5g2.reporting.run_text import common_tokens, loss_at, recent, short_names, state
from t5g2.reporting.series import Curve, curve, inner_names, is_number, smooth
from t5g2.reporting.speed import Speed
from t5g2.reporting.task_losses import TaskNames, regrouped

_AXIS = "real tokens"


def compare_page(run_dirs: Sequence[Path]) -> str:
    """The page as HTML.

    Raises:
        UserError: one of the directories holds no metrics.
    """
    names = short_names([str(path) for path in run_dirs])
    runs = dict(zip(names, map(read_metrics, run_dirs), strict=True))
    now = time.time()
    sections = [
        ("", _table(runs, now)),
        ("", f'<div class="large spaced">{_losses(runs)}</div>'),
        ("Held-out loss by denoiser", f'<div class="pair">{_by_denoiser(runs)}</div>'),
        ("Course", f'<div class="pair">{_course(runs)}</div>'),
        ("Settings that differ", _settings(dict(zip(names, run_dirs, strict=True)))),
    ]
    found = [
        f'<p class="warning">{escape(name)}: {escape(sentence)}</p>'
        for name, run in runs.items()
        for sentence in health.findings(run, now)
    ]
    title = " · ".join(map(escape, runs))
    header = f"<h1>{title}</h1>{''.join(found)}"
    return page(title, header, sections, "from the files of the run directories")


def _table(runs: Mapping[str, RunHistory], now: float) -> str:
    common = common_tokens(list(runs.values()))
    columns = {
        "run": list(runs),
        "state": [state(run, now).partition(", last record")[0] for run in runs.values()],
        "training loss": [_loss(recent(run, "loss")) for run in runs.values()],
        **(
            {f"at {compact(common)} tokens": [_loss(loss_at(run, common)) for run in runs.values()]}
            if common
            else {}
        ),
        "held-out, last": [_loss(heldout_loss(run, "last")) for run in runs.values()],
        "held-out, averaged": [_loss(heldout_loss(run, "averaged")) for run in runs.values()],
        "tokens/s": [_count(Speed.of(run).tokens) for run in runs.values()],
        "parameters": [_count(run.fact("parameters")) for run in runs.values()],
    }
    rows = list(zip(*columns.values(), strict=True))
    return table(list(columns), rows, numbers=range(2, len(columns)))


def _losses(runs: Mapping[str, RunHistory]) -> str:
    series = []
    for index, (name, run) in enumerate(runs.items()):
        train = curve(run.train, "loss", x="tokens")
        series.append(_line(name, Curve(smooth(train.points), train.bad), index))
    for index, (name, run) in enumerate(runs.items()):
        held = [row for row in placed_by_tokens(run) if row.get("weights") == "last"]
        measured = curve(held, "loss", x="tokens")
        series.append(_line(f"{name}, held-out", measured, index, dots=True, in_legend=False))
    unit = "nats per target token, logarithmic; line: training, smoothed; dots: held-out"
    return draw(
        Chart(title="Loss", unit=unit, series=series, logarithmic=True, axis=_AXIS),
    )


def _by_denoiser(runs: Mapping[str, RunHistory]) -> str:
    held: dict[str, list[Row]] = {}
    for name, run in runs.items():
        rows = [row for row in placed_by_tokens(run) if row.get("weights") == "last"]
        held[name] = regrouped(rows, TaskNames.of(run), "denoiser")
    denoisers = dict.fromkeys(
        denoiser for rows in held.values() for denoiser in inner_names(rows, "by_task")
    )
    charts = [
        draw(
            Chart(
                title=denoiser,
                unit="nats per target token, logarithmic",
                series=[
                    _line(name, curve(rows, "by_task", inner=denoiser, x="tokens"), i, dots=True)
                    for i, (name, rows) in enumerate(held.items())
                ],
                logarithmic=True,
                axis=_AXIS,
            )
        )
        for denoiser in denoisers
    ]
    return "".join(charts) or '<p class="soft">None recorded.</p>'


def _course(runs: Mapping[str, RunHistory]) -> str:
    charts = []
    for title, unit, name, logarithmic in (
        ("Gradient norm", "before clipping, smoothed, logarithmic", "grad_norm", True),
        ("Learning rate", "", "learning_rate", False),
        ("Throughput", "real tokens a second, smoothed", "tokens_per_second", False),
    ):
        series = []
        for index, (run_name, run) in enumerate(runs.items()):
            full = curve(run.train, name, x="tokens")
            shown = full if name == "learning_rate" else Curve(smooth(full.points), full.bad)
            series.append(_line(run_name, shown, index))
        charts.append(
            draw(
                Chart(
                    title=title,
                    unit=unit,
                    series=series,
                    form="scientific" if name == "learning_rate" else "compact",
                    logarithmic=logarithmic,
                    from_zero=not logarithmic,
                    axis=_AXIS,
                )
            )
        )
    return "".join(charts)


def _line(
    name: str, values: Curve, index: int, *, dots: bool = False, in_legend: bool = True
) -> Series:
    return Series(
        name=name,
        curve=values,
        colour=report_charts.colour(index),
        look="dots" if dots else "line",
        dashed=index >= report_charts.COLOURS,
        in_legend=in_legend,
    )


def _settings(run_dirs: Mapping[str, Path]) -> str:
    found: dict[str, dict[str, str]] = {}
    for name, run_dir in run_dirs.items():
        path = run_dir / "config.gin"
        lines = path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else []
        for line in lines:
            setting, equals, value = line.partition(" = ")
            if equals:
                found.setdefault(setting, {})[name] = value
    rows = [
        [setting, *(values.get(name, "–") for name in run_dirs)]
        for setting, values in sorted(found.items())
        if len({values.get(name) for name in run_dirs}) > 1
    ]
    if not rows:
        return f'<p class="soft">None of {grouped(len(found))}.</p>'
    return table(["setting", *run_dirs], rows)


def _loss(value: object) -> str:
    return f"{value:.3f}" if is_number(value) else "–"


def _count(value: object) -> str:
    return compact(value) if is_number(value) else "–"
