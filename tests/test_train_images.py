"""The job `t5g2 train` on pictures and text: goes on exactly, and what it leaves reads images."""

import json
import os
import re

import numpy as np
import pytest
from image_corpus import write_image_recipe
from PIL import Image

import t5g2
from t5g2 import cli
from t5g2.reporting.metrics_log import read_metrics

os.environ.setdefault("HF_HUB_OFFLINE", "1")

BARE = ("finish.samples=0", "finish.export=False", "finish.average_last=0")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, standard_library):
    return write_image_recipe(tmp_path_factory.mktemp("recipe"), standard_library(200_000))


def train(recipe, run_dir, *bindings):
    """Runs the job in this process and returns its exit code."""
    flags = [f"--gin.{binding}" for binding in bindings]
    return cli.main(["train", "--run_dir", str(run_dir), "--gin_file", str(recipe), *flags])


def trajectory(run_dir):
    rows = read_metrics(run_dir / "metrics.jsonl").train
    exact = ("loss", "by_task", "grad_norm", "tokens", "data_digest")
    return {row["step"]: {name: row[name] for name in exact} for row in rows}


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert train(recipe, run_dir) == 0
    return run_dir


def test_a_run_learns_from_pictures_and_shows_what_it_says_of_them(finished):
    history = read_metrics(finished / "metrics.jsonl")
    first, last = history.train[0]["by_task"], history.eval[-1]["by_task"]
    assert last["pictures/prefix"] < first["pictures/prefix"]
    samples = json.loads((finished / "samples.json").read_text())
    (shown,) = [sample for sample in samples if sample["task"] == "pictures/prefix"]
    assert "<start_of_image><image_soft_token>×4<end_of_image>" in shown["input"]
    assert re.match(r"<sentinel_0>a \w+ square", shown["target"])


def test_the_export_is_one_that_transformers_reads_with_its_images(finished, tmp_path):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(finished / "export")
    image = Image.fromarray(np.full((31, 40, 3), (30, 40, 220), np.uint8))
    image.save(tmp_path / "blue.png")
    prompt = "<start_of_image>"
    made = processor(images=[[image]], text=[prompt], return_tensors="np")
    model = t5g2.load(finished / "export")
    ours = model.encode(prompt, [tmp_path / "blue.png"])
    assert made["input_ids"][0].tolist() == ours.ids[:-1].tolist()
    assert ours.ids[-1] == model.tokenizer.sentinel_ids[0]
    assert made["pixel_values"].shape == (1, 3, 28, 28)
    assert isinstance(model.generate("", image=tmp_path / "blue.png", max_new_tokens=3), str)


def test_a_run_goes_on_exactly_with_processes(recipe, finished, tmp_path):
    assert train(recipe, tmp_path / "run", *BARE, "train.stop_at=6") == 0
    assert train(recipe, tmp_path / "run", *BARE, "data.workers=2") == 0
    assert trajectory(tmp_path / "run") == trajectory(finished)


@pytest.mark.slow
def test_a_run_goes_on_from_what_its_tower_made_of_the_images(recipe, finished, tmp_path, capsys):
    run_dir, features = tmp_path / "run", tmp_path / "features"
    assert train(recipe, run_dir, *BARE, "train.stop_at=6") == 0
    vision = ["--vision", str(run_dir / "checkpoints" / "6")]
    assert cli.main(["cache", "--out", str(features), "--gin_file", str(recipe), *vision]) == 0
    own = (*BARE, f"corpus.cache={features}")
    assert train(recipe, run_dir, *own) == 2
    assert "accept it by train.accept_changes = True" in capsys.readouterr().err
    assert train(recipe, run_dir, *own, "train.accept_changes=True") == 0
    expected, found = trajectory(finished), trajectory(run_dir)
    assert found.keys() == expected.keys()
    for step, row in found.items():
        assert row["tokens"] == expected[step]["tokens"]
        # Visual tokens are stored with the 8 bits of bfloat16.
        assert row["loss"] == pytest.approx(expected[step]["loss"], rel=2**-8)

    assert train(recipe, tmp_path / "other", *own, "train.seed=1") == 2
    assert "were made by another vision tower" in capsys.readouterr().err.splitlines()[-1]
