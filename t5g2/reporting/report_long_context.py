"""The report's section on long contexts: what `t5g2 long_context` measured in a run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from t5g2.reporting import report_charts
from t5g2.reporting.charts import Chart, Series, draw
from t5g2.reporting.numbers import grouped
from t5g2.reporting.page import table
from t5g2.reporting.series import Curve, is_number

FILE_NAME = "long_context.json"


def long_context_section(run_dir: Path) -> str:
    """A chart for each measurement, newest first; "" if there is none."""
    paths = [*run_dir.glob(FILE_NAME), *run_dir.glob(f"*/{FILE_NAME}")]
    paths += run_dir.glob(f"*/*/{FILE_NAME}")
    newest = sorted(paths, key=lambda path: -path.stat().st_mtime)
    return "".join(_measurement(path, str(path.parent.relative_to(run_dir))) for path in newest)


def _measurement(path: Path, name: str) -> str:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        return f'<p class="warning">{escape(name)}: {escape(str(error))}</p>'
    points = content.get("curves") if isinstance(content, Mapping) else None
    by_family: dict[str, dict[float, Mapping[str, Any]]] = {}
    for point in points if isinstance(points, list) else []:
        if isinstance(point, Mapping) and is_number(point.get("length")):
            by_family.setdefault(str(point.get("family")), {})[point["length"]] = point
    if not by_family:
        return f'<p class="warning">{escape(name)}/{FILE_NAME} holds no curves.</p>'
    series = []
    for index, (family, measured) in enumerate(by_family.items()):
        values = [
            (float(length), float(measured[length]["score"]))
            for length in sorted(measured)
            if is_number(measured[length].get("score"))
        ]
        series.append(
            Series(
                name=family,
                curve=Curve(values, []),
                colour=report_charts.colour(index),
                look="dots",
                dashed=index >= report_charts.COLOURS,
            )
        )
    about = [str(content.get("checkpoint", "")), f"form: {content.get('form')}"]
    if is_number(factor := content.get("rope_factor_global")):
        about.append(f"global positions divided by {factor:g}")
    rows = [
        [
            family,
            grouped(round(length)),
            *(_percent(point.get(name)) for name in ("score", "low", "high")),
            _or_dash(point.get("log_likelihood")),
            str(point.get("examples", "–")),
        ]
        for family, measured in by_family.items()
        for length, point in sorted(measured.items())
    ]
    heads = ["family", "length", "score", "95 % from", "to", "nats/token of the answer", "examples"]
    shown = table(heads, rows, numbers=range(1, len(heads)))
    chart = draw(
        Chart(
            title=f"Score by length ({name})",
            unit=", ".join(part for part in about if part),
            series=series,
            form="percent",
            from_zero=True,
            axis="tokens of the prompt",
        )
    )
    summary = f"<summary>{len(rows)} points</summary>"
    return f'<div class="middle">{chart}</div><details>{summary}{shown}</details>'


def _percent(value: object) -> str:
    return f"{value:.1%}" if is_number(value) else "–"


def _or_dash(value: object) -> str:
    return f"{value:.3f}" if is_number(value) else "–"
