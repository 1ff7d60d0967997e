"""New directories: all or nothing, and nothing left of earlier attempts."""

import os
import subprocess
import sys

import pytest

from t5g2.files import new_directory

KILLED = """
import os, signal, sys, time
from pathlib import Path
from t5g2.files import new_directory
with new_directory(Path(sys.argv[1])) as partial:
    (partial / "file").touch()
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.communicate()


def test_what_a_killed_process_left_is_removed_by_the_next(other, tmp_path):
    other.kill()
    other.wait()
    assert [path.name for path in tmp_path.iterdir()] == [f".out.{other.pid}.partial"]
    with new_directory(tmp_path / "out") as partial:
        (partial / "whole").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_process_is_at_work_on_is_left_alone(other, tmp_path):
    with new_directory(tmp_path / "out") as partial:
        assert partial.name == f".out.{os.getpid()}.partial"
    assert (tmp_path / f".out.{other.pid}.partial" / "file").exists()
