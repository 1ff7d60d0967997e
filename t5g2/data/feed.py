"""Batches by their numbers, without those that a run leaves out; which documents one is of."""

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

from t5g2.data.loader import RowBatches, Step
from t5g2.data.packing import RowStream

Cursors = Int[np.ndarray, "rows cursor"]


class Feed:
    """This process's share of the batches of a run, in order; a context manager.

    The batches of a run are numbered from 1, as its steps are; once some have been left out, the
    number of a step's batch is larger than the step's.

    Attributes:
        number: of the batch that was last given, 0 at the beginning.
        before: cursors of this process's rows before that batch.
    """

    def __init__(self, make: Callable[[Cursors], RowBatches]) -> None:
        """Takes what makes batches that follow the given cursors, of all rows."""
        self._make = make
        self._batches: grain.DatasetIterator[Step] | None = None

    def begin(self, cursors: Cursors, number: int, left_out: Sequence[tuple[int, int]]) -> None:
        """Goes on behind a batch.

        Args:
            cursors: of all rows after that batch.
            number: of that batch.
            left_out: first and last number of the batches that are never given.
        """
        self.close()
        batches = self._make(cursors)
        self.number, self._cursors, self._left_out = number, batches.cursors, left_out
        self._batches = batches.prefetched()

    def __next__(self) -> Step:
        assert self._batches is not None
        while True:
            step = next(self._batches)
            self.before, self._cursors = self._cursors, step.cursors
            self.number += 1
            if not is_left_out(self.number, self._left_out):
                return step

    def close(self) -> None:
        """Ends the threads and processes that make batches."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> "Feed":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def is_left_out(number: int, left_out: Sequence[tuple[int, int]]) -> bool:
    """Whether a batch is one of those that a run leaves out."""
    return any(first <= number <= last for first, last in left_out)


def number_of(step: int, left_out: Sequence[tuple[int, int]]) -> int:
    """Number of the batch of a step."""
    number = 0
    for _ in range(step):
        number += 1
        while is_left_out(number, left_out):
            number += 1
    return number


def documents_between(
    stream: RowStream, first: int, before: Cursors, after: Cursors
) -> dict[str, list[int]]:
    """The documents that rows took tokens of, by source, without reading any.

    Args:
        stream: what the rows are of.
        first: number of the first.
        before: their cursors before.
        after: and after.

    Returns:
        Numbers in the source, ascending; of empty documents, too, which were passed over.
    """
    found: dict[str, list[int]] = {}
    for number, source in enumerate(stream.mixture.sources):
        place = 1 + 2 * number
        documents = {
            stream.document_number(number, first + row, draw)
            for row, draw in _draws(before[:, place : place + 2], after[:, place : place + 2])
        }
        if documents:
            found[source.name] = sorted(documents)
    return found


def _draws(
    before: Int[np.ndarray, "rows 2"], after: Int[np.ndarray, "rows 2"]
) -> Iterator[tuple[int, int]]:
    """Row and draw of each document that rows took tokens of."""
    for row, ((begun, offset), (end, rest)) in enumerate(
        zip(before.tolist(), after.tolist(), strict=True)
    ):
        if (begun, offset) != (end, rest):
            yield from ((row, draw) for draw in range(begun, end + (rest > 0)))


def of_all_processes(stream: RowStream, own: dict[str, list[int]]) -> dict[str, list[int]]:
    """Documents by source, those of all processes; each of them must call it."""
    if jax.process_count() == 1:
        return own
    found: dict[str, list[int]] = {}
    for source in stream.mixture.sources:
        numbers = np.array(own.get(source.name, []), np.int64)
        longest = int(multihost_utils.process_allgather(np.int32(len(numbers))).max())
        padded = np.full(longest, -1, np.int64)
        padded[: len(numbers)] = numbers
        # As 32 bits: jax has no others unless told so.
        gathered = np.asarray(multihost_utils.process_allgather(padded.view(np.int32)))
        documents = np.unique(np.ascontiguousarray(gathered).view(np.int64))
        if len(documents := documents[documents >= 0]):
            found[source.name] = documents.tolist()
    return found
