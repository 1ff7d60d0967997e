"""Each rule speaks of the run it is for, and of no healthy one."""

import math
import random

import pytest
from synthetic_run import TASKS, train_row, write_lines

from t5g2.reporting import health
from t5g2.reporting.metrics_log import read_metrics

START = 1.7e9
FACTS = {"total_steps": 1000, "clip_norm": 1.0}


def rows(count=400, **changes):
    """Records of a run that learns; `changes` map a field to a function of (step, its value)."""
    noise = random.Random(0)
    made = []
    for step in range(1, count + 1):
        row = train_row(step) | {"time": START + step}
        row["learning_rate"] = 1e-3 * (1 + math.cos(math.pi * step / 1000)) / 2
        row["loss"] = (2 + 6 * (1 + step / 20) ** -0.7) * noise.gauss(1, 0.02)
        row["by_task"] = {name: row["loss"] * factor for name, factor in TASKS.items()}
        for name, change in changes.items():
            row[name] = change(step, row.get(name))
        made.append({"kind": "train", "step": step, **row})
    return made


def found(tmp_path, records, now=START + 401):
    begin = {"kind": "start", "step": 0, "time": START, **FACTS}
    return health.findings(read_metrics(write_lines(tmp_path, [begin, *records])), now)


def test_of_a_run_that_learns_nothing_is_said(tmp_path):
    assert found(tmp_path, rows()) == []
    assert found(tmp_path, rows(1000), now=START + 1001) == []  # also at the end of the schedule
    assert found(tmp_path, rows(3), now=START + 4) == []
    assert found(tmp_path, [], now=START + 1) == []


DIVERGING = {"by_task": lambda step, old: old | {"prefix_75": 4.0 if step < 200 else 5.0}}
RULES = {
    "loss not finite: since step 350": {
        "loss": lambda step, old: old if step < 350 else "NaN",
    },
    "loss flat": {"loss": lambda step, old: 5 + 0.05 * math.sin(step)},
    "data starved: 25% of the time": {
        "seconds": lambda step, old: {"data": 0.25 * step, "step": 0.75 * step, "save": 9},
    },
    "gradient clipped always": {"grad_norm": lambda step, old: 3.0},
    "prefix_75 diverging: its loss is 25% above its best": DIVERGING,
    "padding: only 60% of the places for targets": {"fill_targets": lambda step, old: 0.6},
}


@pytest.mark.parametrize("sentence", RULES)
def test_what_goes_wrong_is_named(tmp_path, sentence):
    assert [said for said in found(tmp_path, rows(**RULES[sentence])) if said.startswith(sentence)]


@pytest.mark.parametrize(
    "changes",
    [
        # A loss that is not finite once, and then is; a schedule that has decayed; some clipping.
        {"loss": lambda step, old: "NaN" if step == 100 else old},
        {
            "loss": lambda step, old: 2 + 0.02 * math.sin(step),
            "learning_rate": lambda step, old: 1e-3 if step < 100 else 1e-4,
        },
        {"grad_norm": lambda step, old: 3.0 if step < 220 or step % 2 else 0.5},
        {"seconds": lambda step, old: {"data": 0.05 * step, "step": 0.95 * step}},
        # All denoisers rise together: that is no matter of one of them.
        {
            "loss": lambda step, old: 3.0 if step < 300 else 4.0,
            "by_task": lambda step, old: dict.fromkeys(TASKS, 3.0 if step < 300 else 4.0),
        },
    ],
)
def test_what_is_ordinary_is_not(tmp_path, changes):
    said = found(tmp_path, rows(**changes))
    assert [one for one in said if not one.startswith("loss flat")] == []


def test_a_held_out_loss_that_rises_while_training_falls_is_named(tmp_path):
    def evals(losses):
        return [
            {"kind": "eval", "step": 50 * i + 50, "split": "heldout", "weights": "last", "loss": y}
            for i, y in enumerate(losses)
        ]

    (said,) = found(tmp_path, rows() + evals([4.0, 3.5, 3.0, 3.1, 3.2]))
    assert said.startswith("held-out loss rising: 3.3% above its best (3.000 at step 150)")
    assert found(tmp_path, rows() + evals([4.0, 3.5, 3.0, 3.01, 2.99])) == []


def starts(*steps, dies_after=10):
    made, time = [], START
    for step in steps:
        time += 100
        made.append({"kind": "start", "step": step, "time": time, **FACTS})
        last = {"kind": "train", "step": step + dies_after, **train_row(step + dies_after)}
        made.append(last | {"time": time + 50})
    return made


def test_restarts_that_come_to_nothing_are_named(tmp_path):
    now = START + 700
    (said,) = found(tmp_path, starts(0, 50, 50, 50), now)
    assert said.startswith("restarts looping: the last 3 starts were all from step 50")
    assert found(tmp_path, starts(0, 50, 100, 150), now) == []
    further = {"kind": "train", "step": 90, **train_row(90), "time": now}
    assert found(tmp_path, [*starts(50, 50, 50), further], now) == []


def test_a_run_that_fell_silent_is_told_from_one_that_was_stopped(tmp_path):
    later = START + 400 + health.SILENT_SECONDS
    assert found(tmp_path, rows(), now=later - 1) == []
    (said,) = found(tmp_path, rows(), now=later + 1)
    assert said.startswith("silent: no record for 5 min 1 s")
    event = {"kind": "event", "step": 400, "level": "warning", "message": "stopped by SIGTERM"}
    assert found(tmp_path, [*rows(), event | {"time": START + 401}], now=later + 1) == []
    end = {"kind": "end", "step": 400, "time": START + 401, "seconds": {"step": 1.0}}
    assert found(tmp_path, [*rows(), end], now=later + 1) == []
