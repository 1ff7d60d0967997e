"""grain moves the data: an iterator of host batches with explicit state, prefetched by a thread."""

from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from t5g2.data.batch import Batch, empty_batch, fill_row
from t5g2.data.packing import RowStream

PREFETCH = 4


class Step(NamedTuple):
    """One host's share of a global batch, and the cursors of its rows after it."""

    batch: Batch
    cursors: Int[np.ndarray, "rows cursor"]


class RowBatches(grain.IterDataset[Step]):
    """Endless batches of rows [first, first + count) of a row stream.

    Args:
        stream: the rows of the global batch.
        cursors: cursors to start from, of all rows.
        first: first row of this host.
        count: number of this host's rows.
    """

    def __init__(
        self,
        stream: RowStream,
        cursors: Int[np.ndarray, "rows cursor"],
        first: int,
        count: int,
    ) -> None:
        super().__init__()
        self.stream = stream
        self.first = first
        self.cursors = cursors[first : first + count]

    def __iter__(self) -> "RowBatchIterator":
        return RowBatchIterator(self)

    def prefetched(self) -> grain.DatasetIterator[Step]:
        """An iterator whose batches are made ahead by a thread."""
        return iter(
            grain.experimental.ThreadPrefetchIterDataset(self, prefetch_buffer_size=PREFETCH)
        )


class RowBatchIterator(grain.DatasetIterator[Step]):
    """Iterates over `RowBatches`; its state is the cursor array."""

    def __init__(self, dataset: RowBatches) -> None:
        super().__init__()
        self._dataset = dataset
        self._cursors = dataset.cursors.copy()

    def __next__(self) -> Step:
        stream = self._dataset.stream
        bos_id = stream.mixture.special.bos_id
        count = len(self._cursors)
        batch = empty_batch(count, *stream.room)
        cursors = np.empty_like(self._cursors)
        for i in range(count):
            row = self._dataset.first + i
            pieces, cursors[i] = stream.next_row(row, self._cursors[i])
            fill_row(batch, i, pieces, bos_id)
        self._cursors = cursors
        return Step(batch, cursors.copy())

    def get_state(self) -> dict[str, Any]:
        return {"cursors": self._cursors.copy()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._cursors = np.array(state["cursors"], np.int32)
