"""Runs of earlier commits: what their own code wrote, made anew from their sources."""

import io
import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

REPOSITORY = Path(__file__).absolute().parents[2]
# In options that every commit since the first `t5g2 train` has.
RECIPE = """
model.vocab_size = 400
model.hidden_size = 8
model.mlp_dim = 16
model.num_layers = 2
model.num_heads = 2
model.num_kv_heads = 1
model.head_dim = 8
model.sliding_window = 16
model.global_every = 2
model.query_pre_attn_scalar = 8.0
corpus.path = '{corpus}'
corpus.heldout_share = 0.2
tokenizer.vocab_size = 400
tokenizer.sentinels = 16
data.inputs_length = 192
data.targets_length = 96
train.rows = 2
train.total_steps = 4
train.log_every = 1
evaluation.every = 2
evaluation.batches = 1
checkpoints.every = 2
finish.average_last = 1
finish.samples = 0
"""
CLI = "import sys; from t5g2.cli import main; sys.exit(main())"


def has_commit(commit: str) -> bool:
    """Whether the sources of a commit are at hand (of a clone without history they are not)."""
    known = ["git", "cat-file", "-e", f"{commit}:t5g2"]
    return subprocess.run(known, capture_output=True, cwd=REPOSITORY, check=False).returncode == 0


def sources_of(commit: str, directory: Path) -> Path:
    """A directory with the package as a commit had it."""
    archive = subprocess.run(
        ["git", "archive", commit, "t5g2"], check=True, capture_output=True, cwd=REPOSITORY
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(directory, filter="data")
    return directory


def make_corpus(directory: Path) -> Path:
    """A dozen small text files."""
    directory.mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:12]:
        (directory / path.with_suffix(".txt").name).write_bytes(path.read_bytes())
    return directory


def train_with(sources: Path, corpus: Path, run_dir: Path) -> None:
    """`t5g2 train` of a directory of sources, with the packages that are installed now."""
    recipe = run_dir.parent / "recipe.gin"
    recipe.write_text(RECIPE.format(corpus=corpus))
    command = [sys.executable, "-c", CLI, "train", "--run_dir", run_dir, "--gin_file", recipe]
    environment = {**os.environ, "PYTHONPATH": str(sources)}
    done = subprocess.run(
        command, cwd=sources, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
