"""The job `t5g2 train` goes on with other data if it is told that it may."""

import pytest
from small_run import write_corpus, write_recipe

from t5g2 import cli
from t5g2.checkpoints.store import read_meta
from t5g2.reporting.metrics_log import read_metrics

FAST = ("finish.samples=0", "finish.export=False", "evaluation.batches=1")


@pytest.fixture
def recipe(tmp_path, standard_library):
    corpus = write_corpus(tmp_path / "corpus", standard_library(300_000))
    return write_recipe(tmp_path / "recipe.gin", corpus)


def train(recipe, run_dir, *bindings):
    flags = [f"--gin.{binding}" for binding in (*FAST, *bindings)]
    return cli.main(["train", "--run_dir", str(run_dir), "--gin_file", str(recipe), *flags])


@pytest.mark.slow
def test_other_rows_rates_and_documents_are_refused_unless_accepted(recipe, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "train.stop_at=3") == 0
    denoiser = {"name": "short", "mean_span": 3.0, "corruption_rate": 0.3, "mode": "[R]"}
    changes = ("train.rows=8", f"data.denoisers=[{denoiser}]")
    assert train(recipe, run_dir, *changes) == 2
    refusal = capsys.readouterr().err.splitlines()[-1]
    for part in ("train.rows: 4 -> 8", "data.denoisers: 't5gemma2' -> "):
        assert part in refusal
    assert refusal.endswith("accept it by train.accept_changes = True")
    assert train(recipe, run_dir, *changes, "train.accept_changes=True", "train.seed=1") == 2
    assert "train.seed: 0 -> 1" in capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "corpus" / "new.txt").write_text("A document more. " * 500)
    assert train(recipe, run_dir, "train.stop_at=6") == 2
    assert "source text changed since this run began" in capsys.readouterr().err.splitlines()[-1]

    # The processes make what the thread would.
    accepted = (*changes, "train.accept_changes=True", "data.workers=2")
    assert train(recipe, run_dir, *accepted, "train.stop_at=6") == 0
    history = read_metrics(run_dir / "metrics.jsonl")
    (event,) = (e["message"] for e in history.events if "accept_changes" in e["message"])
    for change in ("train.rows: 4 -> 8", "data.denoisers", "source text: other documents"):
        assert change in event
    assert set(history.train[-1]["by_task"]) == {"short"}
    data = read_meta(run_dir / "checkpoints" / "6")["data"]
    assert data["rows"] == 8

    # From here on these are the run's settings.
    assert train(recipe, run_dir, *changes) == 0
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl").train] == [*range(1, 13)]
