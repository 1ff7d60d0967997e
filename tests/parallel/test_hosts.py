"""Several processes over loopback: one model, one log, one end."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ports import free_port
from small_run import write_corpus, write_recipe

from t5g2.errors import UserError
from t5g2.parallel.hosts import HostsConfig, own_rows, start


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, standard_library):
    home = tmp_path_factory.mktemp("recipe")
    return write_recipe(
        home / "recipe.gin", write_corpus(home / "corpus", standard_library(200_000))
    )


def begin(recipe, run_dir, *bindings, count=2):
    """Starts the processes of a run; each has one CPU device."""
    port = free_port()
    processes = []
    for index in range(count):
        flags = [
            f"--gin.{binding}"
            for binding in (
                f"hosts.coordinator=localhost:{port}",
                f"hosts.count={count}",
                f"hosts.index={index}",
                "hosts.heartbeat_seconds=10",
                *bindings,
            )
        ]
        command = [sys.executable, "-m", "t5g2", "train", "--run_dir", str(run_dir)]
        processes.append(
            subprocess.Popen(
                [*command, "--gin_file", str(recipe), *flags],
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def ended(processes):
    """Exit codes and what the processes wrote to stderr."""
    written = [process.communicate(timeout=150)[1] for process in processes]
    return [process.returncode for process in processes], written


def records(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    exact = ("step", "weights", "checkpoints", "loss", "by_task", "by_position", "grad_norm")
    exact += ("data_digest",)
    return [
        {name: row.get(name) for name in exact} for row in rows if row["kind"] in ("train", "eval")
    ]


def wait_for_step(run_dir, step):
    path = run_dir / "metrics.jsonl"
    for _ in range(600):
        if path.exists() and f'"kind": "train", "step": {step},' in path.read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step} in {path}")


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_and_resume_as_another_number(recipe, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    average = "evaluation.average_every=6"
    for _ in range(2):  # stopped on the way, and on to the end
        stop = () if (two / "config.gin").exists() else ("train.stop_at=7",)
        codes, written = ended(begin(recipe, two, average, *stop))
        assert codes == [0, 0], written
    alone = ("mesh.cpu_devices=2", "train.stop_at=7", average)
    codes, written = ended(begin(recipe, one, *alone, count=1))
    assert codes == [0], written
    codes, written = ended(begin(recipe, one, average))  # from one process to two
    assert codes == [0, 0], written
    assert records(one) == records(two)
    assert [row["step"] for row in records(two)] == [1, 2, 3, 4, 5, 6, 6, 6, *range(7, 13), 12, 12]
    assert (two / "report.html").exists()
    assert (two / "export" / "model.safetensors").exists()


LONG = (
    "train.total_steps=100_000",
    "train.log_every=5",
    "evaluation.every=100_000",
    "checkpoints.every=100_000",
)


@pytest.mark.slow
def test_a_signal_to_any_process_saves_and_stops_all_at_one_step(recipe, tmp_path):
    processes = begin(recipe, tmp_path / "run", *LONG)
    wait_for_step(tmp_path / "run", 5)
    processes[1].send_signal(signal.SIGTERM)
    codes, written = ended(processes)
    assert codes == [143, 143], written
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"SIGTERM: saved step {saved.name}" in written[0]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_a_message_that_names_it(recipe, tmp_path):
    processes = begin(recipe, tmp_path / "run", *LONG)
    wait_for_step(tmp_path / "run", 5)
    os.kill(processes[1].pid, signal.SIGKILL)
    before = time.monotonic()
    codes, written = ended(processes)
    assert time.monotonic() - before < 60
    assert codes[0] != 0
    assert "/job:jax_worker/replica:0/task:1" in written[0] or "Task 1" in written[0]


def test_waiting_is_bounded_and_explained(recipe, tmp_path):
    settings = {"coordinator": f"localhost:{free_port()}", "count": 2, "wait_seconds": 1}
    with pytest.raises(UserError, match=r"no process 0 at localhost:\d+ after 1 s"):
        start(HostsConfig(index=1, **settings))
    alone, other = begin(recipe, tmp_path / "run", "hosts.wait_seconds=2", count=2)
    other.kill()
    other.communicate()
    codes, written = ended([alone])
    assert codes == [2]
    assert "all 2 processes were not there after 2 s" in written[0]
    assert "Traceback" not in written[0]


def test_without_others_nothing_is_started():
    start(HostsConfig(), {"SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"})
    assert not jax.distributed.is_initialized()


def test_one_process_feeds_all_rows():
    mesh = jax.make_mesh((1,), ("data",))
    assert own_rows(NamedSharding(mesh, PartitionSpec("data")), 12) == (0, 12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 2}, "must be given together"),
        ({"coordinator": "a:1", "count": 2, "index": 2}, "index must be below count"),
        ({"coordinator": "a", "count": 2, "index": 0}, "host:port"),
        ({"wait_seconds": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        HostsConfig(**given)
