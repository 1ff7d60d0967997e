"""A run that hangs ends, says where and in what, and goes on; slow steps are told of."""

import os
import re
import socket
import subprocess
import sys
import textwrap
import time

import pytest
from small_run import write_corpus, write_recipe

from t5g2 import cli
from t5g2.activity import PHASES, Activity
from t5g2.parallel.mesh import MeshConfig, make_mesh
from t5g2.reporting.goodput import attempts, total
from t5g2.reporting.metrics_log import read_metrics
from t5g2.watchdog import Stragglers, Watchdog, WatchdogConfig

HANGS = """
    import sys, time
    from t5g2 import cli
    from t5g2.data import loader

    fill, calls = loader.fill_rows, []

    def a_source_that_never_answers(*args):
        calls.append(1)
        if len(calls) > 12:
            time.sleep(3600)
        return fill(*args)

    loader.fill_rows = a_source_that_never_answers
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_hanging_source_ends_the_run_with_its_stack_and_the_same_command_goes_on(
    tmp_path, standard_library
):
    recipe = write_recipe(
        tmp_path / "recipe.gin", write_corpus(tmp_path / "corpus", standard_library(200_000))
    )
    run_dir = tmp_path / "run"
    arguments = ["train", "--run_dir", str(run_dir), "--gin_file", str(recipe)]
    arguments += ["--gin.finish.samples=0", "--gin.finish.export=False"]
    hanging = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HANGS), *arguments, "--gin.watchdog.minutes=0.1"],
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert hanging.returncode == 75, hanging.stderr
    told = r"no step for 0.1\d* min after step \d+; process 0 on \S+ was waiting for data"
    assert re.search(told, hanging.stderr)
    (stacks,) = run_dir.glob("stacks-*.txt")
    for text in (hanging.stderr, stacks.read_text()):
        assert "a_source_that_never_answers" in text
    assert cli.main(arguments) == 0
    history = read_metrics(run_dir)
    assert history.last_step == 12
    # All time is accounted for, that of the attempt that hung, too.
    found = attempts(history)
    assert len(found) == 2
    wall = history.segments[-1].marks[-1]["time"] - found[0].began
    assert sum(total(found).values()) == pytest.approx(wall, rel=0.01)
    assert found[1].seconds["idle"] > 6


def test_a_thread_that_is_busy_in_another_phase_is_named_by_it_and_starting_has_more_time(tmp_path):
    """The process is one of its own, as it ends."""
    script = """
        import sys, time
        from pathlib import Path
        from t5g2.activity import Activity
        from t5g2.watchdog import Watchdog, WatchdogConfig

        activity = Activity()
        config = WatchdogConfig(minutes=0.02, start_minutes=0.06)
        with Watchdog(config, activity, Path(sys.argv[1])):
            activity.enter("compile")
            time.sleep(2.2)
            activity.enter("step")
            activity.stepped(1)
            print("stepped", flush=True)
            activity.enter("save")
            def a_disk_that_hangs(): time.sleep(60)
            a_disk_that_hangs()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 75, done.stderr
    assert done.stdout == "stepped\n"
    assert f"after step 1; process 0 on {socket.gethostname()} was saving" in done.stderr
    assert "a_disk_that_hangs" in done.stderr


def test_while_steps_come_nothing_ends(tmp_path):
    activity = Activity()
    with Watchdog(WatchdogConfig(minutes=0.01), activity, tmp_path):
        for step in range(1, 12):
            activity.stepped(step)
            time.sleep(0.1)
    assert not list(tmp_path.iterdir())


def test_time_is_divided_without_a_rest():
    began = time.time() - 5
    activity = Activity(began)
    with activity.during("compile"):
        time.sleep(0.02)
    activity.enter("data")
    time.sleep(0.02)
    activity.enter("step", booked="step")
    seconds = activity.seconds()
    assert list(seconds) == list(PHASES)
    assert seconds["data"] == 0
    assert seconds["compile"] >= 0.02
    assert seconds["step"] >= 0.02
    assert sum(seconds.values()) == pytest.approx(time.time() - began, abs=0.01)


def test_slow_steps_are_told_of_with_the_host():
    stragglers = Stragglers(WatchdogConfig(slow=3.0), make_mesh(MeshConfig()))
    waited = 0.0
    for step in range(10, 70, 10):
        assert stragglers.told(step, 0.5, waited) is None
    assert stragglers.told(70, 1.4, waited) is None
    told = stragglers.told(80, 2.0, waited + 15)
    assert told is not None
    assert "slow steps up to 80: 2 s each, 4.0 times the median" in told
    assert f"process 0 on {socket.gethostname()} waited longest for data, 1.5 s a step" in told
