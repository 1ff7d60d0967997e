"""From what each step reports to the records of the metrics log."""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from t5g2.training.step import LossSums, StepMetrics


class Totals(NamedTuple):
    """What has been counted since step 0; saved in every checkpoint.

    Attributes:
        tokens: real encoder and decoder tokens.
        target_tokens: real decoder tokens.
        digest: checksum of all batches so far, in order: equal in two runs that saw the same data.
        skipped: steps whose update was left out: so far is the schedule behind the steps.
    """

    tokens: int = 0
    target_tokens: int = 0
    digest: int = 0
    skipped: int = 0

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> "Totals":
        """The totals that a checkpoint's metadata hold."""
        return cls(**{name: meta[name] for name in cls._fields if name in meta})


class MeanLoss(NamedTuple):
    """Mean negative log-likelihood of real target tokens, in nats a token.

    Attributes:
        loss: over all of them.
        by_task: over each task's; a task without a token is left out.
        targets: number of target tokens.
        targets_by_task: of each task in `by_task`: what its loss weighs in a mean over several.
    """

    loss: float
    by_task: dict[str, float]
    targets: int
    targets_by_task: dict[str, int]


def mean_loss(sums: Sequence[LossSums], tasks: Sequence[str]) -> MeanLoss:
    """The mean over several batches (added up in float64)."""
    nll = np.sum([np.asarray(s.nll, np.float64) for s in sums], axis=0)
    targets = np.sum([np.asarray(s.targets, np.float64) for s in sums], axis=0)
    present = [(i, name) for i, name in enumerate(tasks) if targets[i] > 0]
    return MeanLoss(
        float(nll.sum() / max(targets.sum(), 1)),
        {name: float(nll[i] / targets[i]) for i, name in present},
        int(targets.sum()),
        {name: int(targets[i]) for i, name in present},
    )


class Meter:
    """Gathers step metrics, on the devices until they are asked for."""

    def __init__(
        self,
        tasks: Sequence[str],
        room: tuple[int, int],
        learning_rate: Callable[[int], Any],
        totals: Totals,
        watch: Callable[[Sequence[StepMetrics]], None] = lambda steps: None,
    ) -> None:
        """Starts to count.

        Args:
            tasks: names of the tasks.
            room: tokens that a batch has room for, inputs and targets.
            learning_rate: the schedule.
            totals: what was counted before.
            watch: told the metrics of steps, each once and in order, when they leave the devices.
        """
        self._tasks = tasks
        self._room = room
        self._learning_rate = jax.jit(learning_rate)
        self._totals = totals
        self._watch = watch
        self._on_device: list[StepMetrics] = []
        self._steps: list[StepMetrics] = []
        self._seconds = 0.0
        self._running_since: float | None = None

    def add(self, metrics: StepMetrics) -> None:
        """Takes the metrics of the step that was just dispatched."""
        if self._running_since is None:
            self._running_since = time.perf_counter()
        self._on_device.append(metrics)

    def totals(self) -> Totals:
        """Waits for the steps so far and returns what has been counted."""
        fetched: list[StepMetrics] = jax.device_get(self._on_device)
        self._on_device = []
        for metrics in fetched:
            inputs, targets = int(metrics.sums.inputs), int(metrics.sums.targets.sum())
            digest = zlib.crc32(np.uint32(metrics.digest).tobytes(), self._totals.digest)
            self._totals = Totals(
                self._totals.tokens + inputs + targets,
                self._totals.target_tokens + targets,
                digest,
                self._totals.skipped + bool(metrics.skipped),
            )
        self._steps += fetched
        self._watch(fetched)
        return self._totals

    @property
    def pending(self) -> bool:
        """Whether steps were added since the last record."""
        return bool(self._on_device or self._steps)

    def devices_work(self) -> bool:
        """Whether the devices have not done yet with the step that was last dispatched."""
        # jax.Array has the method, and does not declare it.
        return bool(self._on_device) and not self._on_device[-1].grad_norm.is_ready()  # type: ignore[attr-defined]

    def pause(self) -> None:
        """Waits for the steps so far; until the next one, time does not count as training."""
        self.totals()
        if self._running_since is not None:
            self._seconds += time.perf_counter() - self._running_since
            self._running_since = None

    def record(self, step: int) -> dict[str, Any]:
        """The record of the steps since the last one; `step` is the last of them."""
        self.pause()
        totals, steps, seconds = self._totals, self._steps, max(self._seconds, 1e-9)
        self._steps, self._seconds = [], 0.0
        inputs = sum(int(metrics.sums.inputs) for metrics in steps)
        targets = sum(int(metrics.sums.targets.sum()) for metrics in steps)
        # What was not learnt from would only hide the loss of the rest.
        learnt = [metrics.sums for metrics in steps if not metrics.skipped]
        skipped = len(steps) - len(learnt)
        mean = mean_loss(learnt or [metrics.sums for metrics in steps], self._tasks)
        distilled = [sums.distilled for sums in learnt if sums.distilled is not None]
        return {
            "loss": mean.loss,
            "by_task": mean.by_task,
            "targets_by_task": mean.targets_by_task,
            **({"distilled_loss": float(sum(distilled)) / mean.targets} if distilled else {}),
            **({"skipped_steps": skipped} if skipped else {}),
            "learning_rate": float(self._learning_rate(step - 1 - totals.skipped)),
            "grad_norm": float(steps[-1].grad_norm),
            "param_norm": float(steps[-1].param_norm),
            "update_norm": float(steps[-1].update_norm),
            "inputs": inputs,
            "targets": mean.targets,
            "tokens": totals.tokens,
            "target_tokens": totals.target_tokens,
            "tokens_per_second": (inputs + targets) / seconds,
            "step_seconds": seconds / len(steps),
            "fill_inputs": inputs / len(steps) / self._room[0],
            "fill_targets": targets / len(steps) / self._room[1],
            "data_digest": f"{totals.digest:08x}",
        }
