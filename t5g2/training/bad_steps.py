"""Steps that go wrong, by their loss or gradient, and what is decided about them.

The devices leave updates out by themselves (see `limits`). The host learns of a bad step when it
reads the metrics, every `train.log_every` steps and before every evaluation and checkpoint: no
checkpoint is saved that holds a bad step of which nobody knew. Every process reads the same metrics
at the same steps, so that all decide alike without asking one another.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from t5g2.training.limits import NO_LIMITS, Limits, place
from t5g2.training.step import StepMetrics

EXIT_CODE = 3

Policy = Literal["log", "skip", "rollback", "stop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BadStepsConfig:
    """What is done about bad steps; each of them is an event in the metrics, whatever is done.

    "log": nothing else. "skip": its update is left out. "rollback": the run goes back to an earlier
    checkpoint and on without the batches from the first to the last bad one. "stop": the run ends
    with exit code 3; its last checkpoint is from before the bad step.

    Attributes:
        nonfinite: of a loss or gradient that is not finite, whose update is left out unless this is
            "log".
        spike: of a loss or gradient norm that is far above those before.
        sigmas: how many standard deviations above the mean of the window are far.
        window: steps that mean and standard deviation are of; before there are so many, nothing is
            a spike. What is far above counts in it as if it were at the limit.
        most_in_a_row: so many steps in a row that were skipped, or so many rollbacks to the same
            checkpoint, stop the run.
        checkpoints_back: which checkpoint a rollback goes to: 1, the last before the bad step; the
            oldest or the run's beginning if there are fewer.
    """

    nonfinite: Policy = "skip"
    spike: Policy = "log"
    sigmas: float = 7.0
    window: int = 128
    most_in_a_row: int = 10
    checkpoints_back: int = 1

    def __post_init__(self) -> None:
        if self.sigmas <= 0:
            raise ValueError(f"sigmas must be above 0, not {self.sigmas}")
        if self.window < 2:
            raise ValueError(f"window must be at least 2, not {self.window}")
        if self.most_in_a_row < 1 or self.checkpoints_back < 1:
            raise ValueError("most_in_a_row and checkpoints_back must be at least 1")


class Drawn(NamedTuple):
    """What a step was fed.

    Attributes:
        step: the step.
        number: of the batch.
        before: cursors of this process's rows before the batch.
        after: and after it.
    """

    step: int
    number: int
    before: Int[np.ndarray, "rows cursor"]
    after: Int[np.ndarray, "rows cursor"]


class BadStep(NamedTuple):
    """A step that went wrong.

    Attributes:
        drawn: what it was fed.
        kind: how.
        policy: what is to be done about it.
        loss: mean over its targets, in nats.
        grad_norm: before clipping.
        digest: of its batch.
        skipped: whether its update was left out.
    """

    drawn: Drawn
    kind: Literal["nonfinite", "spike"]
    policy: Policy
    loss: float
    grad_norm: float
    digest: int
    skipped: bool

    def __str__(self) -> str:
        how = "not finite" if self.kind == "nonfinite" else "a spike"
        done = {"log": "", "skip": "", "rollback": "; going back", "stop": "; stopping"}
        return (
            f"step {self.drawn.step}: loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}: "
            f"{how}{'; update left out' if self.skipped else ''}{done[self.policy]}"
        )


class Guard:
    """Finds bad steps among those whose metrics are read, and says what is to be done.

    Attributes:
        limits: which the next steps are held to, on the devices.
        stop: why the run is to end, or None.
        stretch: the first and the last of the steps that it is to go back from, or None.
    """

    def __init__(self, config: BadStepsConfig, mesh: Mesh, saved: Mapping[str, Any] | None) -> None:
        """Starts, or goes on.

        Args:
            config: the policies.
            mesh: the devices.
            saved: what `state` was in the checkpoint that the run goes on from.
        """
        saved = saved or {"window": [], "limits": [math.inf, math.inf], "in_a_row": 0}
        self._config, self._mesh = config, mesh
        self._window = collections.deque(map(tuple, saved["window"]), config.window)
        self._in_a_row: int = saved["in_a_row"]
        self._drawn: collections.deque[Drawn] = collections.deque()
        self._found: list[BadStep] = []
        self.stop: str | None = None
        self.stretch: tuple[Drawn, Drawn] | None = None
        self._set_limits(*saved["limits"])

    def state(self) -> dict[str, Any]:
        """What a run needs to go on exactly, as JSON values."""
        return {
            "window": [list(values) for values in self._window],
            "limits": [float(self._far.loss), float(self._far.grad_norm)],
            "in_a_row": self._in_a_row,
        }

    @property
    def sound(self) -> bool:
        """Whether the state after the steps so far is one to go on from."""
        return self.stop is None and self.stretch is None

    def add(self, drawn: Drawn) -> None:
        """Takes what the step that was just dispatched was fed."""
        self._drawn.append(drawn)

    def watch(self, steps: Sequence[StepMetrics]) -> None:
        """Takes the metrics, on the host, of the steps that follow those it had before."""
        for metrics in steps:
            self._judge(self._drawn.popleft(), metrics)

    def renew(self) -> None:
        """Sets the limits of the steps to come by those so far."""
        if len(self._window) == self._config.window:
            values = np.array(self._window)
            self._set_limits(*(values.mean(0) + self._config.sigmas * values.std(0)).tolist())

    def found(self) -> list[BadStep]:
        """The bad steps found since the last call."""
        found, self._found = self._found, []
        return found

    def _set_limits(self, loss: float, grad_norm: float) -> None:
        config = self._config
        self._far = Limits(True, np.float32(loss), np.float32(grad_norm))
        kept = self._far if config.spike == "skip" else NO_LIMITS
        self.limits = place(kept._replace(finite=config.nonfinite != "log"), self._mesh)

    def _judge(self, drawn: Drawn, metrics: StepMetrics) -> None:
        loss, norm = np.float32(metrics.loss), np.float32(metrics.grad_norm)
        finite = bool(np.isfinite(loss) and np.isfinite(norm))
        if finite:
            far = self._far
            self._window.append((float(min(loss, far.loss)), float(min(norm, far.grad_norm))))
        skipped = bool(metrics.skipped)
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if finite and not (loss > self._far.loss or norm > self._far.grad_norm):
            return
        policy = self._config.spike if finite else self._config.nonfinite
        self._found.append(
            BadStep(
                drawn,
                "spike" if finite else "nonfinite",
                policy,
                float(loss),
                float(norm),
                int(metrics.digest),
                skipped,
            )
        )
        if policy == "rollback":
            self.stretch = (self.stretch or (drawn, drawn))[0], drawn
        elif policy == "stop":
            self.stop = self.stop or f"bad_steps: stopped at step {drawn.step}"
        elif policy == "skip" and self._in_a_row >= self._config.most_in_a_row:
            self.stop = self.stop or f"bad_steps: {self._in_a_row} steps in a row were skipped"
