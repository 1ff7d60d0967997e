"""The job `t5g2 train`: it learns, stops when asked, goes on exactly, refuses what cannot work."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import write_corpus, write_recipe

import t5g2
from t5g2 import cli
from t5g2.checkpoints.store import read_arrays
from t5g2.errors import UserError
from t5g2.reporting.metrics_log import read_metrics


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, standard_library):
    home = tmp_path_factory.mktemp("recipe")
    corpus = write_corpus(home / "corpus", standard_library(300_000))
    return write_recipe(home / "recipe.gin", corpus)


def train(recipe, run_dir, *bindings):
    """Runs the job in this process and returns its exit code."""
    flags = [f"--gin.{binding}" for binding in bindings]
    return cli.main(["train", "--run_dir", str(run_dir), "--gin_file", str(recipe), *flags])


def trajectory(run_dir):
    """What every step recorded that must not depend on interruptions."""
    rows = read_metrics(run_dir / "metrics.jsonl").train
    exact = ("loss", "by_task", "grad_norm", "learning_rate", "tokens", "data_digest")
    return {row["step"]: {name: row[name] for name in exact} for row in rows}


def parameters(run_dir, step):
    return read_arrays(run_dir / "checkpoints" / str(step) / "params")


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    assert train(recipe, run_dir) == 0
    return run_dir


def test_a_run_leaves_everything_behind(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.gin",
        "corpus.json",
        "tokenizer",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "averaged",
        "export",
        "samples.json",
        "loss.png",
        "report.html",
        "trainer.lock",
    } == names
    history = read_metrics(finished / "metrics.jsonl")
    assert [row["step"] for row in history.train] == list(range(1, 13))
    assert {(row["step"], row["weights"]) for row in history.eval} == {
        (6, "last"),
        (12, "last"),
        (12, "averaged"),
    }
    assert history.train[-1]["loss"] < history.train[0]["loss"]
    assert history.summary["checkpoints_averaged"] == [9, 12]
    samples = json.loads((finished / "samples.json").read_text())
    assert [sample["task"] for sample in samples] == ["prefix_75", "span32_50"]


def test_the_average_is_the_mean_of_the_checkpoints(finished):
    one, other = parameters(finished, 9), parameters(finished, 12)
    averaged = read_arrays(finished / "averaged" / "params")
    for a, b, mean in zip(*map(jax.tree.leaves, (one, other, averaged)), strict=True):
        np.testing.assert_array_equal(mean, (a + b) / np.float32(2))


def test_a_run_records_its_speed_in_flops_and_says_that_a_cpu_has_no_known_peak(finished, capsys):
    history = read_metrics(finished)
    facts, row = history.starts[0], history.train[-1]
    assert facts["peak_flops"] is None
    # Twice the parameters that a token passes, at least, three times with the backward pass.
    assert facts["model_flops"] > 6 * 4 * 96 * 16 * 2 * 32**2
    assert row["model_flops_per_second"] == pytest.approx(
        facts["model_flops"] / row["step_seconds"]
    )
    assert "mfu" not in row
    assert cli.main(["inspect", "run", str(finished)]) == 0
    assert "no MFU: no peak is known" in capsys.readouterr().out


def test_infillings_of_evaluations_show_how_they_change(recipe, tmp_path):
    run_dir, samples = tmp_path / "run", ("evaluation.samples=2", "finish.samples=2")
    assert train(recipe, run_dir, *samples, "evaluation.every=3", "train.stop_at=8") == 0
    assert train(recipe, run_dir, *samples, "evaluation.every=3") == 0
    lines = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], "passages" in line) for line in lines] == [
        (0, True), (3, False), (6, False), (8, True), (9, False), (12, False),
    ]  # fmt: skip
    assert lines[0]["passages"] == lines[3]["passages"]
    # The same passages that the finished run fills in.
    ends = json.loads((run_dir / "samples.json").read_text())
    assert [{**end, "prediction": None} for end in ends] == [
        {**passage, "prediction": None} for passage in lines[0]["passages"]
    ]
    page = (run_dir / "report.html").read_text()
    assert "Infillings over the run" in page
    assert "step 3<" in page
    assert "step 12<" in page


def test_a_finished_run_says_so_and_changes_nothing(recipe, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert train(recipe, finished) == 0
    assert "is complete (12 steps)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    recipe, finished, tmp_path, accumulation
):
    setting = f"train.accumulation={accumulation}"
    whole = finished
    if accumulation > 1:
        whole = tmp_path / "whole"
        assert train(recipe, whole, setting) == 0
    run_dir = tmp_path / "parts"
    # 7 is no multiple of the checkpoints' period: stopping saves.
    assert train(recipe, run_dir, setting, "train.stop_at=7") == 0
    assert not (run_dir / "averaged").exists()
    assert train(recipe, run_dir, setting) == 0
    assert trajectory(run_dir) == trajectory(whole)
    for ours, theirs in zip(
        *map(jax.tree.leaves, (parameters(run_dir, 12), parameters(whole, 12))), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_accumulation_and_meshes_give_the_same_losses(recipe, finished, tmp_path):
    assert train(recipe, tmp_path / "run", "train.accumulation=4", "finish.samples=0") == 0
    ours, theirs = trajectory(tmp_path / "run"), trajectory(finished)
    for step in theirs:
        assert ours[step]["data_digest"] == theirs[step]["data_digest"]
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5)
        assert ours[step]["grad_norm"] == pytest.approx(theirs[step]["grad_norm"], rel=1e-4)


def start(recipe, run_dir, *flags):
    command = [sys.executable, "-m", "t5g2", "train", "--run_dir", str(run_dir)]
    return subprocess.Popen(
        [*command, "--gin_file", str(recipe), *flags],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def wait_for_step(process, run_dir, step):
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (path.exists() and any(r["step"] >= step for r in read_metrics(path).train)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "the run makes no step"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(recipe, finished, tmp_path, number):
    run_dir = tmp_path / "run"
    process = start(recipe, run_dir)
    wait_for_step(process, run_dir, 1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    if process.returncode != 0:  # 0: it was done before the signal came
        assert process.returncode == 128 + number
        assert "goes on from there" in stderr
        assert "Traceback" not in stderr
        assert train(recipe, run_dir) == 0
    assert trajectory(run_dir) == trajectory(finished)


def test_virtual_devices_give_the_same_losses(recipe, finished, tmp_path):
    run_dir = tmp_path / "run"
    process = start(
        recipe,
        run_dir,
        "--gin.mesh.cpu_devices=4",
        "--gin.mesh.fsdp=2",
        "--gin.finish.samples=0",
    )
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    ours, theirs = trajectory(run_dir), trajectory(finished)
    for step in theirs:
        assert ours[step]["data_digest"] == theirs[step]["data_digest"]
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-5)


def one_line(capsys):
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("t5g2 ")
    assert ": error: " in error
    return error


def test_another_configuration_is_refused_by_name(recipe, finished, capsys):
    assert train(recipe, finished, "data.seed=1", "train.rows=8") == 2
    error = one_line(capsys)
    assert "data.seed: 0 -> 1; train.rows: 4 -> 8" in error


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["corpus.path=/nowhere/at/all"], "/nowhere/at/all is not a directory"),
        (["corpus.suffixes=('.md',)"], "no document below"),
        (["train.rows=4000"], "less than one batch"),
        (["data.inputs_length=20"], "too short for denoiser span32"),
        (["data.inputs_length=2000", "data.targets_length=2000"], "32"),
        (["model.vocab_size=400"], "model.vocab_size is 400"),
        (["tokenizer.path=/nowhere/tokenizer.model"], "/nowhere/tokenizer.model"),
        (["tokenizer.vocab_size=60000"], "vocab"),
        (["train.rows=6", "train.accumulation=4"], "accumulation (4) must divide rows (6)"),
        (["mesh.fsdp=3"], "does not fit"),
        (["train.total_step=5"], "did you mean 'total_steps'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(recipe, tmp_path, capsys, bindings, message):
    assert train(recipe, tmp_path / "run", *bindings) == 2
    assert message in one_line(capsys)
    # Nothing stands in the way of the corrected command.
    assert not (tmp_path / "run" / "config.gin").exists()


def test_a_document_that_is_not_utf8_is_named(recipe, tmp_path, capsys, standard_library):
    corpus = write_corpus(tmp_path / "corpus", standard_library(50_000))
    (corpus / "latin1.txt").write_bytes("über".encode("latin-1"))
    assert train(recipe, tmp_path / "run", f"corpus.path={corpus}") == 2
    assert "latin1.txt: not UTF-8" in one_line(capsys)


def test_a_directory_that_holds_something_else_is_left_alone(recipe, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert train(recipe, tmp_path) == 2
    assert "holds no run" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupted_preparation_with_other_settings_is_made_anew(recipe, tmp_path):
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "tokenizer.vocab_size=400", "model.vocab_size=399") == 2
    assert (run_dir / "tokenizer" / "tokenizer.model").exists()
    assert train(recipe, run_dir, "train.stop_at=1", "tokenizer.vocab_size=430") == 0
    model = t5g2.load(run_dir / "checkpoints" / "1")
    assert model.tokenizer.vocab_size == 430


def test_average_export_evaluate_generate_and_inspect_work_on_a_run(finished, tmp_path, capsys):
    def t5g2_says(*arguments: str | Path) -> str:
        assert cli.main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    out, exported = tmp_path / "averaged", tmp_path / "hf"
    assert "steps 9, 12" in t5g2_says("average", "--run_dir", finished, "--last", 2, "--out", out)
    t5g2_says("export", "--checkpoint", out, "--out", exported)
    evaluated = t5g2_says("evaluate", "--checkpoint", out)
    (recorded,) = (
        row for row in read_metrics(finished / "metrics.jsonl").eval if row["weights"] == "averaged"
    )
    assert f"held-out loss {recorded['loss']:.4f}" in evaluated
    arguments = ("--text", "def f(<sentinel_0>):", "--max_new_tokens", 8)
    ours = t5g2_says("generate", "--checkpoint", out, *arguments)
    assert ours == t5g2_says("generate", "--checkpoint", exported, *arguments)
    assert "span12_50" in t5g2_says("inspect", "data", "--run_dir", finished)
    assert "averaged steps:  9, 12" in t5g2_says("inspect", "checkpoint", out)
    config = t5g2_says("inspect", "config", "--gin_file", finished / "config.gin")
    assert "train.total_steps = 12" in config


def test_the_jobs_after_training_refuse_what_cannot_work(finished, tmp_path, capsys):
    def refused(*arguments: str | Path) -> str:
        assert cli.main([str(argument) for argument in arguments]) == 2
        return one_line(capsys)

    averaged, taken, new = finished / "averaged", tmp_path, tmp_path / "new"
    (taken / "file").touch()
    assert "has only 4 checkpoints (3, 6, 9, 12)" in refused(
        "average", "--run_dir", finished, "--last", 5, "--out", new
    )
    assert "not a run directory" in refused("average", "--run_dir", taken, "--out", new)
    assert "is not a t5g2 checkpoint" in refused("export", "--checkpoint", taken, "--out", new)
    assert "is not empty" in refused("export", "--checkpoint", averaged, "--out", taken)
    assert "is not empty" in refused("average", "--run_dir", finished, "--last", 2, "--out", taken)
    assert "not a directory" in refused("generate", "--checkpoint", new, "--text", "x")
    assert "has 32 sentinels" in refused(
        "generate", "--checkpoint", averaged, "--text", "<sentinel_99>"
    )
    assert "reads text alone" in refused(
        "generate", "--checkpoint", averaged, "--text", "x", "--image", taken / "file"
    )
    model = t5g2.load(averaged)
    with pytest.raises(UserError, match="no vision tower"):
        model.generate("x", image="photo.png")
    with pytest.raises(UserError, match="no vision tower"):
        model.logits(np.ones((1, 2), int), np.ones((1, 2), int), pixel_values=np.ones(1))
    assert not new.exists()


def test_a_run_may_learn_from_a_teacher(recipe, finished, tmp_path, capsys):
    """Starting as its own teacher: cross-entropy with itself is entropy, at most log V."""
    shared = [
        f"train.teacher={finished / 'export'}",
        f"tokenizer.path={finished / 'tokenizer'}",
    ]
    start = f"train.init_from={finished / 'averaged'}"
    assert train(recipe, tmp_path / "taught", *shared, start, "train.stop_at=2") == 0
    rows = read_metrics(tmp_path / "taught" / "metrics.jsonl").train
    assert len(rows) == 2
    assert rows[0]["loss"] + 0.1 < rows[0]["distilled_loss"] < np.log(512)
    capsys.readouterr()
    assert train(recipe, tmp_path / "other", shared[0], "tokenizer.vocab_size=400") == 2
    assert "has another vocabulary than the run" in capsys.readouterr().err
