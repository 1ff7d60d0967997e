"""Damage, full disks and interruptions of whole runs, and what is kept and pruned."""

import re
import shutil

import pytest
from recovery import FAST, assert_equal_to_the_bit, damage, losses, start, steps, train, warnings

from t5g2.checkpoints.directory import in_use
from t5g2.checkpoints.store import read_meta

pytestmark = pytest.mark.slow


def test_a_checkpoint_found_damaged_at_the_end_is_left_out_of_the_average(recipe, tmp_path):
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "train.stop_at=9") == 0
    damage(run_dir / "checkpoints" / "6")
    assert train(recipe, run_dir, "finish.average_last=3") == 0
    assert read_meta(run_dir / "averaged")["averaged_steps"] == [3, 9, 12]
    assert any("6.damaged-1" in warning for warning in warnings(run_dir))


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
    with in_use([run_dir / "checkpoints" / "3"]):
        assert train(recipe, run_dir, *settings[:2], "train.stop_at=8") == 0
        assert steps(run_dir) == {"3", "7", "8"}
    assert train(recipe, run_dir, *settings[:2]) == 0
    assert steps(run_dir) == {"11", "12"}


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
