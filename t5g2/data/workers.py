"""Rows made by processes: each fills its share of every batch in memory that all of them share.

A process is told by a pipe which of a few buffers to fill next, and answers with the cursors of its
rows. A pipe closes when the process at its other end is gone, however that ended: a worker whose
run was killed ends, and a run whose worker was killed says so.
"""

import ctypes
import faulthandler
import itertools
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker, util
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import RawArray
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from t5g2.data.batch import Batch, empty_batch, fill_rows
from t5g2.data.packing import RowStream
from t5g2.errors import UserError

BUFFERS = 3
# A run that is asked to stop still takes its next batch, and saves; its processes must not be gone.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_TO_END = 5.0

Cursors = Int[np.ndarray, "rows cursor"]


class Worker(NamedTuple):
    """A process, the run's end of its pipe, and the rows of this host that it makes."""

    process: SpawnProcess
    pipe: connection.Connection
    rows: slice


class Workers:
    """Processes that make the batches of a host's rows, ahead of the one who asks for them."""

    def __init__(self, stream: RowStream, cursors: Cursors, first: int, processes: int) -> None:
        """Starts the processes.

        Args:
            stream: the rows of the global batch; it is pickled.
            cursors: where this host's rows start.
            first: number of this host's first row in the global batch.
            processes: how many; at most one for each row.

        Raises:
            UserError: sources that cannot be sent to another process.
        """
        context = multiprocessing.get_context("spawn")
        count = len(cursors)
        self._memory = [_Buffer(stream, count) for _ in range(BUFFERS)]
        self._next = 0
        bounds = np.linspace(0, count, min(processes, count) + 1).astype(int).tolist()
        self._workers: list[Worker] = []
        # However this ends, and before Python waits for its child processes.
        self.close = util.Finalize(self, _end, args=(self._workers,), exitpriority=1)
        try:
            pickled = pickle.dumps(stream)
        except Exception as error:
            raise UserError(
                f"data.workers: the sources cannot be sent to other processes ({error}); set it "
                "to 0"
            ) from error
        for start, stop in itertools.pairwise(bounds):
            ours, theirs = context.Pipe()
            rows = slice(start, stop)
            arguments = (theirs, pickled, self._memory, cursors[rows], first, rows)
            process = context.Process(
                target=_work, args=arguments, daemon=True, name=f"t5g2-rows-{start}-{stop}"
            )
            with _signals_blocked():
                process.start()
            theirs.close()
            self._workers.append(Worker(process, ours, rows))
            for number in range(BUFFERS):
                ours.send(number)

    def next(self) -> tuple[Batch, Cursors]:
        """The next batch and the cursors after it.

        Raises:
            RuntimeError: a process was killed.
            Exception: what one of them raised.
        """
        try:
            cursors = [self._answer(worker) for worker in self._workers]
        except Exception:
            self.close()
            raise
        batch = {name: array.copy() for name, array in self._memory[self._next].batch().items()}
        for worker in self._workers:
            with suppress(ConnectionError):  # it has ended, as the next answer will tell
                worker.pipe.send(self._next)
        self._next = (self._next + 1) % BUFFERS
        return batch, np.concatenate(cursors)

    def _answer(self, worker: Worker) -> Cursors:
        try:
            answer = worker.pipe.recv()
        except (EOFError, ConnectionError):
            worker.process.join(_SECONDS_TO_END)
            code = worker.process.exitcode
            raise RuntimeError(
                f"data.workers: process {worker.process.pid} ended early (exit code {code}); was "
                "it killed for want of memory?"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


class _Buffer:
    """Memory of a batch that processes share; it has no name and goes with the last of them."""

    def __init__(self, stream: RowStream, rows: int) -> None:
        empty = empty_batch(rows, *stream.room, stream.images)
        self._layout = {name: (array.shape, array.dtype) for name, array in empty.items()}
        self._memory = {
            name: RawArray(ctypes.c_byte, array.nbytes) for name, array in empty.items()
        }

    def batch(self, rows: slice = slice(None)) -> Batch:
        """Views of some rows."""
        return {
            name: np.frombuffer(memoryview(self._memory[name]), dtype).reshape(shape)[rows]
            for name, (shape, dtype) in self._layout.items()
        }


def _work(
    pipe: connection.Connection,
    pickled: bytes,
    memory: Sequence[_Buffer],
    cursors: Cursors,
    first: int,
    rows: slice,
) -> None:
    """What a process does until the other end of its pipe is closed."""
    faulthandler.register(signal.SIGUSR1)  # for the watchdog of a run that hangs
    stream: RowStream | None = None
    answer: Cursors | Exception = cursors
    while not isinstance(answer, Exception):
        try:
            number = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            stream = stream or pickle.loads(pickled)
            batch = memory[number].batch(rows)
            answer = cursors = fill_rows(batch, stream, first + rows.start, cursors)
        except Exception as error:
            answer = _sendable(error)
        try:
            pipe.send(answer)
        except ConnectionError:
            return


def _sendable(error: Exception) -> Exception:
    """An exception as another process can raise it: itself, if it can be pickled."""
    text = "".join(traceback.format_exception(error))
    error.add_note(f"In a process of data.workers:\n{text}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"in a process of data.workers:\n{text}")
    return error


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """What is started inside never sees Ctrl-C or a scheduler's SIGTERM, from its birth on."""
    resource_tracker.ensure_running()  # started later, it would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(workers: Sequence[Worker]) -> None:
    """Closes the pipes, upon which the processes end; those that do not are killed."""
    for worker in workers:
        worker.pipe.close()
    for worker in workers:
        worker.process.join(_SECONDS_TO_END)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
