"""`report.html`: one page, without network or other files, that says what a run reached."""

from __future__ import annotations

import math
import os
import statistics
from html import escape
from pathlib import Path
from typing import Any

from t5g2.errors import UserError
from t5g2.files import to_path, write_atomically
from t5g2.reporting import health, report_charts
from t5g2.reporting.goodput import goodput_section
from t5g2.reporting.metrics_log import FILE_NAME, RunHistory, has_metrics, read_metrics
from t5g2.reporting.numbers import compact, duration, grouped
from t5g2.reporting.page import clock_time, page, table
from t5g2.reporting.report_held_out import held_out_sections
from t5g2.reporting.report_long_context import long_context_section
from t5g2.reporting.report_tasks import task_sections
from t5g2.reporting.samples import over_time_html, samples_html
from t5g2.reporting.series import curve
from t5g2.reporting.speed import Speed

# What `_warnings` has said already.
_TOLD = (health.not_finite,)
_EVENTS_SHOWN = 300
_CONFIG_CHARACTERS = 200_000


def write_report(
    run_dir: str | os.PathLike[str], path: str | os.PathLike[str] | None = None
) -> Path:
    """Writes the report of a run from the files in its directory.

    Uses `metrics.jsonl`, `config.gin` and `samples.json`, as far as they are there: an unfinished
    or empty run has a report too.

    Args:
        run_dir: The run directory.
        path: The page to write, replaced in one move; `<run_dir>/report.html` by default.

    Returns:
        The path of the page.

    Raises:
        UserError: If there is no such run directory.
    """
    run_dir = to_path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")
    history = read_metrics(run_dir) if has_metrics(run_dir) else RunHistory()
    path = to_path(path) if path is not None else run_dir / "report.html"
    write_atomically(path, _page(run_dir, history))
    return path


def is_complete(history: RunHistory) -> bool:
    """Whether the run came to its end: a summary, and no training step missing before it."""
    total = history.fact("total_steps")
    return history.summary is not None and (total is None or history.summary["step"] >= total)


def headline(history: RunHistory) -> str:
    """What the run reached, in a few sentences of plain text."""
    if not history.train and not history.eval:
        return "Nothing has been recorded yet."
    total, step = history.fact("total_steps"), history.last_step
    tokens = history.train[-1].get("tokens") if history.train else None
    if is_complete(history):
        done = f"Complete: {grouped(step)} steps"
    elif total:
        done = (
            f"Not complete: {grouped(step)} of {grouped(total)} steps ({100 * step / total:.0f} %)"
        )
    else:
        done = f"{grouped(step)} steps so far"
    if tokens is not None:
        done += f" on {compact(tokens)} real tokens"
    if seconds := _wall_seconds(history):
        done += f" in {duration(seconds)}"
        if len(history.segments) > 1:
            done += f" over {len(history.segments)} starts"
    sentences = [done]

    last, averaged = heldout_loss(history, "last"), heldout_loss(history, "averaged")
    best = averaged if averaged is not None else last
    if best is not None:
        whose = "averaged weights" if averaged is not None else "latest weights"
        text = f"The {whose} predict held-out text at {best:.3f} nats per target token"
        if best < 50:
            text += f" (perplexity {math.exp(best):.3g})"
        entropy = history.fact("unigram_entropy")
        if isinstance(entropy, int | float):
            side = "below" if best < entropy else "above"
            text += f", {abs(entropy - best):.2f} {side} the corpus's unigram entropy {entropy:.2f}"
        if averaged is not None and last is not None:
            text += f"; the last weights reach {last:.3f}"
        sentences.append(text)
    elif history.train and isinstance(loss := history.train[-1].get("loss"), int | float):
        sentences.append(f"Training loss at the end: {loss:.3f} nats per target token")
    if speed := _speed(history):
        sentences.append(f"Median throughput: {compact(speed)} real tokens a second")
    return ". ".join(sentences) + "."


def heldout_loss(history: RunHistory, weights: str) -> float | None:
    """The latest held-out loss with these weights, "last" or "averaged", in nats a token."""
    rows = [row for row in history.eval if row.get("weights") == weights]
    stated = (history.summary or {}).get(f"heldout_loss_{weights}")
    value = stated if stated is not None else rows[-1].get("loss") if rows else None
    return value if isinstance(value, int | float) else None


def _page(run_dir: Path, history: RunHistory) -> str:
    name = escape(run_dir.resolve().name)
    badge = ("done", "complete") if is_complete(history) else ("open", "not complete")
    over_time, long_context = over_time_html(run_dir), long_context_section(run_dir)
    sections = [
        ("", _tiles(history)),
        ("", f'<div class="large">{report_charts.loss(history)}</div>'),
        *task_sections(history),
        *held_out_sections(history),
        ("Infillings of held-out text", samples_html(run_dir)),
        *([("Infillings over the run", over_time)] if over_time else []),
        *([("Long contexts", long_context)] if long_context else []),
        ("Optimisation", f'<div class="pair">{_optimisation(history)}</div>'),
        ("Throughput and packing", f'<div class="pair">{report_charts.throughput(history)}</div>'),
        ("Facts", _facts(history)),
        ("Starts", _starts(history)),
        ("Where the time went", goodput_section(history)),
        ("Events", _events(history)),
        ("Configuration", _configuration(run_dir)),
    ]
    header = (
        f'<h1>{name} <span class="badge {badge[0]}">{badge[1]}</span></h1>'
        f'<p class="headline">{escape(headline(history))}</p>{_warnings(history)}'
    )
    return page(name, header, sections, "from the files of the run directory")


def _optimisation(history: RunHistory) -> str:
    return report_charts.optimisation(history) + report_charts.norms(history)


def _warnings(history: RunHistory) -> str:
    found = []
    if bad := curve(history.train, "loss").bad:
        found.append(
            f"{len(bad):,} training {'record has' if len(bad) == 1 else 'records have'} a loss "
            f"that is not finite; the first at step {bad[0]:,.0f}."
        )
    if lines := history.unreadable_lines:
        numbers = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
        found.append(
            f"{len(lines):,} {'line' if len(lines) == 1 else 'lines'} of {FILE_NAME} could not "
            f"be read and {'is' if len(lines) == 1 else 'are'} left out: {numbers}."
        )
    # A report outlives its run: silence says nothing here.
    found += [said for rule in health.RULES if (said := rule(history)) and rule not in _TOLD]
    return "".join(f'<p class="warning">{escape(text)}</p>' for text in found)


def _tiles(history: RunHistory) -> str:
    tokens = history.train[-1].get("tokens") if history.train else None
    pairs = [
        ("held-out loss, averaged weights (nats/token)", heldout_loss(history, "averaged"), ".3f"),
        ("held-out loss, last weights (nats/token)", heldout_loss(history, "last"), ".3f"),
        ("unigram entropy (nats/token)", history.fact("unigram_entropy"), ".3f"),
        ("real tokens, encoder + decoder", tokens, ""),
        ("real tokens a second (median)", _speed(history), ""),
        ("MFU (median)", Speed.of(history).mfu, ".1%"),
        ("parameters", history.fact("parameters"), ""),
    ]
    tiles = [
        f'<div class="tile"><b>{format(value, form) if form else compact(value)}</b>'
        f"<span>{label}</span></div>"
        for label, value, form in pairs
        if isinstance(value, int | float)
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _facts(history: RunHistory) -> str:
    corpus = history.fact("corpus") or {}
    versions = history.fact("versions") or {}
    averaged = history.fact("checkpoints_averaged") or []
    labels = {"heldout_documents": "held-out documents"}
    pairs: list[tuple[str, Any]] = [
        (f"corpus, {labels.get(name, name)}", grouped(value) if isinstance(value, int) else value)
        for name, value in corpus.items()
    ]
    pairs += [
        (label, grouped(value) if isinstance(value := history.fact(name), int) else value)
        for label, name in (
            ("parameters", "parameters"),
            ("devices", "devices"),
            ("attention", "attention"),
            ("export", "export"),
            ("configuration hash", "config_hash"),
        )
    ]
    if speed := Speed.of(history).text():
        pairs.append(("speed", speed))
    for label, name in (("mesh", "mesh"), ("batch", "batch")):
        if isinstance(sizes := history.fact(name), dict):
            pairs.append((label, ", ".join(f"{axis} {size}" for axis, size in sizes.items())))
    pairs.append(("checkpoints averaged", ", ".join(f"step {step}" for step in averaged)))
    pairs.append(("versions", ", ".join(f"{name} {value}" for name, value in versions.items())))
    if history.superseded:
        pairs.append(("records superseded by a resume", grouped(history.superseded)))
    shown = "".join(
        f"<dt>{escape(label)}</dt><dd>{escape(str(value))}</dd>"
        for label, value in pairs
        if value not in (None, "")
    )
    return f'<div class="card"><dl>{shown or "<dt>none recorded yet</dt>"}</dl></div>'


def _starts(history: RunHistory) -> str:
    rows = [
        [
            clock_time(segment.start["time"]),
            grouped(segment.start["step"]),
            grouped(segment.last_step),
            duration(segment.seconds),
            str(segment.start.get("devices", "–")),
        ]
        for segment in history.segments
    ]
    heads = ["started", "from step", "to step", "recorded time", "devices"]
    return table(heads, rows, numbers={1, 2, 3}) if rows else '<p class="soft">None recorded.</p>'


def _events(history: RunHistory) -> str:
    events = history.events[-_EVENTS_SHOWN:]
    rows = [
        [
            clock_time(row["time"]),
            grouped(row["step"]),
            str(row.get("level")),
            str(row.get("message")),
        ]
        for row in events
    ]
    if not rows:
        return '<p class="soft">None recorded.</p>'
    shown = table(["time", "step", "level", "message"], rows, numbers={1})
    if len(history.events) > len(events):
        shown += (
            f'<p class="note">The last {len(events)} of {len(history.events):,}; all are in '
            f"{FILE_NAME}.</p>"
        )
    return shown


def _configuration(run_dir: Path) -> str:
    try:
        text = (run_dir / "config.gin").read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return '<p class="soft">There is no config.gin in the run directory.</p>'
    lines = text.count("\n") + 1
    left_out = len(text) - _CONFIG_CHARACTERS
    more = f"\n... {left_out:,} more characters in config.gin" if left_out > 0 else ""
    return (
        f'<details class="card"><summary>config.gin, {lines} lines</summary>'
        f"<pre>{escape(text[:_CONFIG_CHARACTERS] + more)}</pre></details>"
    )


def _wall_seconds(history: RunHistory) -> float:
    """The run's working time: as stated if one process did it all, else the sum over its starts."""
    stated = (history.summary or {}).get("wall_seconds")
    if isinstance(stated, int | float) and len(history.segments) <= 1:
        return stated
    return sum(segment.seconds for segment in history.segments)


def _speed(history: RunHistory) -> float | None:
    points = curve(history.train, "tokens_per_second").points
    return statistics.median(y for _, y in points) if points else None
