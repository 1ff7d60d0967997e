"""What a run's wall time went into, over all its starts, from what each of them recorded.

Records of a process say how it has spent its time so far. Work on steps that a later start, or a
rollback, did again is lost; what passed between the last record of a process and the next start is
idle, also where a killed process was still at work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape

from t5g2.reporting.metrics_log import RunHistory, Segment
from t5g2.reporting.numbers import clock, duration
from t5g2.reporting.page import clock_time, table

# Of a bar and of the table, in this order: the label, and the colour as a class of `report.css`.
KINDS: dict[str, tuple[str, str]] = {
    "step": ("steps", "train"),
    "data": ("waiting for data", "c0"),
    "save": ("saving", "c1"),
    "evaluation": ("evaluation", "c2"),
    "init": ("starting", "c5"),
    "compile": ("compiling", "c3"),
    "restore": ("restoring", "heldout"),
    "finish": ("results", "averaged"),
    "lost": ("lost and redone", "c4"),
    "idle": ("not running", "soft"),
}
# What is spent on steps, and in vain if they are done again.
_OF_STEPS = ("step", "data", "save", "evaluation")


@dataclasses.dataclass
class Attempt:
    """What one process of a run spent its time on.

    Attributes:
        began: in seconds since 1970.
        first: the step it started from.
        last: the last step that it recorded.
        seconds: by kind, see `KINDS`; "idle" is the time before it began.
    """

    began: float
    first: int
    last: int
    seconds: dict[str, float]


@dataclasses.dataclass
class _Stretch:
    """Time between two records of a process, in which it got from one step to another."""

    attempt: Attempt
    begin: int
    end: int
    seconds: dict[str, float]

    def lose(self, step: int) -> None:
        """Takes what comes behind a step for lost."""
        share = min((self.end - step) / max(self.end - self.begin, 1), 1.0)
        for kind in _OF_STEPS:
            lost = share * self.seconds.get(kind, 0.0)
            self.seconds[kind] = self.seconds.get(kind, 0.0) - lost
            self.attempt.seconds[kind] -= lost
            self.attempt.seconds["lost"] += lost
        self.end = min(self.end, step)


def attempts(history: RunHistory) -> list[Attempt]:
    """The processes of a run, and what each spent its time on; all of it sums to the wall time.

    Those that were recorded before records told of time are left out.
    """
    found: list[Attempt] = []
    stretches: list[_Stretch] = []
    until: float | None = None
    for segment in history.segments:
        if not segment.marks or not isinstance(segment.start.get("began"), int | float):
            continue
        attempt, own = _read(segment, stretches)
        if until is not None:
            attempt.seconds["idle"] = max(attempt.began - until, 0.0)
        stretches += own
        until = segment.marks[-1]["time"]
        found.append(attempt)
    return found


def _read(segment: Segment, earlier: Sequence[_Stretch]) -> tuple[Attempt, list[_Stretch]]:
    start = segment.start
    attempt = Attempt(start["began"], start["step"], segment.last_step, dict.fromkeys(KINDS, 0.0))
    own: list[_Stretch] = []
    at, before = start["step"], dict[str, float]()
    for mark in segment.marks:
        spent = {kind: seconds - before.get(kind, 0.0) for kind, seconds in mark["seconds"].items()}
        for kind, seconds in spent.items():
            attempt.seconds[kind] = attempt.seconds.get(kind, 0.0) + seconds
        step = mark["step"]
        # A rollback comes behind steps that nothing else was recorded of.
        end = at + 1 if mark["kind"] == "rollback" else max(at, step)
        own.append(_Stretch(attempt, at, end, spent))
        if mark["kind"] in ("start", "rollback"):
            for stretch in (*earlier, *own):
                if stretch.end > step:
                    stretch.lose(step)
        at, before = step, mark["seconds"]
    return attempt, own


def total(found: Sequence[Attempt]) -> dict[str, float]:
    """Seconds of all processes, by kind."""
    return {kind: sum(attempt.seconds.get(kind, 0.0) for attempt in found) for kind in KINDS}


def goodput_line(history: RunHistory) -> str:
    """The division in one line, for a terminal; "" if nothing is known of it."""
    found = attempts(history)
    seconds = total(found)
    whole = sum(seconds.values())
    if not whole:
        return ""
    shares = sorted(seconds.items(), key=lambda item: -item[1])
    parts = [f"{KINDS[kind][0]} {spent / whole:.1%}" for kind, spent in shares if spent > 0]
    starts = f" over {len(found)} starts" if len(found) > 1 else ""
    return f"{duration(whole)}{starts}: {', '.join(parts)}"


def goodput_section(history: RunHistory) -> str:
    """Bars, one for each start, and a table; HTML."""
    found = attempts(history)
    if not found:
        return '<p class="soft">None recorded.</p>'
    longest = max(sum(attempt.seconds.values()) for attempt in found) or 1.0
    seconds = total(found)
    present = [kind for kind in KINDS if seconds[kind] > 0]
    legend = "".join(
        f'<span><i class="dots {KINDS[kind][1]}"></i>{escape(KINDS[kind][0])}</span>'
        for kind in present
    )
    bars = "".join(_bar(attempt, longest) for attempt in found)
    heads = ["started", "steps", "wall time", *(KINDS[kind][0] for kind in present)]
    rows = [
        [clock_time(a.began), f"{a.first:,} to {a.last:,}", *_times(a.seconds, present)]
        for a in found
    ]
    if len(found) > 1:
        rows.append(["all", "", *_times(seconds, present)])
    shown = table(heads, rows, numbers=set(range(2, len(heads))))
    return (
        f'<div class="card"><div class="legend">{legend}</div>'
        f'<div class="shares">{bars}</div></div>{shown}'
    )


def _bar(attempt: Attempt, longest: float) -> str:
    parts = "".join(
        f'<span class="{KINDS[kind][1]}" style="width:{100 * spent / longest:.2f}%" '
        f'title="{escape(KINDS[kind][0])}: {duration(spent)}"></span>'
        for kind in KINDS
        if (spent := attempt.seconds.get(kind, 0.0)) > 0
    )
    said = f"start at step {attempt.first:,}: {duration(sum(attempt.seconds.values()))}"
    return f'<div role="img" aria-label="{escape(said)}">{parts}</div>'


def _times(seconds: Mapping[str, float], kinds: Sequence[str]) -> list[str]:
    return [clock(sum(seconds.values())), *(clock(seconds.get(kind, 0.0)) for kind in kinds)]
