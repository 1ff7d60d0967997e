"""What an earlier commit wrote is read by this one."""

import shutil

import numpy as np
import pytest
from earlier_run import REPOSITORY, has_commit, make_corpus, sources_of, train_with
from safetensors.numpy import load_file

from t5g2.cli import main
from t5g2.reporting.metrics_log import read_metrics

# By checkpoint format: the last commit of format 1 and the first of format 2.
COMMITS = {
    1: "a6822eb2aa14a67ecb6876013cdb38fb8c4d5276",
    2: "df8d7cf7f72ddcac11d767a2d2b5db8ac8fd2ccd",
}


@pytest.mark.slow
@pytest.mark.parametrize("number", COMMITS)
def test_a_run_of_an_earlier_commit_is_exported_as_by_itself_and_goes_on(number, tmp_path):
    if not has_commit(COMMITS[number]):
        pytest.skip("this clone has no history")
    sources, corpus = sources_of(COMMITS[number], tmp_path / "code"), make_corpus(tmp_path / "text")
    run_dir = tmp_path / "run"
    train_with(sources, corpus, run_dir)
    checkpoint, ours = run_dir / "checkpoints" / "4", tmp_path / "ours"
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(ours)]) == 0
    theirs = load_file(run_dir / "export" / "model.safetensors")
    exported = load_file(ours / "model.safetensors")
    assert exported.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(exported[name], array, strict=True)

    # As if it had been stopped at step 2, and nobody had seen the rest.
    later = tmp_path / "later"
    later.mkdir()
    shutil.copytree(run_dir / "checkpoints" / "2", later / "checkpoints" / "2")
    shutil.copytree(run_dir / "tokenizer", later / "tokenizer")
    for name in ("config.gin", "corpus.json"):
        shutil.copy(run_dir / name, later)
    train_with(REPOSITORY, corpus, later)
    theirs, ours = (
        {row["step"]: row["loss"] for row in read_metrics(run / "metrics.jsonl").train}
        for run in (run_dir, later)
    )
    assert ours == pytest.approx({step: theirs[step] for step in (3, 4)}, rel=1e-5)
