"""Whole runs in a bucket: what they make is what a run on a file system makes, to the bit."""

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import bucket
import pytest
from recovery import FAST, assert_equal_to_the_bit, losses

from t5g2 import cli, run_lease
from t5g2.checkpoints.directory import saved_checkpoints
from t5g2.checkpoints.store import read_meta
from t5g2.files import to_path

pytestmark = pytest.mark.slow

_JOB = """
import sys, bucket
bucket.use()
from t5g2 import cli, run_lease
run_lease._SETTLING_SECONDS = 0.0
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def objects(monkeypatch):
    monkeypatch.setattr(run_lease, "_SETTLING_SECONDS", 0.0)
    with bucket.bucket_here(monkeypatch) as found:
        yield found


def start(recipe, run_dir, *bindings):
    command = ["train", "--run_dir", str(run_dir), "--gin_file", str(recipe)]
    tests = Path(__file__).parent
    return subprocess.Popen(
        [sys.executable, "-c", _JOB, *command, *(f"--gin.{b}" for b in (*FAST, *bindings))],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"},
    )


def test_a_run_killed_at_random_moments_goes_on_to_the_bit(objects, recipe, undisturbed):
    run_dir, rng = to_path("gs://bucket/runs/one"), random.Random(0)
    for _ in range(4):
        process = start(recipe, run_dir)
        puts = len(objects.puts)
        # Moments of the run, not of Python's start: after so many further objects.
        until = puts + rng.randint(1, 150)
        while len(objects.puts) < until and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.communicate()
    process = start(recipe, run_dir)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert_equal_to_the_bit(run_dir, undisturbed)
    assert not any(".partial" in name for name in objects.content)


def test_damage_is_set_aside_and_the_run_goes_on_from_before(objects, recipe, undisturbed):
    run_dir = to_path("gs://bucket/runs/one")
    process = start(recipe, run_dir, "train.stop_at=9")
    assert process.wait() == 0
    name = max(
        (name for name in objects.content if "/checkpoints/9/params/" in name),
        key=lambda name: len(objects.content[name]),
    )
    content = bytearray(objects.content[name])
    content[len(content) // 2] ^= 4
    objects.content[name] = bytes(content)
    process = start(recipe, run_dir)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert_equal_to_the_bit(run_dir, undisturbed)
    aside = name.replace("/9/", "/9.damaged-1/")
    assert objects.content[aside] == bytes(content)


def test_two_processes_write_one_run(objects, recipe, undisturbed):
    run_dir = to_path("gs://bucket/runs/two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = (f"hosts.coordinator=localhost:{port}", "hosts.count=2")
    both = [start(recipe, run_dir, *hosts, f"hosts.index={index}") for index in range(2)]
    told = [process.communicate(timeout=400)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    ours, theirs = losses(run_dir), losses(undisturbed)
    assert ours.keys() == theirs.keys()
    for step, (loss, *_) in ours.items():
        assert loss == pytest.approx(theirs[step][0], rel=1e-5)
    assert [c.step for c in saved_checkpoints(run_dir / "checkpoints")] == [3, 6, 9, 12]


def test_the_other_jobs_read_and_write_there(objects, recipe, tmp_path, capfd):
    run_dir = to_path("gs://bucket/runs/one")
    assert start(recipe, run_dir).wait() == 0

    def job(*arguments):
        assert cli.main([*map(str, arguments)]) == 0
        return capfd.readouterr().out

    newest = run_dir / "checkpoints" / "12"
    assert "yes: " in job("inspect", "checkpoint", newest)
    assert "held-out loss" in job("evaluate", "--run_dir", run_dir)
    job("inspect", "data", "--run_dir", run_dir)
    job("average", "--run_dir", run_dir, "--last", 3, "--out", "gs://bucket/mean")
    assert read_meta(to_path("gs://bucket/mean"))["averaged_steps"] == [6, 9, 12]
    job("export", "--checkpoint", "gs://bucket/mean", "--out", "gs://bucket/hf")
    job("export", "--checkpoint", "gs://bucket/mean", "--out", tmp_path / "hf")
    for path in (tmp_path / "hf").iterdir():
        assert objects.content[f"bucket/hf/{path.name}"] == path.read_bytes()
    asked = ("--text", "import <sentinel_0> os", "--max_new_tokens", 8)
    said = job("generate", "--checkpoint", "gs://bucket/hf", *asked)
    assert said == job("generate", "--checkpoint", "gs://bucket/mean", *asked)
    # A run that starts from a checkpoint there.
    process = start(recipe, tmp_path / "next", f"train.init_from='{newest}'", "train.stop_at=1")
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
