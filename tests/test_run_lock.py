"""One trainer a run directory, whoever it is and however it ended."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from t5g2.errors import UserError
from t5g2.run_lock import LOCK_FILE, run_lock

HOLDER = """
import sys, time
from pathlib import Path
from t5g2.run_lock import run_lock
with run_lock(Path(sys.argv[1])) as told:
    print(told, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold():
    processes = []

    def start(run_dir):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(run_dir)], stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_the_second_trainer_is_refused_and_told_who_is_at_work(hold, tmp_path):
    holder, told = hold(tmp_path / "run")
    assert told == "None"
    owner = f"{tmp_path / 'run'} is being trained by process {holder.pid} on {os.uname().nodename}"
    for _ in range(2):  # to be refused does not break the lock
        with pytest.raises(UserError, match=owner), run_lock(tmp_path / "run"):
            pass


def test_the_lock_of_a_killed_trainer_is_free_and_recognised(hold, tmp_path):
    holder, _ = hold(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with run_lock(tmp_path) as told:
        assert told is not None
        assert f"killed here: process {holder.pid} on" in told
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_trainer_that_ended_or_failed_leaves_nothing_to_tell(tmp_path):
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError
    with run_lock(tmp_path) as told:
        assert told is None


def test_a_child_that_outlives_its_trainer_does_not_hold_the_lock(hold, tmp_path):
    # A forked child does not tidy up: threads that it has no longer would be waited for.
    forking = HOLDER.replace("time.sleep(60)", "import os; os.fork(); time.sleep(3); os._exit(0)")
    process = subprocess.Popen(
        [sys.executable, "-c", forking, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    time.sleep(0.5)
    process.kill()
    process.wait()
    with run_lock(tmp_path) as told:
        assert "killed" in told


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="run cannot be written: Not a directory"),
        run_lock(tmp_path / "file" / "run"),
    ):
        pass
