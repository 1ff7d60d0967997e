"""Rows made by processes: the same rows, and no process left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from reconstruction import SPECIAL, Faulty, NotSendableError, numbered_documents

from t5g2.data.loader import RowBatches, Step
from t5g2.data.mixture import Mixture, Source
from t5g2.data.packing import RowStream
from t5g2.errors import UserError

ROWS = 5


def stream_of(documents) -> RowStream:
    mixture = Mixture(sources=(Source(name="text", documents=documents),), special=SPECIAL)
    return RowStream(mixture, ROWS, 256, 256, 0)


def children() -> list[multiprocessing.Process]:
    return [child for child in multiprocessing.active_children() if "t5g2-rows" in child.name]


@pytest.fixture
def stream() -> RowStream:
    return stream_of(numbered_documents([40, 3000, 1, 700, 0, 900, 1100, 2] * 5))


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert not children()


def take(dataset: RowBatches, count: int) -> list[Step]:
    with closing(dataset.prefetched()) as iterator:
        return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("workers", [1, 2, ROWS + 3])
def test_processes_change_nothing(stream, workers):
    start = stream.start()
    expected = take(RowBatches(stream, start, 1, 3), 8)
    found = take(RowBatches(stream, start, 1, 3, workers), 8)
    np.testing.assert_equal(found, expected)


def test_a_state_is_gone_back_to_with_processes(stream):
    iterator = iter(RowBatches(stream, stream.start(), 0, ROWS, 2))
    next(iterator)
    state = iterator.get_state()
    expected = [next(iterator), next(iterator)]
    iterator.set_state(state)
    np.testing.assert_equal([next(iterator), next(iterator)], expected)
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


@pytest.mark.parametrize(
    "kind",
    [UserError, ConnectionResetError],  # the latter as a closed pipe raises it, too
)
def test_an_exception_in_a_process_is_raised_as_itself(kind):
    stream = stream_of(Faulty(kind))
    with pytest.raises(kind) as raised:
        take(RowBatches(stream, stream.start(), 0, 2, 1), 1)
    assert str(raised.value) == "document 0 of 3"
    assert any("cut_row" in note for note in raised.value.__notes__), "where it was raised"


def test_an_exception_that_cannot_be_sent_is_told():
    stream = stream_of(Faulty(NotSendableError))
    with pytest.raises(RuntimeError, match="NotSendableError: document 0 of 3"):
        take(RowBatches(stream, stream.start(), 0, 2, 1), 1)


def test_a_killed_process_is_noticed(stream):
    iterator = iter(RowBatches(stream, stream.start(), 0, ROWS, 2))
    next(iterator)
    children()[0].kill()
    with pytest.raises(RuntimeError, match=r"data.workers: process \d+ ended early .*-9"):
        deque(iterator, maxlen=0)
    iterator.close()


def test_sources_that_cannot_be_sent_are_refused():
    documents = numbered_documents([50])
    stream = stream_of([*documents])
    stream.unpicklable = lambda: None
    with pytest.raises(UserError, match=r"data.workers: the sources cannot be sent .* set it to 0"):
        take(RowBatches(stream, stream.start(), 0, 2, 1), 1)


RUN = """
import multiprocessing, os, signal, sys, time

def main():
    sys.path.insert(0, {tests!r})
    from reconstruction import SPECIAL, numbered_documents
    from t5g2.data.loader import RowBatches
    from t5g2.data.mixture import Mixture, Source
    from t5g2.data.packing import RowStream
    asked = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.append(1))
    source = Source(name="text", documents=numbered_documents([900] * 20))
    stream = RowStream(Mixture(sources=(source,), special=SPECIAL), 4, 256, 256, 0)
    batches = RowBatches(stream, stream.start(), 0, 4, 2).prefetched()
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    while not asked:
        time.sleep(0.02)
    for _ in range(12):
        next(batches)
    print("saved", flush=True)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def run(tmp_path) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """A process with two workers, in a process group of its own, that waits for a signal."""
    script = tmp_path / "run.py"
    script.write_text(RUN.format(tests=str(Path(__file__).parent)))
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    yield process, pids
    process.kill()
    process.communicate()


def ended(pids: list[int]) -> bool:
    for _ in range(100):
        if not any(is_running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_of_a_run_leaves_it_its_batches(run, number):
    process, pids = run
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=20)
    assert out == "saved\n"
    assert "Traceback" not in err.split("Exception ignored")[0]
    assert process.returncode == 0
    assert ended(pids)


def test_no_process_outlives_a_killed_run(run):
    process, pids = run
    process.kill()
    assert ended(pids)
