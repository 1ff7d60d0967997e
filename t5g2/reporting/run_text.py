"""`t5g2 inspect run`: how runs stand, for a terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from t5g2.reporting import health
from t5g2.reporting.metrics_log import RunHistory
from t5g2.reporting.numbers import compact, duration, grouped
from t5g2.reporting.report import heldout_loss, is_complete
from t5g2.reporting.series import curve, inner_names, is_number
from t5g2.reporting.speed import Speed
from t5g2.reporting.task_losses import TaskNames, mean_of, regrouped

RECORDS = 1000  # train records that a summary looks at
_RECENT = 20
_EVENTS = 3


def summary(name: str, history: RunHistory, now: float) -> str:
    """A run in some ten lines.

    Args:
        name: What to call it.
        history: The run, thinned or whole.
        now: Seconds since 1970.
    """
    facts = {
        "loss": _loss(history),
        "held out": _heldout(history),
        "denoisers": _denoisers(history),
        "tokens": _tokens(history),
        "speed": Speed.of(history).text(),
        "time": _time(history),
        "model": _model(history),
    }
    lines = [f"{name}: {state(history, now)}"]
    lines += [f"  {label:10} {text}" for label, text in facts.items() if text]
    if events := history.events[-_EVENTS:]:
        left_out = len(history.events) - len(events)
        lines.append(
            "  events" + (f"     (the last of {len(history.events):,})" if left_out else "")
        )
        lines += [f"    step {row['step']:,}: {row.get('message')}" for row in events]
    found = health.findings(history, now)
    lines += ["", *(f"  ! {sentence}" for sentence in found)] if found else []
    if not found and history.train:
        lines += ["", "  nothing looks wrong"]
    return "\n".join(lines)


def state(history: RunHistory, now: float) -> str:
    """Where a run stands, in a few words."""
    total, step = history.fact("total_steps"), history.last_step
    if is_complete(history):
        return f"complete, {grouped(step)} steps"
    if not history.starts and not history.train:
        return "nothing recorded yet"
    done = f"step {grouped(step)}"
    if total:
        done += f" of {grouped(total)} ({step / total:.0%})"
    rows = [*history.train, *history.eval, *history.events, *history.starts]
    quiet = max(now - max(row["time"] for row in rows), 0.0)
    if health.stopped(history):
        word = "stopped at"
    else:
        word = "at" if health.silence(history, now) is None else "silent since"
    return f"{word} {done}, last record {duration(quiet)} ago"


def comparison(histories: Mapping[str, RunHistory], now: float) -> str:
    """Runs side by side, at the end of each and where the shortest one ends."""
    names = short_names(list(histories))
    runs = list(histories.values())
    common = common_tokens(runs)
    rows: dict[str, list[str]] = {
        "": names,
        "state": [state(run, now).partition(", last record")[0] for run in runs],
        "real tokens": [_or_dash(_last(run, "tokens"), compact) for run in runs],
        "training loss": [_or_dash(recent(run, "loss"), "{:.3f}".format) for run in runs],
    }
    if common:
        rows[f"... at {compact(common)} tokens"] = [
            _or_dash(loss_at(run, common), "{:.3f}".format) for run in runs
        ]
    rows |= {
        "held-out, last": [_or_dash(heldout_loss(run, "last"), "{:.3f}".format) for run in runs],
        "held-out, averaged": [
            _or_dash(heldout_loss(run, "averaged"), "{:.3f}".format) for run in runs
        ],
        "tokens a second": [_or_dash(Speed.of(run).tokens, compact) for run in runs],
        "MFU": [_or_dash(Speed.of(run).mfu, "{:.1%}".format) for run in runs],
        "parameters": [_or_dash(run.fact("parameters"), compact) for run in runs],
    }
    rows = {label: cells for label, cells in rows.items() if any(cell != "–" for cell in cells)}
    widths = [max(len(cells[i]) for cells in rows.values()) for i in range(len(names))]
    first = max(map(len, rows))
    lines = [
        f"{label:{first}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        for label, cells in rows.items()
    ]
    for name, run in zip(names, runs, strict=True):
        lines += [f"! {name}: {sentence}" for sentence in health.findings(run, now)]
    return "\n".join(lines)


def common_tokens(runs: Sequence[RunHistory]) -> float | None:
    """The tokens up to which all runs have come; None if one of them counts none."""
    ends = [_last(run, "tokens") for run in runs]
    known = [end for end in ends if end is not None]
    return min(known) if len(known) == len(ends) else None


def loss_at(history: RunHistory, tokens: float) -> float | None:
    """Mean training loss of the last records that lie before so many tokens."""
    rows = [row for row in history.train if is_number(t := row.get("tokens")) and t <= tokens]
    losses = [y for _, y in curve(rows[-_RECENT:], "loss").points]
    return statistics.fmean(losses) if losses else None


def recent(history: RunHistory, name: str) -> float | None:
    """Mean of a value over the last records."""
    values = [y for _, y in curve(history.train[-_RECENT:], name).points]
    return statistics.fmean(values) if values else None


def short_names(names: Sequence[str]) -> list[str]:
    """Without the directories that all of them share."""
    if len(names) < 2:
        return list(names)
    parts = [name.rstrip("/").split("/") for name in names]
    same = 0
    while all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    return ["/".join(p[same:]) for p in parts]


def _or_dash(value: object, form: object) -> str:
    return form(value) if is_number(value) and callable(form) else "–"


def _last(history: RunHistory, name: str) -> float | None:
    value = history.train[-1].get(name) if history.train else None
    return value if is_number(value) and math.isfinite(value) else None


def _loss(history: RunHistory) -> str:
    if not history.train:
        return ""
    now = recent(history, "loss")
    count = min(_RECENT, len(history.train))
    text = "not finite" if now is None else f"{now:.3f} nats/token (last {count} records)"
    earlier = curve(history.train[: len(history.train) // 2 + 1][-_RECENT:], "loss").points
    if len(history.train) >= 2 * _RECENT and earlier and now is not None:
        text += f", {statistics.fmean(y for _, y in earlier):.3f} half way"
    return text


def _heldout(history: RunHistory) -> str:
    parts = []
    for weights in ("last", "averaged"):
        rows = [row for row in history.eval if row.get("weights") == weights]
        if rows and is_number(loss := rows[-1].get("loss")):
            parts.append(f"{loss:.3f} ({weights} weights, step {rows[-1]['step']:,})")
    entropy = history.fact("unigram_entropy")
    if parts and is_number(entropy):
        parts.append(f"unigram entropy {entropy:.3f}")
    return "; ".join(parts)


def _denoisers(history: RunHistory) -> str:
    rows = regrouped(history.train[-_RECENT:], TaskNames.of(history), "denoiser")
    losses = {name: mean_of(rows, name) for name in inner_names(rows, "by_task")}
    return "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items() if loss is not None)


def _tokens(history: RunHistory) -> str:
    if (tokens := _last(history, "tokens")) is None:
        return ""
    fills = [
        f"{side} {100 * share:.1f} % full"
        for side in ("inputs", "targets")
        if (share := recent(history, f"fill_{side}")) is not None
    ]
    return ", ".join([f"{compact(tokens)} real ones", *fills])


def _time(history: RunHistory) -> str:
    spent = sum(segment.seconds for segment in history.segments)
    text = duration(spent)
    if len(history.segments) > 1:
        text += f" over {len(history.segments)} starts"
    total, seconds = history.fact("total_steps"), recent(history, "step_seconds")
    if total and seconds and not is_complete(history):
        left = (total - history.last_step) * seconds
        text += f"; about {duration(left)} of steps to go"
    if (waited := health.waiting(history)) is not None:
        text += f"; {waited:.1%} of it lately waiting for data"
    return text


def _model(history: RunHistory) -> str:
    parameters, devices = history.fact("parameters"), history.fact("devices")
    parts = [f"{compact(parameters)} parameters"] if is_number(parameters) else []
    return ", ".join([*parts, *([str(devices)] if devices else [])])
