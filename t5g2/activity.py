"""What a process of a run is doing, since when, and how much time went into what."""

import contextlib
import time
from collections.abc import Iterator
from typing import Literal, get_args

Phase = Literal["init", "compile", "restore", "data", "step", "save", "evaluation", "finish"]
PHASES: tuple[Phase, ...] = get_args(Phase)
# Those in which no step can be expected.
STARTING: frozenset[Phase] = frozenset({"init", "compile", "restore", "finish"})


class Activity:
    """Divides a process's time, from `began` on, into phases: at each moment there is one.

    Another thread may read it.

    Attributes:
        began: when, in seconds since 1970.
        phase: what the process is doing.
        step: the last step that was dispatched.
        moved: time.monotonic() of that, or of when the process last came out of a phase of
            `STARTING` or into one.
    """

    def __init__(self, began: float | None = None) -> None:
        """Starts in phase "init", at `began` or now."""
        self.began = time.time() if began is None else began
        self.phase: Phase = "init"
        self.step = 0
        self.moved = time.monotonic()
        self._since = self.moved - (time.time() - self.began)
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: Phase, booked: Phase | None = None) -> None:
        """Ends the phase that it is in, whose time is booked as another's if one is given."""
        now = time.monotonic()
        self._seconds[booked or self.phase] += now - self._since
        if {phase, self.phase} & STARTING:
            self.moved = now
        self.phase, self._since = phase, now

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Is in a phase, and then in the one before again."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def stepped(self, step: int) -> None:
        """Takes note of a step that was dispatched."""
        self.step, self.moved = step, time.monotonic()

    def seconds(self) -> dict[str, float]:
        """Time so far, by phase; it sums to the time since `began`."""
        running = time.monotonic() - self._since
        return {
            phase: round(spent + (running if phase == self.phase else 0.0), 3)
            for phase, spent in self._seconds.items()
        }
