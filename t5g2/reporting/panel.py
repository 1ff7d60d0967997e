"""The live panel of a run on a terminal, made of what the run last recorded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from t5g2.reporting.numbers import clock, compact, duration, grouped, scientific
from t5g2.reporting.series import is_number

if TYPE_CHECKING:
    from rich.console import RenderableType

NARROWEST = 64  # columns that the panel needs
_TREND = 24  # records that the little curve of the loss shows
_LEVELS = "▁▂▃▄▅▆▇█"


@dataclasses.dataclass
class View:
    """What the panel shows.

    Attributes:
        unit: what is counted.
        total: the last step.
        step: the newest one.
        values: of its record.
        losses: of the newest records, the oldest first.
        waited: share of the newest steps' time in which the devices waited for data; None: unknown.
        periods: what happens every so many steps: {"save": 500}.
        event: the newest message, and when (`time.monotonic`).
    """

    unit: str
    total: int
    step: int = 0
    values: Mapping[str, object] = dataclasses.field(default_factory=dict)
    losses: list[float] = dataclasses.field(default_factory=list)
    waited: float | None = None
    periods: Mapping[str, int] = dataclasses.field(default_factory=dict)
    event: tuple[str, float] | None = None

    def take(self, step: int, values: Mapping[str, object]) -> None:
        """Takes a record."""
        before, now = (v.get("seconds") for v in (self.values, values))
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            data, steps = (now.get(p, 0.0) - before.get(p, 0.0) for p in ("data", "step"))
            self.waited = data / (data + steps) if data + steps > 0 else None
        loss = values.get("loss")
        if is_number(loss):
            self.losses = [*self.losses, loss][-_TREND:]
        self.step, self.values = step, values


def lines(view: View, now: float) -> list[tuple[str, str]]:
    """Labels and texts below the bar; only what is known."""
    shown = view.values

    def text(name: str, form: str) -> list[str]:
        value = shown.get(name)
        return [form.format(value)] if is_number(value) else []

    rate = shown.get("model_flops_per_second")
    speed = shown.get("tokens_per_second")
    learning_rate = shown.get("learning_rate")
    loss = [
        *text("loss", "{:.3f}"),
        *([trend(view.losses)] if len(view.losses) > 1 else []),
        *text("grad_norm", "grad {:.2f}"),
        *([f"lr {scientific(learning_rate)}"] if is_number(learning_rate) else []),
    ]
    fast = [
        *([f"{compact(speed)} tok/s"] if is_number(speed) else []),
        *text("step_seconds", "{:.3g} s/step"),
        *([f"{compact(rate)}FLOP/s"] if is_number(rate) else []),
        *text("mfu", "MFU {:.1%}"),
        *([f"waits for data {view.waited:.1%}"] if view.waited is not None else []),
    ]
    seconds = shown.get("step_seconds")
    coming = []
    for what, every in view.periods.items():
        at = min(view.step - view.step % every + every, view.total)
        soon = f" in {clock((at - view.step) * seconds)}" if is_number(seconds) else ""
        coming.append(f"{what} at {grouped(at)}{soon}")
    event = []
    if view.event is not None:
        event = [f"{duration(now - view.event[1])} ago: {view.event[0]}"]
    found = {"loss": loss, "speed": fast, "next": coming, "last": event}
    return [(label, "   ".join(parts)) for label, parts in found.items() if parts]


def trend(losses: Sequence[float]) -> str:
    """A curve of one line, from the lowest to the highest of the values."""
    known = [loss for loss in losses if math.isfinite(loss)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    unit = (high - low) / (len(_LEVELS) - 1) or 1.0
    return "".join(
        _LEVELS[round((loss - low) / unit)] if math.isfinite(loss) else "!" for loss in losses
    )


def panel(view: View, times: str, now: float, width: int) -> RenderableType:
    """The panel, of at most so many columns, at least `NARROWEST`."""
    from rich.box import ROUNDED
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    width = min(width, 110)
    inner = width - 4
    head = Table.grid(padding=(0, 2, 0, 0))
    done = f"{view.step / max(view.total, 1):.0%}"
    bar = ProgressBar(
        total=max(view.total, 1),
        completed=view.step,
        width=max(10, inner - len(done) - len(times) - 6),
    )
    head.add_row(bar, Text(done), Text(times, no_wrap=True))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True, min_width=5)
    # A line that is too long ends in an ellipsis: a panel that grows would flicker.
    grid.add_column(no_wrap=True, overflow="ellipsis")
    for label, text in lines(view, now):
        grid.add_row(Text(label), Text(text, no_wrap=True, overflow="ellipsis"))
    title = f"{view.unit} {grouped(view.step)} of {grouped(view.total)}"
    return Panel(Group(head, grid), title=Text(title), title_align="left", box=ROUNDED, width=width)
