"""Asking a job to stop: Ctrl-C and the scheduler's SIGTERM."""

import contextlib
import gc
import os
import signal
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """While active, the first SIGINT or SIGTERM is remembered; a second one ends the process.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        caught = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._remember) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hear(self, number: int) -> bool:
        """Takes the signal that some process has, 0 for none; returns whether to stop."""
        if number:
            self.signal = signal.Signals(number)
        return bool(number)

    @property
    def exit_code(self) -> int:
        """What a shell makes of the signal, 128 + its number: the run is saved but not done."""
        return 0 if self.signal is None else 128 + self.signal

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Lets SIGTERM end what runs within by an exception, as Ctrl-C does, so that it cleans up."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    # JAX has a callback in the garbage collector; an exception raised while it runs is ignored.
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        signal.signal(signal.SIGTERM, before)
