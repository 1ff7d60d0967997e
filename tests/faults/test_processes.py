"""Runs of several processes: a disk that fails one of them, and other numbers of processes."""

import shutil
import socket
import subprocess
import time

import pytest
from recovery import FAST, losses, start, steps, train, warnings

pytestmark = pytest.mark.slow
limiting = pytest.mark.skipif(shutil.which("prlimit") is None, reason="no prlimit here")
# Enough for the logs of a run, and for no file with a model's parameters.
LITTLE = 20_000


def begin(recipe, run_dir, count, *bindings, limits=None):
    """Starts the processes of a run; `limits` by index, in bytes, of how large a file may be."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    hosts = (f"hosts.coordinator={address}", f"hosts.count={count}") if count > 1 else ()
    return [
        start(
            recipe,
            run_dir,
            *(*FAST, *hosts, *bindings),
            *([f"hosts.index={index}"] if hosts else []),
            limit_bytes=(limits or {}).get(index),
        )
        for index in range(count)
    ]


def end(processes):
    written = [process.communicate(timeout=400)[1] for process in processes]
    return [process.returncode for process in processes], written


def failed_saves(run_dir):
    return [told for told in warnings(run_dir) if "could not be saved" in told]


@limiting
@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_that_one_of_two_processes_cannot_write_is_tried_again_by_both(
    recipe, undisturbed, tmp_path, failing
):
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "train.stop_at=3") == 0
    split = ("mesh.data=1", "mesh.fsdp=2")
    processes = begin(recipe, run_dir, 2, *split, limits={failing: LITTLE})
    while not failed_saves(run_dir):
        assert all(process.poll() is None for process in processes), end(processes)
        time.sleep(0.005)
    lifted = ["prlimit", "--pid", str(processes[failing].pid), "--fsize=unlimited:"]
    subprocess.run(lifted, check=True)
    codes, written = end(processes)
    assert codes == [0, 0], written
    told = failed_saves(run_dir)[0]
    assert "File too large" in told
    assert "the checkpoint of step 3 stands" in told
    assert ("(process 1)" in told) == (failing == 1)
    assert {"3", "12"} <= steps(run_dir)
    assert not list((run_dir / "checkpoints").glob(".*"))
    assert_same_trajectory(run_dir, undisturbed)


@limiting
def test_two_processes_of_which_one_can_save_nothing_end_in_one_line_each(recipe, tmp_path):
    split = ("mesh.data=1", "mesh.fsdp=2")
    processes = begin(recipe, tmp_path / "run", 2, *split, limits={1: LITTLE})
    codes, written = end(processes)
    assert codes == [2, 2], written
    for text in written:
        assert "step 3 could not be saved" in text
        assert "make room, or name another --run_dir" in text
        assert "Traceback" not in text


def test_a_run_goes_on_in_four_processes_in_two_and_in_one(recipe, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    for count, stop in ((1, 3), (4, 6), (2, 9), (1, None)):
        codes, written = end(begin(recipe, run_dir, count, f"train.stop_at={stop}"))
        assert codes == [0] * count, written
    assert_same_trajectory(run_dir, undisturbed)


def assert_same_trajectory(run_dir, other):
    """The same data, and losses that differ by no more than the order of sums makes."""
    ours, theirs = losses(run_dir), losses(other)
    assert ours.keys() == theirs.keys()
    for step, (loss, *_, digest) in ours.items():
        assert digest == theirs[step][-1]
        assert loss == pytest.approx(theirs[step][0], rel=1e-5)
