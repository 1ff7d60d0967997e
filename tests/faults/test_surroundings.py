"""What surrounds a run fails: the disk, the clock, the data, another trainer, another process."""

import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
from recovery import FAST, assert_equal_to_the_bit, losses, start, steps, train, warnings

from t5g2.checkpoints.keeping import CheckpointStore
from t5g2.reporting.metrics_log import MetricsLog

pytestmark = pytest.mark.slow


def may_mount():
    done = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    )
    return done.returncode == 0


mounting = pytest.mark.skipif(
    shutil.which("unshare") is None or not may_mount(), reason="mounting is not allowed here"
)


def in_own_mounts(script, *words):
    """Runs a shell script whose mounts end with it."""
    command = ["unshare", "-m", "bash", "-c", script, "bash", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def command(recipe, run_dir, *bindings):
    flags = [f"--gin.{binding}" for binding in (*FAST, *bindings)]
    words = ["-m", "t5g2", "train", "--run_dir", run_dir, "--gin_file", recipe, *flags]
    return [sys.executable, *words]


@mounting
def test_a_full_disk_ends_in_one_line_and_with_room_the_run_goes_on(recipe, undisturbed, tmp_path):
    (tmp_path / "disk").mkdir()
    script = """
        where=$1; shift
        mount -t tmpfs -o size=1800k tmpfs $where/disk
        "$@"; echo $? > $where/first
        ls $where/disk/run/checkpoints > $where/stood
        mount -o remount,size=64m $where/disk
        "$@"; echo $? > $where/second
        cp $where/disk/run/metrics.jsonl $where
    """
    done = in_own_mounts(script, tmp_path, *command(recipe, tmp_path / "disk" / "run"))
    assert (tmp_path / "first").read_text() == "2\n", done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "stood").read_text().split()[0] == "3"
    assert (tmp_path / "second").read_text() == "0\n", done.stderr
    assert losses(tmp_path) == losses(undisturbed)


@mounting
def test_a_run_directory_that_became_read_only_is_named(recipe, tmp_path):
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "train.stop_at=3") == 0
    script = 'mount --bind $1 $1; mount -o remount,ro,bind $1; shift; "$@"'
    done = in_own_mounts(script, run_dir, *command(recipe, run_dir))
    assert done.returncode == 2, done.stderr
    assert f"--run_dir {run_dir} cannot be written: Read-only file system" in done.stderr
    assert "Traceback" not in done.stderr
    assert steps(run_dir) == {"3"}


@pytest.fixture
def clock(monkeypatch):
    """A wall clock: `offset` is how many seconds it is off, `pace` what each look at it adds."""
    real, clock = time.time, types.SimpleNamespace(offset=0.0, pace=0.0, looks=0)

    def now():
        clock.offset += clock.pace
        clock.looks += 1
        return real() + clock.offset

    monkeypatch.setattr(time, "time", now)
    return clock


def test_clocks_that_jump_change_nothing(recipe, undisturbed, tmp_path, monkeypatch, clock):
    write, jumps = MetricsLog.write, 0

    def jump_and_write(log, kind, step, **values):
        nonlocal jumps
        jumps += 1
        clock.offset = (-1) ** jumps * 86_400 * (jumps % 7)
        write(log, kind, step, **values)

    save = CheckpointStore.save

    def save_and_wait(store, *args, **facts):
        save(store, *args, **facts)
        store.wait()

    monkeypatch.setattr(MetricsLog, "write", jump_and_write)
    monkeypatch.setattr(CheckpointStore, "save", save_and_wait)
    assert train(recipe, tmp_path / "run", "checkpoints.minutes=60") == 0
    assert jumps > 12
    assert clock.looks > 12
    assert_equal_to_the_bit(tmp_path / "run", undisturbed)
    assert steps(tmp_path / "run") == steps(undisturbed)


def test_a_clock_that_jumps_in_a_save_costs_at_most_that_checkpoint(
    recipe, undisturbed, tmp_path, monkeypatch, clock
):
    save = CheckpointStore.save

    def save_while_it_jumps(store, state, *args, **facts):
        clock.pace = 86_400.0 if int(state.step) == 6 else 0.0
        save(store, state, *args, **facts)
        store.wait()
        clock.pace = 0.0

    monkeypatch.setattr(CheckpointStore, "save", save_while_it_jumps)
    assert train(recipe, tmp_path / "run") == 0
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert steps(tmp_path / "run") - {"6"} == steps(undisturbed) - {"6"}
    told = [told for told in warnings(tmp_path / "run") if "could not be saved" in told]
    assert bool(told) == ("6" not in steps(tmp_path / "run"))
    assert not any("None" in line for line in told)


def test_a_second_trainer_is_refused_and_the_first_ends_undisturbed(recipe, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    first = start(recipe, run_dir, *FAST)
    while not (run_dir / "config.gin").exists():
        assert first.poll() is None
        time.sleep(0.05)
    second = start(recipe, run_dir, *FAST)
    _, stderr = second.communicate(timeout=300)
    assert second.returncode == 2
    assert f"{run_dir} is being trained by process {first.pid} on" in stderr
    _, stderr = first.communicate(timeout=300)
    assert first.returncode == 0, stderr
    assert losses(run_dir) == losses(undisturbed)


def test_a_second_signal_ends_the_run_at_once(recipe, tmp_path):
    process = start(recipe, tmp_path / "run", *FAST, "train.total_steps=100000")
    while process.poll() is None and "step 1/" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGSTOP)  # so that it can react to neither before both are there
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    assert not any(name.isdigit() and int(name) % 3 for name in steps(tmp_path / "run"))


def test_a_data_shard_damaged_in_mid_run_is_named_and_once_restored_the_run_goes_on(
    recipe, tmp_path
):
    cache = tmp_path / "cache"
    words = [sys.executable, "-m", "t5g2", "cache", "--out", cache, "--gin_file", recipe]
    subprocess.run(words, check=True, capture_output=True)
    cached = (f"corpus.cache={cache}",)
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    assert train(recipe, whole, *cached) == 0
    assert train(recipe, run_dir, *cached, "train.stop_at=3") == 0
    (shard,) = (cache / "train").iterdir()
    sound = shard.read_bytes()
    middle = slice(len(sound) // 8, -len(sound) // 8)
    damaged = bytearray(sound)
    damaged[middle] = bytes(byte ^ 1 for byte in sound[middle])
    shard.write_bytes(damaged)
    process = start(recipe, run_dir, *FAST, *cached)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2, stderr
    assert f"{shard} is damaged" in stderr.splitlines()[-1]
    shard.write_bytes(sound)
    process = start(recipe, run_dir, *FAST, *cached)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert losses(run_dir) == losses(whole)


@pytest.mark.parametrize(
    "bindings",
    [
        ("mesh.cpu_devices=4", "mesh.data=2", "mesh.fsdp=2"),
        ("mesh.cpu_devices=2", "mesh.fsdp=2", "mesh.data=1"),
        ("train.accumulation=2",),
    ],
)
def test_a_run_goes_on_on_another_mesh_and_back(recipe, undisturbed, tmp_path, bindings):
    run_dir = tmp_path / "run"
    for stop, given in ((3, ()), (9, bindings), (None, ())):
        process = start(recipe, run_dir, *FAST, *given, f"train.stop_at={stop}")
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    ours, theirs = losses(run_dir), losses(undisturbed)
    assert ours.keys() == theirs.keys()
    for step, (loss, *_, digest) in ours.items():
        assert digest == theirs[step][-1]
        assert loss == pytest.approx(theirs[step][0], rel=1e-5)
        assert step > 3 or loss == theirs[step][0]
