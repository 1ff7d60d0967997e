"""Held-out loss in a run: by place in the targets, of the weights and of their average."""

import numpy as np
import pytest
from small_run import write_corpus, write_recipe

import t5g2
from t5g2 import cli, settings
from t5g2.data.corpus import reopen_corpus, row_stream
from t5g2.pretrained import Prompt
from t5g2.reporting.metrics_log import read_metrics
from t5g2.scoring import Scorer


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, standard_library):
    home = tmp_path_factory.mktemp("run")
    corpus = write_corpus(home / "corpus", standard_library(200_000))
    recipe = write_recipe(home / "recipe.gin", corpus)
    flags = ("train.stop_at=7", "evaluation.average_every=3", "evaluation.batches=1")
    arguments = ["train", "--run_dir", str(home / "run"), "--gin_file", str(recipe)]
    assert cli.main([*arguments, *(f"--gin.{flag}" for flag in flags)]) == 0
    return home / "run"


def recorded(run_dir, weights):
    rows = read_metrics(run_dir / "metrics.jsonl").eval
    return {row["step"]: row for row in rows if row["weights"] == weights}


def test_each_position_has_the_mean_loss_of_its_targets_in_every_example_alone(run_dir):
    chosen = settings.run_settings(run_dir)
    corpus = reopen_corpus(chosen.corpus, run_dir, chosen.model)
    stream = row_stream(corpus, "heldout", chosen.data, chosen.train.rows)
    cursors = stream.start()
    rows = [stream.next_row(row, cursors[row])[0] for row in range(stream.rows)]
    pieces = [piece for row in rows for piece in row]
    model = t5g2.load(run_dir / "checkpoints" / "6")
    scores = Scorer(model).score([(Prompt(p.example.inputs), p.example.targets) for p in pieces])
    losses = [-score.token_log_likelihoods for score in scores]
    row = recorded(run_dir, "last")[6]
    ends = {name: int(name.rpartition("-")[2]) + 1 for name in row["by_position"]}
    begin = 0
    for name, end in ends.items():
        found = np.concatenate([loss[begin:end] for loss in losses])
        assert row["targets_by_position"][name] == len(found)
        assert row["by_position"][name] == pytest.approx(found.mean(), rel=1e-5)
        begin = end
    assert list(ends)[:4] == ["0", "1", "2-3", "4-7"]
    assert sum(row["targets_by_position"].values()) == row["targets"]
    assert row["by_modality"] == {"text": pytest.approx(row["loss"])}


def test_the_average_is_evaluated_at_its_own_pace_as_the_average_job_would(
    run_dir, tmp_path, capsys
):
    found = recorded(run_dir, "averaged")
    assert {step: row["checkpoints"] for step, row in found.items()} == {3: [3], 6: [3, 6]}
    assert list(recorded(run_dir, "last")) == [6]
    # The run kept a temporary checkpoint of step 7, which is none of those averaged.
    out = tmp_path / "averaged"
    assert cli.main(["average", "--run_dir", str(run_dir), "--last", "2", "--out", str(out)]) == 0
    assert cli.main(["evaluate", "--checkpoint", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"held-out loss {found[6]['loss']:.4f} nats/token" in said
    assert f"2-3 {found[6]['by_position']['2-3']:.4f}" in " ".join(said.split())


def test_the_report_tells_losses_by_position(run_dir):
    page = (run_dir / "report.html").read_text()
    assert "position in the targets" in page
    assert f"{recorded(run_dir, 'averaged')[6]['by_position']['4-7']:.3f}" in page
