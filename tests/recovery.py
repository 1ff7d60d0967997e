"""A small run, what it made, and what can happen to it."""

import subprocess
import sys

import jax
import numpy as np

from t5g2 import cli
from t5g2.checkpoints.store import read_arrays, read_meta
from t5g2.reporting.metrics_log import read_metrics

FAST = ("finish.samples=0", "finish.export=False")


def train(recipe, run_dir, *bindings):
    flags = [f"--gin.{binding}" for binding in (*FAST, *bindings)]
    return cli.main(["train", "--run_dir", str(run_dir), "--gin_file", str(recipe), *flags])


def losses(run_dir):
    rows = read_metrics(run_dir / "metrics.jsonl").train
    exact = ("loss", "grad_norm", "learning_rate", "tokens", "data_digest")
    return {row["step"]: [row[name] for name in exact] for row in rows}


def warnings(run_dir):
    events = read_metrics(run_dir / "metrics.jsonl").events
    return [event["message"] for event in events if event["level"] == "warning"]


def assert_equal_to_the_bit(run_dir, other):
    assert losses(run_dir) == losses(other)
    for name in ("checkpoints/12", "averaged"):
        ours, theirs = (read_arrays(where / name / "params") for where in (run_dir, other))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert read_meta(run_dir / name)["digest"] == read_meta(other / name)["digest"]
    averaged = [read_meta(where / "averaged")["averaged_steps"] for where in (run_dir, other)]
    assert averaged == [[9, 12], [9, 12]]


def steps(run_dir):
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def damage(checkpoint):
    path = max((checkpoint / "params").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    return path


def start(recipe, run_dir, *bindings, limit_bytes=None):
    command = [sys.executable, "-m", "t5g2", "train", "--run_dir", str(run_dir)]
    if limit_bytes is not None:
        command = ["prlimit", f"--fsize={limit_bytes}:", *command]
    flags = [f"--gin.{binding}" for binding in bindings]
    return subprocess.Popen(
        [*command, "--gin_file", str(recipe), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
