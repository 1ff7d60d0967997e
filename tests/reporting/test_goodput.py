"""Where a run's wall time went, over restarts, kills and rollbacks."""

import pytest
from synthetic_run import train_row, write_lines

from t5g2.reporting.goodput import attempts, goodput_line, goodput_section, total
from t5g2.reporting.metrics_log import read_metrics
from t5g2.reporting.report import write_report


def record(kind, step, time, **values):
    seconds = {name: float(value) for name, value in values.pop("seconds", {}).items()}
    row = {"kind": kind, "step": step, "time": float(time), "seconds": seconds, **values}
    return {**train_row(step), **row} if kind == "train" else row


def spent(init=5, compile=10, restore=0, data=0, step=0, save=0, evaluation=0):
    return locals()


# Killed at 130 s, after step 20 but with a checkpoint of step 15; down for 70 s.
KILLED = [
    record("start", 0, 15, began=0.0, seconds=spent()),
    record("train", 10, 65, seconds=spent(step=40, data=10)),
    record("train", 20, 130, seconds=spent(step=90, data=20, save=5)),
]
AGAIN = [
    record("start", 15, 220, began=200.0, seconds=spent(restore=5)),
    record("train", 20, 245, seconds=spent(restore=5, step=25)),
    record("end", 20, 250, seconds={**spent(restore=5, step=25), "finish": 5}),
]


def test_all_kinds_sum_to_the_wall_time_and_what_was_done_again_is_lost(tmp_path):
    write_lines(tmp_path, [*KILLED, *AGAIN])
    first, second = attempts(read_metrics(tmp_path))
    assert first.seconds["lost"] == pytest.approx((50 + 10 + 5) / 2)
    assert first.seconds["step"] == 40 + 25
    assert second.seconds["idle"] == 70
    assert second.seconds["lost"] == 0
    assert sum(total([first, second]).values()) == pytest.approx(250)


def test_a_rollback_loses_the_steps_behind_its_checkpoint_but_not_the_restoring(tmp_path):
    rolled = [
        *KILLED[:2],
        record("train", 20, 130, seconds=spent(step=100, data=15)),
        record("rollback", 15, 150, seconds=spent(step=110, data=15, restore=10)),
        record("train", 20, 180, seconds=spent(step=140, data=15, restore=10)),
    ]
    write_lines(tmp_path, rolled)
    history = read_metrics(tmp_path)
    (attempt,) = attempts(history)
    assert attempt.seconds["lost"] == pytest.approx((60 + 5) / 2 + 10)
    assert attempt.seconds["restore"] == 10
    assert attempt.seconds["step"] == pytest.approx(40 + 30 + 30)
    assert sum(attempt.seconds.values()) == pytest.approx(180)
    assert [row["step"] for row in history.train] == [10, 20]
    assert len(history.segments) == 1


def test_falling_back_beyond_a_start_loses_steps_of_both_processes(tmp_path):
    third = record("start", 10, 300, began=260.0, seconds=spent(restore=25))
    write_lines(tmp_path, [*KILLED, *AGAIN, third])
    found = attempts(read_metrics(tmp_path))
    assert [attempt.seconds["lost"] for attempt in found] == pytest.approx([65, 25, 0])
    assert sum(total(found).values()) == pytest.approx(300)


def test_it_is_said_in_a_line_and_shown_as_bars_over_the_starts(tmp_path):
    write_lines(tmp_path, [*KILLED, *AGAIN])
    history = read_metrics(tmp_path)
    line = goodput_line(history)
    assert line.startswith("4 min 10 s over 2 starts: steps 36.0%, not running 28.0%")
    assert "lost and redone 13.0%" in line
    assert goodput_section(history).count('role="img"') == 2
    assert goodput_section(history) in write_report(tmp_path).read_text()


def test_old_records_which_tell_no_times_are_no_error(tmp_path):
    write_lines(
        tmp_path, [{"kind": "start", "step": 0}, {"kind": "train", **train_row(1), "step": 1}]
    )
    history = read_metrics(tmp_path)
    assert goodput_line(history) == ""
    assert "None recorded" in goodput_section(history)
