import io
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from t5g2.reporting import progress as module
from t5g2.reporting.panel import trend
from t5g2.reporting.progress import Progress

VALUES = {"loss": 2.3456, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 23456.0}


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_log_gets_the_first_line_some_between_and_the_last(clock):
    stream = io.StringIO()
    with Progress(100, plain_every=10, stream=stream) as progress:
        for step in range(1, 101):
            progress.update(step, **VALUES, data_digest="ff", by_task={"a": 1.0})
            clock.now += 0.25
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 1/100", "step 41/100", "step 81/100", "step 100/100",
    ]  # fmt: skip
    assert "loss 2.346  lr 1.0e-3  grad 0.50  23.5k tok/s" in lines[1]
    assert lines[1].endswith("elapsed 0:10  left 0:15")
    assert "left" not in lines[-1]


def test_a_log_has_no_control_characters(clock):
    stream = io.StringIO()
    with Progress(2, stream=stream) as progress:
        with progress.stage("compile"):
            clock.now += 75
        progress.update(1, loss=float("nan"))
        progress.message("step 1: [bold]checkpoint[/bold]")
    assert stream.getvalue().replace("\n", "").isprintable()
    assert stream.getvalue().splitlines() == [
        "compile ...",
        "compile: 1 min 15 s",
        "step 1/2  loss nan  elapsed 0:00",
        "step 1: [bold]checkpoint[/bold]",
    ]


def test_a_stage_that_fails_says_so_and_lets_the_error_through(clock):
    stream = io.StringIO()
    progress = Progress(2, stream=stream)

    def export():
        with progress.stage("export"):
            clock.now += 2
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="full"):
        export()
    assert stream.getvalue().splitlines()[-1] == "export: stopped after 2.0 s"


PROGRAM = """
import time
from t5g2.reporting.progress import Progress
try:
    with Progress(1000) as progress:
        with progress.stage("building [the] corpus"):
            time.sleep(0.1)
        for step in range(1, 1001):
            progress.update(step, loss=2.0, learning_rate=1e-3)
            if step == 5:
                progress.message("held-out [loss] 3.0")
            time.sleep(0.05)
except KeyboardInterrupt:
    pass
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_an_interrupt_leaves_the_terminal_clean():
    ours, theirs = os.openpty()
    environment = {
        **os.environ,
        "TERM": "xterm",
        "COLUMNS": "100",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs, env=environment)
    os.close(theirs)
    shown, interrupted = b"", False
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if not interrupted and b"held-out" in shown:
            time.sleep(0.6)
            process.send_signal(signal.SIGINT)
            interrupted = True
    assert process.wait() == 0
    os.close(ours)
    text = shown.decode()
    hide, reveal = "\x1b[?25l", "\x1b[?25h"
    assert text.count(hide) == text.count(reveal) > 0
    assert text.rfind(reveal) > text.rfind(hide)
    assert "building [the] corpus: 0." in text
    assert "held-out [loss] 3.0" in text
    assert "of 1,000" in text
    assert "lr 1.0e-3" in text


def shown(width, tmp_path):
    """What a terminal of so many columns shows in the end, and all that was sent to it."""
    import fcntl
    import struct
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("COLUMNS", None)
    process = subprocess.Popen([sys.executable, "-c", PANEL], stderr=theirs, env=environment)
    os.close(theirs)
    sent = b""
    while True:
        try:
            sent += os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
    assert process.wait() == 0
    os.close(ours)
    text = sent.decode()
    last = text.rpartition("\x1b[?25h")[0]
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last), text


PANEL = """
from t5g2.reporting.progress import Progress
with Progress(1000) as progress:
    progress.announce(save=400, evaluation=100)
    for step in (10, 20):
        seconds = {"data": 0.05 * step, "step": 0.95 * step}
        progress.update(step, loss=3.0 - step / 100, learning_rate=1e-3, grad_norm=0.5,
            tokens_per_second=23456.0, step_seconds=2.0, model_flops_per_second=2e13, mfu=0.412,
            seconds=seconds)
        if step == 10:
            progress.message("held-out loss [red]3.0[/red] " + "and so on " * 30)
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
@pytest.mark.parametrize("width", [100, 64])
def test_a_terminal_has_a_panel_with_all_that_one_asks_for(width, tmp_path):
    screen, _ = shown(width, tmp_path)
    for words in (
        "step 20 of 1,000",
        "2%",
        "2.800",
        "█▁",
        "23.5k tok/s",
        "save at 400",
        "ago: held",
    ):
        assert words in screen
    if width == 100:
        assert "20.0TFLOP/s   MFU 41.2%   waits for data 5.0%" in screen
        assert "save at 400 in 12:40   evaluation at 100 in 2:40" in screen
    rows = screen.replace("\r", "").rpartition("╭")[2].split("\n")
    assert len(rows) > 6
    assert all(len(row) <= width for row in rows)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_narrow_terminal_has_lines_that_fit(tmp_path):
    screen, _ = shown(30, tmp_path)
    last = screen.replace("\r", "").rpartition("step 20/1,000")
    assert last[1]
    assert all(len(row) <= 30 for row in last[2].split("\n"))
    assert "loss 2.800" in last[2]
    assert "│" not in screen


def test_the_curve_of_the_loss_marks_what_is_not_finite():
    assert trend([3.0, float("nan"), 2.0, 1.0]) == "█!▅▁"
    assert trend([2.0, 2.0]) == "▁▁"
    assert trend([float("inf")]) == "!"
