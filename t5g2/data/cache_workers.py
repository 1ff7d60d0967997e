"""Writing the shards of a cache with several processes of one machine."""

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from t5g2.data.cache_writing import CacheWriter, Report, Todo
from t5g2.errors import UserError

# Seconds between two looks at how far the workers are.
_LOOK_EVERY = 0.5

# A worker process's own, set when it starts.
_worker: dict[str, Any] = {}


class _StopError(Exception):
    """The parent asked for an end."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_in_processes(
    writer: CacheWriter, todo: Sequence[Todo], workers: int, report: Callable[[int, int], None]
) -> None:
    """Writes shards, each in one of `workers` processes; all of them end with this one.

    Args:
        writer: of the cache.
        todo: the shards.
        workers: number of processes.
        report: is told, now and then, of documents and tokens that were written since.

    Raises:
        UserError: a shard cannot be written, or a process was killed.
    """
    if not todo:
        return
    # Not forked: this process may have threads, whose locks would be copied as they stand.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    documents, tokens = context.Value("q", 0), context.Value("q", 0)
    seen = (0, 0)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(todo)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(writer, stop, documents, tokens),
    )
    try:
        running = {pool.submit(_write, each) for each in todo}
        while running:
            done, running = concurrent.futures.wait(
                running, timeout=_LOOK_EVERY, return_when=concurrent.futures.FIRST_COMPLETED
            )
            now = (documents.value, tokens.value)
            if now != seen:
                report(now[0] - seen[0], now[1] - seen[1])
                seen = now
            for future in done:
                future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory: run the same command again, "
            "which goes on, with fewer --workers"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _start_worker(writer: CacheWriter, stop: Any, documents: Any, tokens: Any) -> None:
    # Ctrl-C reaches every process of the terminal: the parent alone answers, and stops the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def report(more_documents: int, more_tokens: int) -> None:
        for counter, more in ((documents, more_documents), (tokens, more_tokens)):
            with counter.get_lock():
                counter.value += more
        if stop.is_set():
            raise _StopError

    _worker.update(writer=writer, report=report)


def _end_with_parent() -> None:
    """Ends this process when its parent dies without having been able to say so."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _write(todo: Todo) -> None:
    report: Report = _worker["report"]
    _worker["writer"].write(todo, report)
