"""What happens to long runs: damage and full disks. The same command mends them, to the bit.

The dear ones of these tests are in `tests/faults`.
"""

import concurrent.futures
import re
import subprocess

from recovery import assert_equal_to_the_bit, damage, steps, train, warnings

from t5g2 import cli
from t5g2.checkpoints import keeping


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


def test_a_run_that_can_save_nothing_ends_at_once(recipe, tmp_path, full_disk, capsys):
    full_disk(1)
    assert train(recipe, tmp_path / "run") == 2
    assert "step 3 could not be saved" in capsys.readouterr().err.splitlines()[-1]
