import io
import os
import signal
import subprocess
import sys
import time

import pytest

from t5g2.reporting import progress as module
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
    assert "/1,000" in text
    assert "lr 1.0e-3" in text
