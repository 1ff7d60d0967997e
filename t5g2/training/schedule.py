"""The learning rate over the run."""

import dataclasses

import optax

# A short run warms up for at most this share of its steps.
LONGEST_WARMUP = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then cosine decay over the rest of the run (arXiv:2512.14856, section 3).

    Attributes:
        peak_learning_rate: reached at the end of the warm-up.
        warmup_steps: steps of the warm-up; at most a tenth of the run.
        floor: the learning rate at the end, as a share of the peak.
    """

    peak_learning_rate: float = 1e-3
    warmup_steps: int = 100
    floor: float = 0.1

    def __post_init__(self) -> None:
        if self.peak_learning_rate <= 0:
            raise ValueError(f"peak_learning_rate must be above 0, not {self.peak_learning_rate}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must lie between 0 and 1, not {self.floor}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, not {self.warmup_steps}")


def warmup_steps(config: ScheduleConfig, total_steps: int) -> int:
    """Warm-up steps of a run of `total_steps`."""
    return min(config.warmup_steps, int(total_steps * LONGEST_WARMUP))


def make_schedule(config: ScheduleConfig, total_steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, from 0; the last step comes to the floor."""
    peak, warmup = config.peak_learning_rate, warmup_steps(config, total_steps)
    # The first step moves already: its rate is peak / warmup, not 0.
    rising = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    falling = optax.cosine_decay_schedule(peak, max(total_steps - warmup, 1), alpha=config.floor)
    return optax.join_schedules([rising, falling], [warmup])
