"""Bit flips, truncations and lost files in a checkpoint that a run made: none goes unnoticed."""

import random
import shutil

import pytest
from recovery import train

from t5g2.checkpoints.manifest import DamagedError, verify

pytestmark = pytest.mark.slow


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def lengthen(path, rng):
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def lose(path, rng):
    path.unlink()


def test_every_damage_to_every_file_is_found_and_named(undisturbed, tmp_path, record_property):
    checkpoint = shutil.copytree(undisturbed / "checkpoints" / "12", tmp_path / "12")
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    rng, injected = random.Random(0), 0
    for path in files:
        sound = path.read_bytes()
        for damage in (*[flip] * 10, *[truncate] * 5, *[lengthen] * 2, lose):
            if not sound and damage in (flip, truncate):
                continue
            damage(path, rng)
            injected += 1
            with pytest.raises(DamagedError) as caught:
                verify(checkpoint)
            assert str(path) in str(caught.value)
            path.write_bytes(sound)
    assert verify(checkpoint) is not None
    assert injected >= 200
    record_property("injected", injected)
    print(f"{injected} damages to {len(files)} files, all found")


def test_a_run_with_two_damaged_checkpoints_goes_on_from_the_third(recipe, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "train.stop_at=9") == 0
    flip(run_dir / "checkpoints" / "9" / "meta" / "metadata", random.Random(1))
    lose(run_dir / "checkpoints" / "6" / "manifest.json", None)
    assert train(recipe, run_dir, "train.stop_at=9") == 0
    assert "going on from step 3 instead" in capsys.readouterr().err
