"""Weights & Biases is given what TensorBoard is, and can fail as it likes."""

import sys
import types

import pytest

from t5g2 import cli
from t5g2.reporting.metrics_log import MetricsLog, read_metrics
from t5g2.reporting.wandb_log import WandbConfig, WandbLog


class FakeRun:
    def __init__(self, breaks_at):
        self.logged, self.metrics, self.finished, self.breaks_at = [], [], 0, breaks_at
        self.config = types.SimpleNamespace(update=self.update)
        self.facts = {}

    def update(self, facts, allow_val_change):
        assert allow_val_change
        self.facts |= facts

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, values):
        if values["step"] == self.breaks_at:
            raise OSError("no network")
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def fake(monkeypatch):
    made = types.SimpleNamespace(arguments=[], runs=[], breaks_at=None, refuses=None)

    def init(**arguments):
        if made.refuses:
            raise made.refuses
        made.arguments.append(arguments)
        made.runs.append(FakeRun(made.breaks_at))
        return made.runs[-1]

    made.init = init
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def write(run_dir, first, last, tell=print):
    with MetricsLog(run_dir, WandbLog(WandbConfig(project="p"), run_dir, tell)) as log:
        log.start(first, total_steps=9)
        for step in range(first + 1, last + 1):
            log.write("train", step, loss=2.0, by_task={"a": 3.0}, data_digest="ff")
        log.write("event", last, message="no number")
        log.write("eval", last, split="heldout", weights="last", loss=1.5)


def test_it_has_the_names_of_tensorboard_and_goes_on_with_the_same_run(fake, tmp_path):
    write(tmp_path, 0, 2)
    write(tmp_path, 1, 2)
    first, second = fake.runs
    assert first.logged == [
        {"step": 1, "train/loss": 2.0, "train/by_task/a": 3.0},
        {"step": 2, "train/loss": 2.0, "train/by_task/a": 3.0},
        {"step": 2, "heldout_last/loss": 1.5},
    ]
    assert first.facts == {"total_steps": 9}
    assert ("*", "step") in first.metrics
    assert first.finished == second.finished == 1
    assert fake.arguments[0]["id"] == fake.arguments[1]["id"]
    write(tmp_path / "other", 0, 1)
    assert fake.arguments[2]["id"] != fake.arguments[0]["id"]
    assert all(arguments["resume"] == "allow" for arguments in fake.arguments)


@pytest.mark.parametrize("failure", ["at the start", "in between"])
def test_a_failure_is_told_once_and_the_log_goes_on(fake, tmp_path, failure):
    if failure == "at the start":
        fake.refuses = RuntimeError("no network")
    else:
        fake.breaks_at = 2
    told = []
    write(tmp_path, 0, 5, told.append)
    assert told == ["wandb failed, and is left out from here on: no network"]
    assert len(read_metrics(tmp_path).train) == 5


def test_without_a_project_nothing_is_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it would raise
    with MetricsLog(tmp_path, WandbLog(WandbConfig(), tmp_path)) as log:
        log.start(0)
        log.write("train", 1, loss=2.0)
    with pytest.raises(ModuleNotFoundError):
        WandbLog(WandbConfig(project="p"), tmp_path)
    assert cli.EXTRAS["wandb"] == "wandb"
