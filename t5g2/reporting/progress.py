"""What a person sees of a run while it works: a live panel on a terminal, plain lines in a log."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from t5g2.reporting.numbers import clock, compact, duration, grouped, scientific
from t5g2.reporting.panel import NARROWEST, View, panel

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_FIELDS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss {}", "{:.3f}".format),
    ("learning_rate", "lr {}", scientific),
    ("grad_norm", "grad {}", "{:.2f}".format),
    ("tokens_per_second", "{} tok/s", compact),
)


class Nowhere(io.StringIO):
    """A stream that keeps nothing: for processes whose progress nobody is to see."""

    def write(self, text: str) -> int:
        return len(text)


class Progress:
    """Shows the stages and the steps of a run on stderr.

    On a terminal: a spinner for each stage, a live panel for the steps (a bar where it is narrow),
    messages above it. Anywhere else: plain lines, for the first step, then at most one every
    `plain_every` seconds, and for the last step. A context manager, so that also a
    KeyboardInterrupt leaves a clean terminal.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        unit: str = "step",
        plain_every: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        """Prepares; shows nothing yet.

        Args:
            total_steps: The step at which the run is complete.
            unit: What is counted.
            plain_every: Seconds between two lines where there is no terminal.
            stream: Where to write; stderr by default.
        """
        self._total_steps = total_steps
        self._unit = unit
        self._plain_every = plain_every
        self._stream = stream or sys.stderr
        self._live: Live | None = None
        self._console: Console | None = None
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console

            self._console = Console(file=self._stream, highlight=False)
        self._lock = threading.Lock()
        self._view = View(unit, total_steps)
        self._step = 0
        self._text = ""
        self._first: tuple[float, int] | None = None
        self._latest = 0.0
        self._last_line = -float("inf")

    def announce(self, **periods: int) -> None:
        """Takes what happens every so many steps, for the panel: save=500."""
        self._view.periods = periods

    def update(self, step: int, **values: object) -> None:
        """Shows that a step is done.

        Args:
            step: The step, counted from 1 to `total_steps`.
            **values: What the record of the step holds; of it are shown `loss` (nats a token),
                `learning_rate`, `grad_norm` and `tokens_per_second`, and in the panel also
                `step_seconds`, `model_flops_per_second`, `mfu` and how `seconds` were spent.
        """
        now = time.monotonic()
        if self._first is None:
            self._first = (now, step)
        with self._lock:
            self._step, self._latest = step, now
            self._view.take(step, values)
            self._text = "  ".join(
                label.format(form(value))
                for name, label, form in _FIELDS
                if isinstance(value := values.get(name), int | float)
            )
        last = step >= self._total_steps
        if self._console is not None:
            self._open_bar()
            if last:
                self.close()
        elif last or now - self._last_line >= self._plain_every:
            self._last_line = now
            counter = f"{self._unit} {grouped(step)}/{grouped(self._total_steps)}"
            self._print("  ".join(part for part in (counter, self._text, self._clock(now)) if part))

    def message(self, text: str) -> None:
        """Shows one line (an evaluation, a checkpoint, a warning) that stays, above the panel."""
        with self._lock:
            self._view.event = (text, time.monotonic())
        self._print(text)

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Shows a phase that has no steps, and when it ends how long it took.

        Args:
            title: What is going on, such as "build the corpus".
        """
        self.close()
        began = time.monotonic()
        outcome = "stopped after "
        try:
            if self._console is None:
                self._print(f"{title} ...")
                yield
            else:
                from rich.text import Text

                with self._console.status(Text(title), spinner="dots"):
                    yield
            outcome = ""
        finally:
            self._print(f"{title}: {outcome}{duration(time.monotonic() - began)}")

    def close(self) -> None:
        """Ends the panel, which stays on the screen as it last was; a second call does nothing."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()
            atexit.unregister(self.close)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _print(self, line: str) -> None:
        if self._console is None:
            self._stream.write(line + "\n")
            self._stream.flush()
        else:
            self._console.print(line, markup=False, soft_wrap=True)

    def _clock(self, now: float) -> str:
        """Elapsed time, and the time left at the mean speed since the first step seen here."""
        if self._first is None:
            return ""
        began, first_step = self._first
        text = f"elapsed {clock(now - began)}"
        done, left = self._step - first_step, self._total_steps - self._step
        if done > 0 and left > 0:
            text += f"  left {clock((self._latest - began) / done * left)}"
        return text

    def _open_bar(self) -> None:
        if self._live is not None or self._console is None:
            return
        from rich.live import Live

        # For a caller who forgets the `with`: rich hides the cursor until the bar is closed.
        atexit.register(self.close)
        self._live = Live(
            console=self._console, get_renderable=self._bar, refresh_per_second=4, screen=False
        )
        self._live.start()

    def _bar(self) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = self._console.width if self._console is not None else 0
        now = time.monotonic()
        with self._lock:
            step, values = self._step, self._text
            times = self._clock(now if step < self._total_steps else self._latest)
            if width >= NARROWEST:
                return panel(self._view, times, now, width)
        counter = f"{self._unit} {grouped(step)}/{grouped(self._total_steps)}"
        bar = ProgressBar(total=max(self._total_steps, 1), completed=step, width=max(1, width - 1))
        grid = Table.grid()
        grid.add_row(bar)
        for line in (counter, times, values):
            grid.add_row(Text(line, no_wrap=True, overflow="ellipsis"))
        return grid
