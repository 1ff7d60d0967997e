import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from t5g2.errors import UserError
from t5g2.reporting.metrics_log import MetricsLog, read_metrics


def test_what_is_written_is_read_back(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.start(0, total_steps=2, versions={"jax": "0.10.2"})
        log.write("train", 1, loss=3.5, tokens=100, by_task={"a": 3.25, "b": 3.75})
        log.write("eval", 1, split="heldout", weights="last", loss=3.0)
        log.write("event", 1, level="info", message="checkpoint 1")
        log.write("summary", 2, checkpoints_averaged=[1, 2], export=None)
    history = read_metrics(tmp_path)
    assert history.fact("total_steps") == 2
    assert history.fact("versions") == {"jax": "0.10.2"}
    assert history.train[0]["by_task"] == {"a": 3.25, "b": 3.75}
    assert history.eval[0]["loss"] == 3.0
    assert history.events[0]["message"] == "checkpoint 1"
    assert history.summary["checkpoints_averaged"] == [1, 2]
    assert history.last_step == 1


def test_a_resume_supersedes_later_steps_so_that_each_appears_once(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.start(0)
        for step in range(1, 8):
            log.write("train", step, loss=float(step))
        log.write("eval", 4, split="heldout", weights="last", loss=4.0)
        log.write("eval", 6, split="heldout", weights="last", loss=6.0)
        log.write("event", 7, level="warning", message="killed")
    with MetricsLog(tmp_path) as log:
        log.start(4)
        for step in range(5, 7):
            log.write("train", step, loss=100.0 + step)
    history = read_metrics(tmp_path)
    assert [(row["step"], row["loss"]) for row in history.train] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 105.0), (6, 106.0),
    ]  # fmt: skip
    assert [row["step"] for row in history.eval] == [4]
    assert [row["message"] for row in history.events] == ["killed"]
    assert history.superseded == 4
    assert [(s.start["step"], s.last_step) for s in history.segments] == [(0, 7), (4, 6)]


def test_nothing_is_ever_rewritten(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.start(0)
        log.write("train", 1, loss=1.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with MetricsLog(tmp_path) as log:
        log.start(0)
        log.write("train", 1, loss=2.0)
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)


def test_an_evaluation_repeated_at_a_step_counts_once_for_each_weights(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.start(0)
        log.write("eval", 5, split="heldout", weights="last", loss=1.0)
        log.write("eval", 5, split="heldout", weights="last", loss=2.0)
        log.write("eval", 5, split="heldout", weights="averaged", loss=0.5)
    found = {row["weights"]: row["loss"] for row in read_metrics(tmp_path).eval}
    assert found == {"last": 2.0, "averaged": 0.5}
    assert len(read_metrics(tmp_path).eval) == 2


def test_a_run_that_started_again_after_its_summary_has_none(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.start(0)
        log.write("summary", 10)
        assert read_metrics(tmp_path).summary is not None
        log.start(10)
    assert read_metrics(tmp_path).summary is None


def test_numbers_that_json_lacks_survive_and_the_file_stays_strict_json(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.start(0)
        log.write("train", 1, loss=math.nan, grad_norm=math.inf, by_task={"a": -math.inf})
        log.write("event", 1, level="error", message="NaN")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    history = read_metrics(tmp_path)
    assert math.isnan(history.train[0]["loss"])
    assert history.train[0]["grad_norm"] == math.inf
    assert history.train[0]["by_task"] == {"a": -math.inf}
    assert history.events[0]["message"] == "NaN"


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_torn_last_line_is_tolerated_repaired_and_reported(tmp_path, cut):
    with MetricsLog(tmp_path) as log:
        log.start(0)
        log.write("train", 1, loss=1.0)
        log.write("train", 2, loss=2.0)
    path = tmp_path / "metrics.jsonl"
    torn = path.read_bytes()[:-1][:-cut]
    path.write_bytes(torn)
    history = read_metrics(path)
    assert [row["step"] for row in history.train] == [1]
    assert history.unreadable_lines == [3]

    with MetricsLog(tmp_path) as log:
        log.start(1)
        log.write("train", 2, loss=2.5)
    assert path.read_bytes().startswith(torn + b"\n{")
    history = read_metrics(path)
    assert [row["loss"] for row in history.train] == [1.0, 2.5]
    assert history.unreadable_lines == [3]


def test_a_whole_last_line_without_its_newline_counts(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.start(0)
        log.write("train", 1, loss=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    with MetricsLog(tmp_path) as log:
        log.write("train", 2, loss=2.0)
    history = read_metrics(path)
    assert [row["step"] for row in history.train] == [1, 2]
    assert not history.unreadable_lines


def test_zeros_that_a_power_cut_leaves_are_an_unreadable_line(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.start(0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 50 + b"\n\xff\xfe\n[1]\n")
    assert read_metrics(tmp_path).unreadable_lines == [2, 3, 4]


def test_a_killed_process_loses_no_record_that_was_written(tmp_path):
    program = """
import sys
from t5g2.reporting.metrics_log import MetricsLog
log = MetricsLog(sys.argv[1])
log.start(0)
step = 0
while True:
    step += 1
    log.write("train", step, loss=1.0)
    print(step, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    told += [int(line) for line in process.stdout]
    process.wait()
    process.stdout.close()
    history = read_metrics(tmp_path)
    assert history.last_step in (told[-1], told[-1] + 1)
    assert len(history.train) == history.last_step
    assert not history.unreadable_lines
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")


def test_an_array_is_no_value(tmp_path):
    numpy = pytest.importorskip("numpy")
    with MetricsLog(tmp_path) as log:
        log.start(0)
        with pytest.raises(TypeError, match="ndarray"):
            log.write("train", 1, loss=numpy.ones(3))
        with pytest.raises(TypeError, match="dict"):
            log.write("train", 1, by_task={"a": {"b": 1.0}})
    assert read_metrics(tmp_path).train == []


def test_a_missing_file_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    for start, last, loss in ((0, 6, 1.0), (3, 5, 2.0)):
        with MetricsLog(tmp_path) as log:
            log.start(start)
            for step in range(start + 1, last + 1):
                log.write("train", step, loss=loss, data_digest="ff", by_task={"a": loss})
            log.write("eval", last, split="heldout", weights="last", loss=loss)
    events = accumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]
    assert [event.step for event in events.Scalars("heldout_last/loss")] == [5]
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/by_task/a", "heldout_last/loss"}


@pytest.mark.parametrize("room", [0, 37])
def test_what_finds_no_room_is_told_once_and_written_when_there_is_some(
    tmp_path, monkeypatch, caplog, room
):
    write, full = os.write, False

    def write_or_fail(file, data):
        nonlocal room
        if full and not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = data[:room] if full else data
        room -= len(part) if full else 0
        return write(file, part)

    monkeypatch.setattr(os, "write", write_or_fail)
    with MetricsLog(tmp_path) as log:
        log.start(0)
        full = True
        for step in range(1, 100):
            log.write("train", step, loss=float(step))
        full = False
        log.write("train", 100, loss=100.0)
    history = read_metrics(tmp_path)
    assert [row["loss"] for row in history.train] == [float(step) for step in range(1, 101)]
    assert not history.unreadable_lines
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2  # a file each
    assert f"{tmp_path / 'metrics.jsonl'}: No space left on device" in "".join(told)

    log = MetricsLog(tmp_path)
    room, full = 0, True
    log.write("train", 101, loss=1.0)
    with pytest.raises(UserError, match=r"metrics\.jsonl found no room"):
        log.close()


def test_the_reporting_room_imports_neither_jax_nor_what_draws(tmp_path: Path):
    heavy = "{'jax', 'matplotlib', 'rich', 'tensorboardX', 'tensorflow', 'numpy'}"
    program = (
        "import sys, t5g2.reporting.metrics_log, t5g2.reporting.progress, "
        f"t5g2.reporting.plots, t5g2.reporting.report; print({heavy} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.check_output([sys.executable, "-c", program], text=True, env=environment)
    assert output.strip() == "set()"


def test_a_log_imports_no_torch_and_leaves_it_to_others(tmp_path: Path):
    pytest.importorskip("torch")
    program = (
        "import pathlib, sys; from t5g2.reporting.metrics_log import MetricsLog; "
        "log = MetricsLog(pathlib.Path(sys.argv[1])); log.start(0); log.close(); "
        "before = 'torch' in sys.modules; import torch; print(before, torch.ones(2).sum().item())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.check_output(
        [sys.executable, "-c", program, tmp_path], text=True, env=environment
    )
    assert output.split() == ["False", "2.0"]
    assert list(tmp_path.glob("tensorboard/events*"))
