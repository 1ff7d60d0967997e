"""Averages: a plain mean, in whichever order, of one model's checkpoints only."""

import numpy as np
import pytest

from t5g2.checkpoints.average import average, write_average
from t5g2.checkpoints.store import FORMAT, read_arrays, read_meta, write_parameters
from t5g2.errors import UserError


def write(path, step, value, model="one"):
    path.mkdir(parents=True)
    params = {"a": np.full((2, 3), value, np.float32), "b": {"c": np.float32([value, -value])}}
    meta = {"step": step, "model": model, "tokenizer": "../tokenizer"}
    write_parameters(path, params, meta)
    return path


@pytest.fixture
def checkpoints(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_text("pieces")
    values = np.float32([0.1, 1e8, -1e8, 0.3, 7])
    return [write(tmp_path / str(i), i, value) for i, value in enumerate(values)]


def test_the_order_of_naming_does_not_matter(checkpoints):
    one, meta = average(checkpoints)
    other, _ = average(checkpoints[::-1])
    np.testing.assert_array_equal(one["a"], other["a"])
    np.testing.assert_array_equal(one["b"]["c"], other["b"]["c"])
    assert meta["averaged_steps"] == [0, 1, 2, 3, 4]


def test_what_is_frozen_keeps_its_bits(tmp_path):
    tower = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    paths = []
    for step in range(3):
        paths.append(tmp_path / str(step))
        paths[-1].mkdir()
        params = {"vision": {"w": tower}, "encoder": {"w": tower}}
        write_parameters(paths[-1], params, {"step": step, "model": "one", "tokenizer": "."})
    mean, _ = average(paths)
    np.testing.assert_array_equal(mean["vision"]["w"], tower)
    assert not np.array_equal(mean["encoder"]["w"], tower)  # a third of the sum of three is rounded


def test_the_written_average_stands_alone(checkpoints, tmp_path):
    out = tmp_path / "moved" / "average"
    out.parent.mkdir()
    write_average(checkpoints[3:], out)
    np.testing.assert_allclose(read_arrays(out / "params")["a"], 3.65)
    assert (out / read_meta(out)["tokenizer"] / "tokenizer.model").read_text() == "pieces"
    assert [path.name for path in out.parent.iterdir()] == ["average"]


def test_different_models_are_not_averaged(checkpoints, tmp_path):
    other = write(tmp_path / "other", 9, 1.0, model="another")
    with pytest.raises(UserError, match="different models"):
        write_average([*checkpoints, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_names_its_model_only_in_its_settings_is_read(checkpoints):
    metadata = checkpoints[0] / "meta" / "metadata"
    metadata.write_text(metadata.read_text().replace('"model": "one"', '"settings": {"model": 1}'))
    assert read_meta(checkpoints[0])["model"] == 1


def test_a_newer_format_and_what_is_no_checkpoint_are_refused_by_name(checkpoints, tmp_path):
    metadata = checkpoints[0] / "meta" / "metadata"
    metadata.write_text(metadata.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    with pytest.raises(UserError, match="format 99; this t5g2 reads up to"):
        average(checkpoints)
    with pytest.raises(UserError, match="tokenizer is not a t5g2 checkpoint"):
        average([tmp_path / "tokenizer"])
