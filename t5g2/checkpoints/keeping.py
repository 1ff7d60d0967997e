"""The checkpoints of a run: saved in the background, verified, kept and pruned.

It counts once its manifest is written, see `t5g2.checkpoints.directory`. The first process of a run
does all that is not Orbax's, in a directory that all of them see.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Int

from t5g2.checkpoints import directory as places
from t5g2.checkpoints.directory import Saved, permanent, saved_checkpoints, set_aside
from t5g2.checkpoints.manifest import FORMAT, DamagedError, verify, write_manifest
from t5g2.checkpoints.store import as_os_error, manifest_facts, read_arrays
from t5g2.checkpoints.together import SaveBarrier
from t5g2.errors import UserError
from t5g2.parallel import hosts
from t5g2.training.state import TrainState

# Seconds until a save is tried again: in a run, where each failure doubles it, and at its end.
_FIRST_DELAY, _LONGEST_DELAY = 10.0, 600.0
_DELAYS_AT_THE_END = (1.0, 4.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    Attributes:
        every: steps between two permanent checkpoints.
        minutes: minutes after which a temporary one is written as well; of these, and of those
            that a stop wrote, the newest is kept. None: none.
        keep: the newest so many permanent ones are kept, and at least those that `finish` averages.
        keep_period: permanent ones of a multiple of so many steps are kept for ever; None: none.
    """

    every: int = 1000
    minutes: float | None = None
    keep: int = 10
    keep_period: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError("every and keep must be at least 1")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes must be above 0, not {self.minutes}")
        if self.keep_period is not None and self.keep_period < 1:
            raise ValueError(f"keep_period must be at least 1, not {self.keep_period}")


class CheckpointStore:
    """Saves, restores and prunes the checkpoints of a run.

    A context manager: leaving it waits for the last write.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        averaged: int = 0,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Opens `directory`.

        Args:
            directory: of a run's checkpoints; the first process makes it.
            config: when to save and what to keep.
            averaged: the newest so many permanent ones stay.
            before_commit: called in the background before a checkpoint counts, so that what it
                stands for, such as the run's records, is on disk too.
        """
        self.directory = directory.absolute()
        self._before_commit = before_commit
        self._config = config
        self._kept = max(config.keep, averaged)
        self._barrier = SaveBarrier() if jax.process_count() > 1 else None
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(barrier_sync_fn=self._barrier),
        )
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        self._failures, self._failure = 0, ""
        self._next_attempt: float | None = None
        self._last_saved = time.monotonic()
        self._news: collections.deque[str] = collections.deque()
        _hide_what_is_also_raised()
        if hosts.is_first():
            self.directory.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()
        self._checkpointer.close()

    def saved(self) -> list[Saved]:
        """The checkpoints, by step."""
        return saved_checkpoints(self.directory)

    def path(self, step: int) -> Path:
        """Directory of a step's checkpoint."""
        return self.directory / str(step)

    def news(self) -> Iterator[str]:
        """What happened since the last call that a person should know."""
        while self._news:
            yield self._news.popleft()

    def newest_sound(self) -> int | None:
        """The newest step that verifies, or None if there is no checkpoint.

        Those after it, which do not, are set aside.

        Raises:
            UserError: there are checkpoints, and none verifies.
        """
        found = self._newest_sound() if hosts.is_first() else -1
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        return None if found < 0 else found

    def _newest_sound(self) -> int:
        damaged: list[tuple[Path, str]] = []
        for step, path, _ in reversed(self.saved()):
            try:
                verify(path)
            except DamagedError as error:
                damaged.append((path, str(error)))
                continue
            for bad, how in damaged:
                self._news.append(
                    f"{how}; set aside as {set_aside(bad)}; going on from step {step} instead"
                )
            return step
        if damaged:
            raise UserError(
                f"no checkpoint in {self.directory} verifies; the newest: {damaged[0][1]}. Restore "
                "one from a copy, or remove them all to begin anew"
            )
        return -1

    def newest_permanent(self, count: int) -> list[Saved]:
        """The newest `count` permanent checkpoints that verify, by step; fewer if there are fewer.

        Damaged ones met on the way are set aside.
        """
        sound: list[Saved] = []
        for checkpoint in reversed(permanent(self.saved())):
            if len(sound) == count:
                break
            try:
                verify(checkpoint.path)
            except DamagedError as error:
                self._news.append(f"{error}; set aside as {set_aside(checkpoint.path)}")
            else:
                sound.append(checkpoint)
        return sound[::-1]

    def wants_save(self) -> bool:
        """Whether a temporary checkpoint is due, by the clock or because a save has failed."""
        if self._pending is not None and not self._pending[1].done():
            return False
        if self._barrier and self._pending and self._pending[1].exception() and not self.saved():
            return True  # It ends the run, which all processes learn of in `save`, at one step.
        self._collect()
        now = time.monotonic()
        if self._next_attempt is not None:
            return now >= self._next_attempt
        minutes = self._config.minutes
        return minutes is not None and now - self._last_saved >= 60 * minutes

    def save(
        self,
        state: TrainState,
        cursors: Int[jax.Array, "rows cursor"],
        meta: Mapping[str, Any],
        *,
        temporary: bool,
    ) -> None:
        """Saves the state of a step; returns once the arrays have left the devices.

        If there is no room, or the file system fails otherwise, that is news, `wants_save` says
        when to try again, and the checkpoint before stands.

        Raises:
            UserError: it failed, and no checkpoint stands.
        """
        self._collect()
        step = int(jax.device_get(state.step))
        items = {
            "params": state.params,
            "optimizer": {"step": state.step, "opt_state": state.opt_state},
            "data": {"cursors": cursors},
        }
        facts = {**manifest_facts({**meta, "step": step}, items), "temporary": temporary}
        partial = places.place(self.directory, step)
        self._last_saved = time.monotonic()
        if self._barrier:
            self._barrier.begin()
        try:
            if hosts.is_first():
                places.begin(self.directory, step)
            self._checkpointer.save(
                partial,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(item) for name, item in items.items()},
                    meta=ocp.args.JsonSave({"format": FORMAT, "step": step, **meta}),
                ),
                force=True,
            )
        except (OSError, ValueError) as error:
            self._tell_others(error)
            self._failed(step, error)
        else:
            self._pending = step, self._thread.submit(self._complete, step, partial, facts)

    def remove(self, checkpoint: Saved) -> None:
        """Removes a checkpoint; a process that is killed meanwhile leaves none."""
        places.prune(checkpoint.path)

    def wait(self) -> int:
        """Waits until what was saved is on disk; returns the newest step that is, or 0."""
        self._collect()
        hosts.barrier("saved")
        return max((checkpoint.step for checkpoint in self.saved()), default=0)

    def save_at_the_end(
        self,
        state: TrainState,
        cursors: Int[jax.Array, "rows cursor"],
        meta: Mapping[str, Any],
        *,
        temporary: bool,
    ) -> None:
        """As `save`, but waits until it is on disk, and insists.

        Raises:
            UserError: it failed, again and again.
        """
        step = int(jax.device_get(state.step))
        for delay in (*_DELAYS_AT_THE_END, None):
            self.save(state, cursors, meta, temporary=temporary)
            newest = self.wait()
            if newest == step:
                return
            if delay is None:
                raise UserError(
                    f"{self._failure}: make room; the same command goes on from step {newest}"
                )
            time.sleep(delay)

    def restore(
        self, step: int, shapes: TrainState, shardings: TrainState
    ) -> tuple[TrainState, Int[np.ndarray, "rows cursor"]]:
        """State and data cursors of a step that is sound, the state laid out as `shardings` say."""
        target = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        restored = self._checkpointer.restore(
            self.path(step),
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(target.params),
                optimizer=ocp.args.StandardRestore(
                    {"step": target.step, "opt_state": target.opt_state}
                ),
            ),
        )
        optimizer = restored.optimizer
        state = TrainState(optimizer["step"], restored.params, optimizer["opt_state"])
        return state, np.asarray(read_arrays(self.path(step) / "data")["cursors"], np.int32)

    def _complete(self, step: int, partial: Path, facts: Mapping[str, Any]) -> None:
        """In the background: waits for Orbax, makes the checkpoint count, prunes others."""
        try:
            self._checkpointer.wait_until_finished()
            if hosts.is_first():
                write_manifest(partial, facts)
                self._before_commit()
                places.finish(self.directory, step)
                self._prune()
            if self._barrier:
                self._barrier(key="complete")
        except Exception as error:
            self._tell_others(error)
            raise

    def _collect(self) -> None:
        """Waits for the save that is going on, if any, and takes its result."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except (OSError, ValueError) as error:
            self._failed(step, error)
        else:
            self._failures, self._next_attempt = 0, None

    def _failed(self, step: int, error: OSError | ValueError) -> None:
        if isinstance(error, ValueError) and as_os_error(error, self.directory) is None:
            raise error
        if hosts.is_first():
            places.discard(self.directory, step)
        stands = max((checkpoint.step for checkpoint in self.saved()), default=None)
        told = f"step {step} could not be saved in {self.directory}: {self._why(error)}"
        if stands is None:
            raise UserError(f"{told}: make room, or name another --run_dir") from error
        delay = min(_FIRST_DELAY * 2**self._failures, _LONGEST_DELAY)
        self._failures, self._failure = self._failures + 1, told
        self._next_attempt = time.monotonic() + delay
        self._news.append(
            f"{told}; the checkpoint of step {stands} stands, next attempt in {delay:.0f} s"
        )

    def _tell_others(self, error: Exception) -> None:
        """Lets the other processes of the run, which wait for this one, know that it failed."""
        if self._barrier:
            self._barrier.fail(self._why(error))

    def _why(self, error: Exception) -> str:
        cause = as_os_error(error, self.directory) if isinstance(error, ValueError) else error
        # Orbax's own errors, of time that ran out, bear no number.
        told = cause.strerror if isinstance(cause, OSError) else None
        return told or f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    def _prune(self) -> None:
        saved, period = self.saved(), self._config.keep_period
        keep = {checkpoint.step for checkpoint in permanent(saved)[-self._kept :]}
        keep |= {max((checkpoint.step for checkpoint in saved if checkpoint.temporary), default=0)}
        for checkpoint in saved:
            step, path, temporary = checkpoint
            if step in keep or (period and step % period == 0 and not temporary):
                continue
            if not places.is_in_use(path):
                self.remove(checkpoint)


def _without_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None


@functools.cache
def _hide_what_is_also_raised() -> None:
    """Keeps what a failing save prints besides raising it from hiding the line that is told.

    Orbax logs the traceback in each of its threads, asyncio that of every array but the first,
    some when the process ends, and TensorStore calls back into event loops that have ended.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_without_traceback)
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
