"""Ends a run that hangs, and says where; tells of steps that are slow, and on whose account.

The exit code is 75, which sysexits.h calls a temporary failure: the scheduler is to start the same
command again.
"""

import collections
import dataclasses
import datetime
import faulthandler
import io
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from t5g2.activity import STARTING, Activity
from t5g2.files import append
from t5g2.parallel.hosts import Survey

EXIT_CODE = 75

_STATES = {
    "init": "starting",
    "compile": "compiling",
    "restore": "restoring a checkpoint",
    "data": "waiting for data",
    "step": "computing, or waiting for the devices",
    "save": "saving a checkpoint",
    "evaluation": "evaluating",
    "finish": "making the results",
}
# Records that a slow one is compared with, and how many there must be.
_RECORDS, _FEWEST_RECORDS = 50, 5
_LONGEST_NAME = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a run counts as hanging, and a step as slow.

    Attributes:
        minutes: without a step for so long, the run ends with exit code 75 and the stacks of its
            threads; evaluations and checkpoints between two steps count. None: never.
        start_minutes: the same for compiling, restoring and the first step.
        slow: steps that take so many times as long as the median before are told of.
    """

    minutes: float | None = 30.0
    start_minutes: float = 120.0
    slow: float = 2.0

    def __post_init__(self) -> None:
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes must be above 0, not {self.minutes}")
        if self.start_minutes <= 0:
            raise ValueError(f"start_minutes must be above 0, not {self.start_minutes}")
        if self.slow <= 1:
            raise ValueError(f"slow must be above 1, not {self.slow}")


class Watchdog:
    """A thread that ends the process if no step comes; a context manager."""

    def __init__(self, config: WatchdogConfig, activity: Activity, run_dir: Path) -> None:
        """Takes what it watches, and where to write the stacks."""
        self._config, self._activity, self._run_dir = config, activity, run_dir
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._config.minutes is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self._config.minutes is not None
        usual, longest = 60 * self._config.minutes, 60 * self._config.start_minutes
        started = self._activity.step
        pause = min(usual / 10, 10.0)
        stderr = _stderr()
        while not self._over.wait(pause):
            # Should this thread not get to run for so long, something holds Python's lock.
            faulthandler.dump_traceback_later(longest + usual, exit=True, file=stderr)
            activity = self._activity
            starting = activity.phase in STARTING or activity.step == started
            silent = time.monotonic() - activity.moved
            if silent > (longest if starting else usual):
                self._end(silent)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, silent: float) -> None:
        activity = self._activity
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        told = (
            f"watchdog: no step for {silent / 60:.3g} min after step {activity.step}; process "
            f"{jax.process_index()} on {socket.gethostname()} was {_STATES[activity.phase]}"
        )
        text = f"{now} {told}\n{_stacks()}"
        try:
            where = self._run_dir / f"stacks-{socket.gethostname()}-{jax.process_index()}.txt"
            append(where, text + "\n")
            text += f"(also in {where})\n"
        except OSError as error:
            text += f"(could not be written to {self._run_dir}: {error.strerror})\n"
        os.write(_stderr(), f"{text}t5g2: error: {told}; exit code {EXIT_CODE}\n".encode())
        for child in multiprocessing.active_children():
            if child.name.startswith("t5g2-rows") and child.pid is not None:
                os.kill(child.pid, signal.SIGUSR1)  # it tells its own stack, see data.workers
        time.sleep(0.5)
        os._exit(EXIT_CODE)


def _stacks() -> str:
    """The stacks of all threads."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _stderr() -> int:
    try:
        return sys.stderr.fileno()
    except (AttributeError, io.UnsupportedOperation):  # a notebook's
        return 2


class Stragglers:
    """Compares the steps of each record with those before, and finds the host they waited for."""

    def __init__(self, config: WatchdogConfig, mesh: Mesh) -> None:
        """Starts; in each process of a run, which learn one another's names."""
        self._slow = config.slow
        self._before: collections.deque[float] = collections.deque(maxlen=_RECORDS)
        self._survey = Survey(mesh)
        self._names = _host_names()
        self._last: tuple[int, float] | None = None
        self._at = 0, 0.0

    def told(self, step: int, step_seconds: float, data_seconds: float) -> str | None:
        """What is to be told of the record before if there are several processes, else of this one.

        Args:
            step: last step of the record.
            step_seconds: of each of its steps.
            data_seconds: how long, since the process began, its devices had nothing to do for want
                of data.
        """
        steps, waited = max(step - self._at[0], 1), data_seconds - self._at[1]
        self._at = step, data_seconds
        waits = self._survey(waited / steps)
        if len(self._names) == 1:
            return self._judge(step, step_seconds, waits)
        last, self._last = self._last, (step, step_seconds)
        return self._judge(*last, waits) if last is not None and waits else None

    def _judge(self, step: int, seconds: float, waits: list[float]) -> str | None:
        before = statistics.median(self._before) if self._before else 0.0
        enough = len(self._before) >= _FEWEST_RECORDS
        self._before.append(seconds)
        if not enough or seconds <= self._slow * before:
            return None
        slowest = int(np.argmax(waits))
        return (
            f"slow steps up to {step}: {seconds:.3g} s each, {seconds / before:.1f} times the "
            f"median before; process {slowest} on {self._names[slowest]} waited longest for data, "
            f"{waits[slowest]:.3g} s a step"
        )


def _host_names() -> list[str]:
    """By process."""
    own = socket.gethostname()
    if jax.process_count() == 1:
        return [own]
    text = np.zeros(_LONGEST_NAME, np.uint8)
    name = np.frombuffer(own.encode()[:_LONGEST_NAME], np.uint8)
    text[: len(name)] = name
    every = np.asarray(multihost_utils.process_allgather(text))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in every]
