"""Manifests: no flipped bit, no truncated and no missing file of a checkpoint stays unnoticed."""

import json
import random
import shutil

import numpy as np
import pytest

from t5g2.checkpoints.manifest import MANIFEST, DamagedError, verify, write_manifest
from t5g2.checkpoints.store import open_arrays, read_arrays, read_meta, write_parameters
from t5g2.errors import UserError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "7"
    (path / "tokenizer").mkdir(parents=True)
    (path / "tokenizer" / "tokenizer.model").write_bytes(bytes(range(256)))
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(50, 60)).astype(np.float32), "b": {"c": np.zeros(5)}}
    meta = {"step": 7, "model": "one", "tokenizer": "tokenizer", "config_hash": "ab", "digest": 5}
    write_parameters(path, params, meta)
    return path


@pytest.fixture
def checkpoint(original, tmp_path):
    return shutil.copytree(original, tmp_path / "7")


def all_files(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_a_sound_checkpoint_verifies_wherever_it_is_moved(checkpoint):
    verdict = verify(checkpoint)
    files = [path for path in all_files(checkpoint) if path.name != MANIFEST]
    assert verdict == (len(files), sum(path.stat().st_size for path in files))
    assert verdict.files > 5
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    assert manifest["arrays"] == {"params/a": ["float32", [50, 60]], "params/b/c": ["float64", [5]]}
    assert (manifest["step"], manifest["config_hash"], manifest["digest"]) == (7, "ab", 5)


def flip_a_bit(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def remove(path, rng):
    path.unlink()


@pytest.mark.parametrize(("damage", "times"), [(flip_a_bit, 20), (truncate, 5), (remove, 1)])
def test_damage_to_any_file_is_found_and_the_file_named(checkpoint, damage, times):
    rng = random.Random(0)
    for path in all_files(checkpoint):
        sound = path.read_bytes()
        for _ in range(times if sound else 1):
            if not sound and damage is not remove:
                continue
            damage(path, rng)
            with pytest.raises(DamagedError) as caught:
                verify(checkpoint)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
            path.write_bytes(sound)
    assert verify(checkpoint) is not None


def test_every_way_of_reading_verifies_first(checkpoint):
    data = max((checkpoint / "params").rglob("*"), key=lambda path: path.stat().st_size)
    flip_a_bit(data, random.Random(1))
    for read in (read_arrays, open_arrays):
        with pytest.raises(UserError, match=f"{data}: its checksum differs"):
            read(checkpoint / "params")
    flip_a_bit(checkpoint / "meta" / "metadata", random.Random(1))
    with pytest.raises(UserError, match="metadata: its checksum differs"):
        read_meta(checkpoint)


def test_many_damaged_files_are_counted_and_the_first_named(checkpoint):
    names = all_files(checkpoint)
    for path in names:
        if path.name != MANIFEST:
            path.write_bytes(b"x" * (path.stat().st_size + 1))
    with pytest.raises(DamagedError, match=f"and {len(names) - 4} more"):
        verify(checkpoint)


def test_a_whole_manifest_of_a_newer_format_is_refused_by_name(checkpoint):
    write_manifest(checkpoint, {"format": 99})
    with pytest.raises(UserError, match="format 99; this t5g2 reads up to") as caught:
        verify(checkpoint)
    assert not isinstance(caught.value, DamagedError)
