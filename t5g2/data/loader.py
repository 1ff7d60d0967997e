"""grain moves the data: an iterator of host batches with explicit state, made ahead by a thread.

The thread makes the rows itself, or has processes make them.
"""

import atexit
import weakref
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from t5g2.data.batch import Batch, empty_batch, fill_rows
from t5g2.data.packing import RowStream
from t5g2.data.workers import Workers

PREFETCH = 4
# Iterators with a thread that may not have been closed.
_open: "weakref.WeakSet[grain.DatasetIterator[Step]]" = weakref.WeakSet()


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
        workers: processes that make the rows, at most one for each; 0: who asks for them makes
            them. The batches are the same.
    """

    def __init__(
        self,
        stream: RowStream,
        cursors: Int[np.ndarray, "rows cursor"],
        first: int,
        count: int,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.stream = stream
        self.first = first
        self.workers = workers
        self.cursors = cursors[first : first + count]

    def __iter__(self) -> "RowBatchIterator":
        return RowBatchIterator(self)

    def prefetched(self) -> grain.DatasetIterator[Step]:
        """An iterator whose batches are made ahead by a thread; `close` ends its processes.

        One that is left open is closed when Python exits.
        """
        steps = iter(
            grain.experimental.ThreadPrefetchIterDataset(self, prefetch_buffer_size=PREFETCH)
        )
        _open.add(steps)
        return steps


class RowBatchIterator(grain.DatasetIterator[Step]):
    """Iterates over `RowBatches`; its state is the cursor array."""

    def __init__(self, dataset: RowBatches) -> None:
        super().__init__()
        self._dataset = dataset
        self._cursors = dataset.cursors.copy()
        self._workers: Workers | None = None

    def __next__(self) -> Step:
        self._assert_not_closed()
        stream, first, workers = self._dataset.stream, self._dataset.first, self._dataset.workers
        if workers:
            if self._workers is None:
                self._workers = Workers(stream, self._cursors, first, workers)
            batch, self._cursors = self._workers.next()
        else:
            batch = empty_batch(len(self._cursors), *stream.room, stream.images, zeros=False)
            self._cursors = fill_rows(batch, stream, first, self._cursors)
        return Step(batch, self._cursors.copy())

    def get_state(self) -> dict[str, Any]:
        return {"cursors": self._cursors.copy()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._end_workers()
        self._cursors = np.array(state["cursors"], np.int32)

    def close(self) -> None:
        self._end_workers()
        super().close()

    def _end_workers(self) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None


@atexit.register
def _close_open() -> None:
    """Ends the threads while Python still runs.

    A thread that is reading from C++ when the interpreter is taken down is ended in the midst of
    functions that no exception may leave, upon which C++ aborts the process.
    """
    for steps in list(_open):
        steps.close()
