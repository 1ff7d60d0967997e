"""Averages: a plain mean, in whichever order, of one model's checkpoints only."""

import numpy as np
import pytest

from t5g2.checkpoints.average import average, write_average
from t5g2.checkpoints.manifest import FORMAT, write_manifest
from t5g2.checkpoints.store import read_arrays, read_meta, write_parameters
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


def test_checkpoints_of_different_runs_are_not_averaged_but_other_data_may_have_come(tmp_path):
    def checkpoint(step, **settings):
        path = tmp_path / str(step)
        path.mkdir()
        sections = {"train": {"seed": 0, "stop_at": step}, "data": {"seed": 0}, **settings}
        meta = {"step": step, "model": "one", "tokenizer": ".", "settings": sections}
        write_parameters(path, {"a": np.ones(3, np.float32)}, meta)
        return path

    one, went_on = checkpoint(1), checkpoint(2, data={"seed": 1})
    assert average([one, went_on])[1]["averaged_steps"] == [1, 2]
    with pytest.raises(UserError, match=r"different runs \(train.seed: 0 -> 1\)"):
        average([one, checkpoint(3, train={"seed": 1})])


@pytest.mark.parametrize("sum_dtype", ["float32", "float64"])
def test_sums_are_of_the_precision_asked_for(tmp_path, sum_dtype):
    values = np.random.default_rng(0).normal(size=(5, 10_000)).astype(np.float32)
    values[0] *= 1e6
    paths = []
    for step, value in enumerate(values):
        paths.append(tmp_path / str(step))
        paths[-1].mkdir()
        write_parameters(paths[-1], {"a": value}, {"step": step, "model": "one", "tokenizer": "."})
    mean = np.asarray(average(paths, sum_dtype)[0]["a"])
    exact = values.astype(np.float64).mean(axis=0).astype(np.float32)
    assert np.array_equal(mean, exact) == (sum_dtype == "float64")
    np.testing.assert_allclose(mean, exact, rtol=1e-5, atol=0.1)


def of_the_first_format(checkpoint):
    """Makes a checkpoint one of before there were manifests."""
    (checkpoint / "manifest.json").unlink()
    metadata = checkpoint / "meta" / "metadata"
    metadata.write_text(metadata.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    return metadata


def test_a_checkpoint_that_names_its_model_only_in_its_settings_is_read(checkpoints):
    metadata = of_the_first_format(checkpoints[0])
    metadata.write_text(metadata.read_text().replace('"model": "one"', '"settings": {"model": 1}'))
    assert read_meta(checkpoints[0])["model"] == 1


def test_a_checkpoint_without_checksums_is_read_and_said_to_be_unverified(checkpoints, caplog):
    of_the_first_format(checkpoints[3])
    np.testing.assert_array_equal(read_arrays(checkpoints[3] / "params")["a"], np.float32(0.3))
    read_meta(checkpoints[3])
    (record,) = (r for r in caplog.records if r.name.startswith("t5g2"))
    assert f"{checkpoints[3]} was written before checkpoints had checksums" in record.message


def test_a_newer_format_and_what_is_no_checkpoint_are_refused_by_name(checkpoints, tmp_path):
    metadata = checkpoints[0] / "meta" / "metadata"
    metadata.write_text(metadata.read_text().replace(f'"format": {FORMAT}', '"format": 99'))
    write_manifest(checkpoints[0], {})
    with pytest.raises(UserError, match="format 99; this t5g2 reads up to"):
        average(checkpoints)
    with pytest.raises(UserError, match="tokenizer is not a t5g2 checkpoint"):
        average([tmp_path / "tokenizer"])
