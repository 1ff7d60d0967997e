"""Held-out loss, teacher-forced, of the weights and of the mean of the last checkpoints."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5g2.checkpoints.average import average
from t5g2.checkpoints.directory import in_use
from t5g2.checkpoints.keeping import CheckpointStore
from t5g2.data.image_examples import ImagePrefix
from t5g2.data.loader import RowBatches
from t5g2.data.packing import RowStream
from t5g2.kernels.layout import Layout
from t5g2.parallel import hosts
from t5g2.parallel.rules import batch_shardings, row_sharding
from t5g2.training.metrics import mean_loss
from t5g2.training.step import DeviceBatch, EvalSums


class HeldOutLoss(NamedTuple):
    """Mean negative log-likelihoods of held-out target tokens, in nats a token.

    Attributes:
        loss: over all of them.
        by_task: over each task's; a group without a token is left out, here as below.
        targets: number of target tokens.
        targets_by_task: of each task.
        by_modality: over those of examples with images ("image") and without ("text").
        targets_by_modality: of each.
        by_position: by place in the example's targets: "0", "1", "2-3", "4-7", ...
        targets_by_position: of each.
    """

    loss: float
    by_task: dict[str, float]
    targets: int
    targets_by_task: dict[str, int]
    by_modality: dict[str, float]
    targets_by_modality: dict[str, int]
    by_position: dict[str, float]
    targets_by_position: dict[str, int]


class HeldOut:
    """The first batches of a stream of held-out rows: the same ones at every evaluation."""

    def __init__(
        self,
        stream: RowStream,
        eval_step: Callable[[Any, DeviceBatch], EvalSums],
        layout: Layout,
        batches: int,
    ) -> None:
        self._tasks = [task.name for task in stream.tasks]
        self._modality = {
            task.name: "image" if isinstance(task.denoiser, ImagePrefix) else "text"
            for task in stream.tasks
        }
        self._eval_step = eval_step
        first, count = hosts.own_rows(row_sharding(layout), stream.rows)
        rows = iter(RowBatches(stream, stream.start(), first, count))
        self._batches = []
        for _ in range(batches):
            batch = next(rows).batch
            placed = hosts.to_devices(batch_shardings(layout, batch), batch, stream.rows)
            self._batches.append(placed)

    def loss(self, params: Any) -> HeldOutLoss:
        """Mean loss of parameters on these batches."""
        found: list[EvalSums] = jax.device_get([self._eval_step(params, b) for b in self._batches])
        mean = mean_loss([batch.sums for batch in found], self._tasks)
        by_modality, targets_by_modality = _regrouped(
            mean.by_task, mean.targets_by_task, self._modality
        )
        nll, targets = (
            np.sum([np.asarray(part, np.float64) for part in parts], axis=0)
            for parts in ([batch.nll for batch in found], [batch.targets for batch in found])
        )
        buckets = [(i, _bucket_name(i)) for i in range(len(targets)) if targets[i] > 0]
        return HeldOutLoss(
            *mean,
            by_modality,
            targets_by_modality,
            {name: float(nll[i] / targets[i]) for i, name in buckets},
            {name: int(targets[i]) for i, name in buckets},
        )


def _regrouped(
    losses: Mapping[str, float], targets: Mapping[str, int], groups: Mapping[str, str]
) -> tuple[dict[str, float], dict[str, int]]:
    """Losses of groups of tasks, weighted by target tokens, and these."""
    counts: dict[str, int] = {}
    nll: dict[str, float] = {}
    for task, loss in losses.items():
        counts[groups[task]] = counts.get(groups[task], 0) + targets[task]
        nll[groups[task]] = nll.get(groups[task], 0.0) + loss * targets[task]
    return {group: nll[group] / counts[group] for group in counts}, counts


def _bucket_name(bits: int) -> str:
    """Positions of so many bits."""
    first, last = (1 << bits) >> 1, (1 << bits) - 1
    return str(last) if first == last or not bits else f"{first}-{last}"


class Averages:
    """The mean of a run's newest checkpoints, as often as it is asked for, one array at a time."""

    def __init__(self, store: CheckpointStore, count: int, shardings: Any) -> None:
        """Takes what the means are of.

        Args:
            store: the checkpoints.
            count: of how many of the newest permanent ones a mean is.
            shardings: of the parameters.
        """
        self._store = store
        self._count = max(count, 1)
        self._shardings = shardings

    def newest(self) -> tuple[Any, list[int]]:
        """The mean, on the devices, and the steps that it is of; all processes ask together.

        Waits for the checkpoint that is being written. Only a few arrays are in a host's memory.

        Returns:
            None and no steps if there is no permanent checkpoint yet.
        """
        self._store.wait()
        steps = np.full(self._count, -1, np.int32)
        if hosts.is_first():
            chosen = [saved.step for saved in self._store.newest_permanent(self._count)]
            steps[: len(chosen)] = chosen
        if jax.process_count() > 1:
            steps = multihost_utils.broadcast_one_to_all(steps)
        used = [int(step) for step in steps if step >= 0]
        if not used:
            return None, []
        paths = [self._store.path(step) for step in used]
        with in_use(paths):
            return jax.tree.map(_placed, average(paths)[0], self._shardings), used


def _placed(array: Any, sharding: Any) -> jax.Array:
    placed = jax.device_put(np.asarray(array), sharding)
    return placed.block_until_ready()  # The host's copy goes before the next is read.
