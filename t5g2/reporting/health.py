"""What looks wrong with a run, in words: small rules over its records, each with its threshold.

A rule that lacks what it needs (too few records, a value that the run did not log) says nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5g2.reporting.metrics_log import Row, RunHistory
from t5g2.reporting.numbers import duration
from t5g2.reporting.series import curve, inner_names, is_number
from t5g2.reporting.task_losses import TaskNames, mean_of, regrouped

# A loss is flat if it surely fell by less than this share over the last quarter of the records ...
FLAT_FALL = 0.005
# ... while the learning rate was still above this share of its peak; a decayed one flattens it.
FLAT_RATE = 0.2
# A denoiser or a held-out loss that is this share above its own best, while training is not.
DIVERGED = 0.10
HELDOUT_RISE = 0.02
# The share of time that the devices may wait for batches.
WAITING = 0.10
# The share of records whose gradient may be clipped, beyond the first half of the run.
CLIPPED = 0.95
# The share of a batch that must be real tokens.
FILLED = 0.75
# So many starts in a row from one step are a loop.
STARTS = 3
# A run is silent if nothing came for so many times the usual distance of two records, and for
# this long at least: an evaluation or a checkpoint may stand between them.
SILENT_RECORDS, SILENT_SECONDS = 20, 300.0
# Rules about the course of a run want so many records.
RECORDS = 40


def findings(history: RunHistory, now: float) -> list[str]:
    """A sentence about each thing that looks wrong; none if nothing does.

    Args:
        history: The run, thinned or whole.
        now: Seconds since 1970.
    """
    found = [_silent(history, now), *(rule(history) for rule in RULES)]
    return [sentence for sentence in found if sentence is not None]


def silence(history: RunHistory, now: float) -> float | None:
    """Seconds since the last record of a run that should be writing more, if they are too many."""
    times = [row["time"] for row in (history.train or history.starts)[-RECORDS:]]
    if not times or history.summary is not None or stopped(history):
        return None
    usual = (times[-1] - times[0]) / max(len(times) - 1, 1)
    quiet = now - max(times[-1:] + [row["time"] for row in (*history.eval, *history.starts)])
    return quiet if quiet > max(SILENT_RECORDS * usual, SILENT_SECONDS) else None


def stopped(history: RunHistory) -> bool:
    """Whether the newest process ended of itself: it was asked to stop, or `train.stop_at`."""
    marks = history.segments[-1].marks if history.segments else ()
    if marks and marks[-1]["kind"] == "end":
        return True
    last = history.events[-1] if history.events else None
    newest = history.starts[-1]["time"] if history.starts else 0.0
    return (
        last is not None
        and last["time"] >= newest
        and str(last.get("message")).startswith("stopped by ")
    )


def _silent(history: RunHistory, now: float) -> str | None:
    quiet = silence(history, now)
    if quiet is None:
        return None
    return f"silent: no record for {duration(quiet)}; it was stopped, was killed, or hangs"


def not_finite(history: RunHistory) -> str | None:
    """The newest loss is NaN or infinite."""
    losses = curve(history.train, "loss")
    if not losses.bad or losses.bad[-1] != history.last_step:
        return None
    last_good = losses.points[-1][0] if losses.points else 0
    first = next(step for step in losses.bad if step > last_good)
    return f"loss not finite: since step {first:,.0f} at the latest"


def loss_flat(history: RunHistory) -> str | None:
    """The training loss stands still though the learning rate is high."""
    losses = [y for _, y in curve(history.train, "loss").points]
    rates = [y for _, y in curve(history.train, "learning_rate").points]
    if len(losses) < RECORDS or not rates or rates[-1] < FLAT_RATE * max(rates):
        return None
    before, after = losses[len(losses) // 2 : 3 * len(losses) // 4], losses[3 * len(losses) // 4 :]
    fall = statistics.fmean(before) - statistics.fmean(after)
    error = math.sqrt(sum(statistics.variance(part) / len(part) for part in (before, after)))
    if fall + 2 * error >= FLAT_FALL * statistics.fmean(before):
        return None
    return (
        f"loss flat: {statistics.fmean(before):.3f}, then {statistics.fmean(after):.3f} nats/token "
        f"over the last two quarters of the records, at {rates[-1] / max(rates):.0%} of the peak "
        "learning rate"
    )


def data_starved(history: RunHistory) -> str | None:
    """The devices wait for batches."""
    if (waited := waiting(history)) is None or waited <= WAITING:
        return None
    return (
        f"data starved: {waited:.0%} of the time the devices wait for batches (more than "
        f"{WAITING:.0%}); raise data.workers, or cache the documents"
    )


def waiting(history: RunHistory) -> float | None:
    """Share of the recent training time that went into waiting for data; None: not recorded."""
    start = history.starts[-1]["time"] if history.starts else 0
    rows = [
        row["seconds"]
        for row in history.train[-RECORDS:]
        if row["time"] >= start and isinstance(row.get("seconds"), Mapping)
    ]
    if len(rows) < 2:
        return None
    data, step = (rows[-1].get(phase, 0) - rows[0].get(phase, 0) for phase in ("data", "step"))
    return data / (data + step) if data + step > 0 else None


def always_clipped(history: RunHistory) -> str | None:
    """Clipping is the rule, so that it and not the schedule sets the size of the updates."""
    limit = history.fact("clip_norm")
    norms = [y for _, y in curve(history.train, "grad_norm").points]
    norms = norms[len(norms) // 2 :]
    if not is_number(limit) or len(norms) < RECORDS // 2:
        return None
    share = sum(norm > limit for norm in norms) / len(norms)
    if share < CLIPPED:
        return None
    half = history.train[len(history.train) // 2]["step"]
    return (
        f"gradient clipped always: in {share:.0%} of the records since step {half:,} its norm, "
        f"{statistics.median(norms):.3g} in the median, is above optimizer.clip_norm = {limit:g}"
    )


def denoiser_diverging(history: RunHistory) -> str | None:
    """One denoiser's training loss rises above its own best while all together do not."""
    rows = regrouped(history.train, TaskNames.of(history), "denoiser")
    names = inner_names(rows, "by_task")
    if len(rows) < RECORDS or len(names) < 2:
        return None
    tenths = [rows[len(rows) * i // 10 : len(rows) * (i + 1) // 10] for i in range(10)]
    whole = _above_best([_mean(part) for part in tenths])
    rises = {name: _above_best([mean_of(part, name) for part in tenths]) for name in names}
    worst = max(names, key=lambda name: rises[name])
    if rises[worst] <= DIVERGED or whole > rises[worst] / 2:
        return None
    return (
        f"{worst} diverging: its loss is {rises[worst]:.0%} above its best, that of all denoisers "
        f"{whole:.0%}"
    )


def _mean(rows: Sequence[Row]) -> float | None:
    losses = [y for _, y in curve(rows, "loss").points]
    return statistics.fmean(losses) if losses else None


def _above_best(means: Sequence[float | None]) -> float:
    """By what share the last of some means is above the lowest."""
    known = [mean for mean in means if mean is not None and mean > 0]
    return known[-1] / min(known) - 1 if known else 0.0


def heldout_rising(history: RunHistory) -> str | None:
    """Held-out loss rises while training loss falls: the run repeats its data too often."""
    held = [row for row in history.eval if row.get("weights") == "last"]
    losses = curve([row for row in held if row.get("split") == "heldout"], "loss").points
    if len(losses) < 4 or len(history.train) < RECORDS:
        return None
    best_step, best = min(losses, key=lambda point: point[1])
    rise = min(losses[-1][1], losses[-2][1]) / best - 1
    quarters = (history.train[len(history.train) // 2 :], history.train[-len(history.train) // 4 :])
    earlier, later = map(_mean, quarters)
    if rise <= HELDOUT_RISE or earlier is None or later is None or later >= earlier:
        return None
    return (
        f"held-out loss rising: {rise:.1%} above its best ({best:.3f} at step {best_step:,.0f}) "
        "while the training loss falls; the data may be repeated too often"
    )


def badly_filled(history: RunHistory) -> str | None:
    """Much of a batch is padding."""
    for side, name in (("inputs", "fill_inputs"), ("targets", "fill_targets")):
        fills = [y for _, y in curve(history.train[-RECORDS:], name).points]
        if fills and statistics.fmean(fills) < FILLED:
            return (
                f"padding: only {statistics.fmean(fills):.0%} of the places for {side} hold tokens "
                f"(less than {FILLED:.0%}); change data.{side}_length"
            )
    return None


def restarts_looping(history: RunHistory) -> str | None:
    """Process after process starts at the same step and dies before the next checkpoint."""
    steps = [start["step"] for start in history.starts]
    last = steps[-1:] * STARTS
    if len(steps) < STARTS or steps[-STARTS:] != last or _advanced(history):
        return None
    count = len(steps) - max((i + 1 for i, step in enumerate(steps) if step != last[0]), default=0)
    return (
        f"restarts looping: the last {count} starts were all from step {last[0]:,}; look at the "
        "end of the log, or save more often (checkpoints.every)"
    )


def _advanced(history: RunHistory) -> bool:
    """Whether the newest process got further than those before it, or to the end."""
    *before, newest = history.segments
    reached = max(segment.last_step for segment in before[-(STARTS - 1) :])
    return history.summary is not None or newest.last_step > reached


Rule = Callable[[RunHistory], Any]
RULES: tuple[Rule, ...] = (
    not_finite,
    loss_flat,
    data_starved,
    always_clipped,
    denoiser_diverging,
    heldout_rising,
    badly_filled,
    restarts_looping,
)
