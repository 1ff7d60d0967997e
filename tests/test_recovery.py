"""What happens to long runs: damage, full disks, kills. The same command mends them, to the bit."""

import concurrent.futures
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from small_run import write_corpus, write_recipe

from t5g2 import cli
from t5g2.checkpoints import keeping
from t5g2.checkpoints.manifest import verify
from t5g2.checkpoints.store import read_arrays, read_meta
from t5g2.reporting.metrics_log import read_metrics


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, standard_library):
    home = tmp_path_factory.mktemp("recipe")
    corpus = write_corpus(home / "corpus", standard_library(300_000))
    return write_recipe(home / "recipe.gin", corpus)


FAST = ("finish.samples=0", "finish.export=False")


def train(recipe, run_dir, *bindings):
    flags = [f"--gin.{binding}" for binding in (*FAST, *bindings)]
    return cli.main(["train", "--run_dir", str(run_dir), "--gin_file", str(recipe), *flags])


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train(recipe, run_dir) == 0
    return run_dir


def losses(run_dir):
    rows = read_metrics(run_dir / "metrics.jsonl").train
    exact = ("loss", "grad_norm", "learning_rate", "tokens", "data_digest")
    return {row["step"]: [row[name] for name in exact] for row in rows}


def warnings(run_dir):
    events = read_metrics(run_dir / "metrics.jsonl").events
    return [event["message"] for event in events if event["level"] == "warning"]


def assert_equal_to_the_bit(run_dir, other):
    assert losses(run_dir) == losses(other)
    for name in ("checkpoints/12", "averaged"):
        ours, theirs = (read_arrays(where / name / "params") for where in (run_dir, other))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert read_meta(run_dir / name)["digest"] == read_meta(other / name)["digest"]
    averaged = [read_meta(where / "averaged")["averaged_steps"] for where in (run_dir, other)]
    assert averaged == [[9, 12], [9, 12]]


def steps(run_dir):
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def damage(checkpoint):
    path = max((checkpoint / "params").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    return path


def test_a_damaged_checkpoint_is_set_aside_and_training_goes_on_from_the_one_before(
    recipe, undisturbed, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "train.stop_at=9") == 0
    path = damage(run_dir / "checkpoints" / "9")
    bad = path.read_bytes()
    assert train(recipe, run_dir) == 0
    told = rf"{path}: its checksum differs.*set aside as .*9.damaged-1; going on from step 6"
    assert re.search(told, capsys.readouterr().err)
    assert any(re.search(told, warning) for warning in warnings(run_dir))
    assert_equal_to_the_bit(run_dir, undisturbed)
    assert steps(run_dir) == {"3", "6", "9", "9.damaged-1", "12"}
    aside = run_dir / "checkpoints" / "9.damaged-1"
    assert (aside / path.relative_to(run_dir / "checkpoints" / "9")).read_bytes() == bad


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_nothing_is_touched(
    recipe, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "train.stop_at=3") == 0
    path = damage(run_dir / "checkpoints" / "3")
    assert train(recipe, run_dir) == 2
    assert f"verifies; the newest: {path}: its checksum differs" in capsys.readouterr().err
    assert steps(run_dir) == {"3"}


def test_a_checkpoint_found_damaged_at_the_end_is_left_out_of_the_average(recipe, tmp_path):
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "train.stop_at=9") == 0
    damage(run_dir / "checkpoints" / "6")
    assert train(recipe, run_dir, "finish.average_last=3") == 0
    assert read_meta(run_dir / "averaged")["averaged_steps"] == [3, 9, 12]
    assert any("6.damaged-1" in warning for warning in warnings(run_dir))


def test_jobs_name_the_damaged_file(recipe, undisturbed, tmp_path, capsys):
    out = tmp_path / "out"
    sound = undisturbed / "checkpoints" / "12"
    assert cli.main(["inspect", "checkpoint", str(sound)]) == 0
    assert re.search(r"verified: +yes: \d+ files", capsys.readouterr().out)
    copied = tmp_path / "run"
    subprocess.run(["cp", "-r", undisturbed, copied], check=True)
    bad = copied / "checkpoints" / "12"
    path = damage(bad)
    for command in (
        ["inspect", "checkpoint", bad],
        ["export", "--checkpoint", bad, "--out", out],
        ["evaluate", "--checkpoint", bad],
        ["generate", "--checkpoint", bad, "--text", "x"],
        ["average", "--run_dir", copied, "--last", 2, "--out", out],
    ):
        assert cli.main([str(word) for word in command]) == 2
        assert f"{path}: its checksum differs" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_temporary_checkpoints_come_by_the_clock_and_only_the_newest_stays(
    recipe, undisturbed, tmp_path
):
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "checkpoints.minutes=1e-9", "train.stop_at=11") == 0
    assert steps(run_dir) == {"3", "6", "9", "11"}
    assert train(recipe, run_dir, "checkpoints.minutes=None") == 0
    # What was averaged does not depend on where the run was stopped.
    assert_equal_to_the_bit(run_dir, undisturbed)
    assert steps(run_dir) == {"3", "6", "9", "11", "12"}


def test_the_last_ones_and_those_of_a_period_are_kept(recipe, tmp_path):
    settings = ("checkpoints.every=1", "checkpoints.keep=1", "checkpoints.keep_period=5")
    assert train(recipe, tmp_path / "run", *settings) == 0
    assert steps(tmp_path / "run") == {"5", "10", "11", "12"}  # finish averages two


def test_a_checkpoint_in_use_is_not_pruned(recipe, tmp_path):
    run_dir = tmp_path / "run"
    settings = ("checkpoints.every=1", "checkpoints.keep=1", "train.stop_at=4")
    assert train(recipe, run_dir, *settings) == 0
    with keeping.in_use([run_dir / "checkpoints" / "3"]):
        assert train(recipe, run_dir, *settings[:2], "train.stop_at=8") == 0
        assert steps(run_dir) == {"3", "7", "8"}
    assert train(recipe, run_dir, *settings[:2]) == 0
    assert steps(run_dir) == {"11", "12"}


@pytest.fixture
def full_disk(monkeypatch):
    """`full_disk(n, m, ...)`: the n-th, m-th, ... checkpoint from now finds no room."""
    write, count = keeping.write_manifest, 0

    def fill(*numbers):
        def write_or_fail(checkpoint, facts):
            nonlocal count
            count += 1
            if count in numbers:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(checkpoint))
            write(checkpoint, facts)

        monkeypatch.setattr(keeping, "write_manifest", write_or_fail)

    monkeypatch.setattr(keeping, "_DELAYS_AT_THE_END", (0.0, 0.0))
    return fill


def test_a_save_that_fails_is_told_and_tried_again_while_training_goes_on(
    recipe, undisturbed, tmp_path, full_disk, monkeypatch
):
    ask = keeping.CheckpointStore.wants_save

    def wants_save(store):
        if store._pending is not None:  # steps are faster than saves here
            concurrent.futures.wait([store._pending[1]])
        return ask(store)

    monkeypatch.setattr(keeping.CheckpointStore, "wants_save", wants_save)
    monkeypatch.setattr(keeping, "_FIRST_DELAY", 0.0)
    full_disk(2)
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir) == 0
    assert_equal_to_the_bit(run_dir, undisturbed)
    (told,) = warnings(run_dir)
    assert "step 6 could not be saved" in told
    assert "No space left on device; the checkpoint of step 3 stands" in told
    assert steps(run_dir) == {"3", "7", "9", "12"}


def test_the_last_save_insists_and_then_says_where_the_run_stands(
    recipe, undisturbed, tmp_path, full_disk, capsys
):
    run_dir = tmp_path / "run"
    full_disk(4, 5, 6, 7)
    assert train(recipe, run_dir) == 2
    assert "the same command goes on from step 9" in capsys.readouterr().err.splitlines()[-1]
    assert steps(run_dir) == {"3", "6", "9"}
    assert train(recipe, run_dir) == 0
    assert_equal_to_the_bit(run_dir, undisturbed)


def test_a_run_that_can_save_nothing_ends_at_once(recipe, tmp_path, full_disk, capsys):
    full_disk(1)
    assert train(recipe, tmp_path / "run") == 2
    assert "step 3 could not be saved" in capsys.readouterr().err.splitlines()[-1]


def start(recipe, run_dir, *bindings, limit_bytes=None):
    command = [sys.executable, "-m", "t5g2", "train", "--run_dir", str(run_dir)]
    if limit_bytes is not None:
        command = ["prlimit", f"--fsize={limit_bytes}", *command]
    flags = [f"--gin.{binding}" for binding in bindings]
    return subprocess.Popen(
        [*command, "--gin_file", str(recipe), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="no prlimit here")
def test_no_room_for_what_orbax_writes_ends_in_one_line_and_the_same_command_goes_on(
    recipe, undisturbed, tmp_path
):
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "train.stop_at=3") == 0
    # Enough for the logs and pictures of a run, and for no file with a model's parameters.
    process = start(recipe, run_dir, *FAST, limit_bytes=20_000)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 2, stderr
    assert "File too large: make room; the same command goes on from step 3" in stderr
    assert "Traceback" not in stderr
    assert steps(run_dir) == {"3"}
    assert train(recipe, run_dir) == 0
    assert losses(run_dir) == losses(undisturbed)


def test_what_killed_runs_left_is_removed_and_said(recipe, undisturbed, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "train.stop_at=6") == 0
    remains = (
        "checkpoints/.9.partial/params",
        "checkpoints/.12.partial.orbax-checkpoint-tmp/params",
        "checkpoints/.3.pruned/params",
        ".averaged.77.partial/params",
    )
    for name in remains:
        (run_dir / name).mkdir(parents=True)
    (run_dir / ".samples.json.77.tmp").touch()
    assert train(recipe, run_dir) == 0
    (told,) = re.findall("removed what a killed run left: (.*)", capsys.readouterr().err)
    assert len(told.split(", ")) == 5
    assert_equal_to_the_bit(run_dir, undisturbed)
    assert not list(run_dir.rglob(".*"))


KILLS = 12


@pytest.mark.slow
def test_kills_at_random_moments_leave_nothing_that_the_same_command_does_not_mend(
    recipe, tmp_path, record_property
):
    """A save, a prune and an average are never far: most of the kills meet one of them."""
    settings = (
        "checkpoints.every=1",
        "checkpoints.keep=2",
        "finish.samples=0",
        "train.total_steps=25",
    )
    whole, run_dir = tmp_path / "whole", tmp_path / "run"

    def until_it_starts(process):
        for line in process.stderr:
            if line.startswith(("initialising: ", "restoring step")):
                return time.monotonic()
        raise AssertionError("the run ended before it started")

    process = start(recipe, whole, *settings)
    began = until_it_starts(process)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    duration = time.monotonic() - began
    seed = time.time_ns()
    record_property("seed", seed)
    rng, killed_at = random.Random(seed), []
    for _ in range(KILLS):
        process = start(recipe, run_dir, *settings)
        until_it_starts(process)
        time.sleep(rng.uniform(0, 0.5 * duration))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed_at.append(max((int(name) for name in steps(run_dir) if name.isdigit()), default=0))
    process = start(recipe, run_dir, *settings)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert len(set(killed_at)) > 2, killed_at
    assert losses(run_dir) == losses(whole)
    for name in ("checkpoints/25", "averaged"):
        ours, theirs = (read_arrays(where / name / "params") for where in (run_dir, whole))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert verify(run_dir / name) is not None
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        ours, theirs = ((where / "export" / name).read_bytes() for where in (run_dir, whole))
        assert ours == theirs
    assert {path.name for path in run_dir.iterdir()} == {path.name for path in whole.iterdir()}
    summaries = [read_metrics(where).summary for where in (run_dir, whole)]
    assert len({json.dumps(row["checkpoints_averaged"]) for row in summaries}) == 1
