"""Held-out loss, teacher-forced."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from t5g2.data.loader import RowBatches
from t5g2.data.packing import RowStream
from t5g2.parallel.hosts import own_rows, to_devices
from t5g2.parallel.rules import batch_sharding
from t5g2.training.metrics import MeanLoss, mean_loss
from t5g2.training.step import DeviceBatch, LossSums


class HeldOut:
    """The first batches of a stream of held-out rows: the same ones at every evaluation."""

    def __init__(
        self,
        stream: RowStream,
        eval_step: Callable[[Any, DeviceBatch], LossSums],
        mesh: Mesh,
        batches: int,
    ) -> None:
        self._tasks = [task.name for task in stream.tasks]
        self._eval_step = eval_step
        sharding = batch_sharding(mesh)
        first, count = own_rows(sharding, stream.rows)
        rows = iter(RowBatches(stream, stream.start(), first, count))
        self._batches = [
            to_devices(sharding, next(rows).batch, stream.rows) for _ in range(batches)
        ]

    def loss(self, params: Any) -> MeanLoss:
        """Mean loss of parameters on these batches."""
        sums = [self._eval_step(params, batch) for batch in self._batches]
        return mean_loss(jax.device_get(sums), self._tasks)
