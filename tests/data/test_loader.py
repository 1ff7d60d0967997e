import subprocess
import sys

import numpy as np
import pytest

from t5g2.data.loader import RowBatches, Step
from t5g2.data.packing import RowStream

ROWS = 8


@pytest.fixture
def stream(mixture) -> RowStream:
    return RowStream(mixture, ROWS, 256, 256, 0)


def batches_of(stream: RowStream, first: int = 0, count: int = ROWS, cursors=None) -> RowBatches:
    cursors = stream.start() if cursors is None else cursors
    return RowBatches(stream, cursors, first, count)


def take(iterator, count: int) -> list[Step]:
    return [next(iterator) for _ in range(count)]


@pytest.fixture
def expected(stream) -> list[Step]:
    return take(iter(batches_of(stream)), 6)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_read_what_one_host_reads(mixture, expected, hosts):
    count = ROWS // hosts
    steps = [
        take(iter(batches_of(RowStream(mixture, ROWS, 256, 256, 0), host * count, count)), 6)
        for host in range(hosts)
    ]
    for at, one in enumerate(expected):
        parts = [host[at] for host in steps]
        joined = {name: np.concatenate([part.batch[name] for part in parts]) for name in one.batch}
        np.testing.assert_equal(joined, one.batch)
        np.testing.assert_array_equal(np.concatenate([p.cursors for p in parts]), one.cursors)


def test_a_run_goes_on_from_its_cursors_on_another_number_of_hosts(stream, expected):
    cursors = expected[2].cursors
    resumed = [take(iter(batches_of(stream, first, 4, cursors)), 3) for first in (0, 4)]
    for at, one in enumerate(expected[3:]):
        joined = np.concatenate([host[at].batch["encoder_input_tokens"] for host in resumed])
        np.testing.assert_array_equal(joined, one.batch["encoder_input_tokens"])


@pytest.mark.parametrize("prefetched", [False, True])
def test_grain_s_own_state_resumes_exactly(stream, expected, prefetched):
    def iterator():
        return batches_of(stream).prefetched() if prefetched else iter(batches_of(stream))

    running = iterator()
    take(running, 2)
    state = running.get_state()
    np.testing.assert_equal(take(running, 4), expected[2:])
    for resumed in (running, iterator()):
        resumed.set_state(state)
        np.testing.assert_equal(take(resumed, 4), expected[2:])


def test_prefetching_changes_nothing(stream, expected):
    np.testing.assert_equal(take(batches_of(stream).prefetched(), 6), expected)


def test_two_iterators_of_one_dataset_do_not_disturb_one_another(stream, expected):
    dataset = batches_of(stream)
    one, other = iter(dataset), iter(dataset)
    for step in expected[:3]:
        np.testing.assert_equal(next(one), step)
        np.testing.assert_equal(next(other), step)


def test_a_batch_given_out_is_not_written_to_again(stream, expected):
    iterator = iter(batches_of(stream))
    first = next(iterator)
    take(iterator, 5)
    np.testing.assert_equal(first, expected[0])


def test_the_cursors_start_anew_in_every_dataset(stream, expected):
    start = stream.start()
    take(iter(batches_of(stream, cursors=start)), 3)
    assert not start.any()


def test_an_iterator_left_open_has_no_thread_when_python_is_taken_down():
    # A thread that is in C++ then aborts the process. Of what is to be done at exit, the first
    # that was registered is the last that is called.
    script = """
import atexit, threading
atexit.register(lambda: print([t.name for t in threading.enumerate() if t.daemon]))
import numpy as np
from t5g2.data.loader import RowBatches
from t5g2.data.mixture import Mixture, Source
from t5g2.data.packing import RowStream
from t5g2.data.ul2 import SpecialTokens
source = Source(name="text", documents=[np.arange(5000, 6000, dtype=np.int32)])
mixture = Mixture(sources=(source,), special=SpecialTokens(2, 1, range(10, 1010)))
rows = RowStream(mixture, 4, 512, 512, 0)
batches = RowBatches(rows, rows.start(), 0, 4).prefetched()
next(batches)
print([t.daemon for t in threading.enumerate()])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    while_open, at_exit = done.stdout.splitlines()
    assert "True" in while_open
    assert at_exit == "[]"
