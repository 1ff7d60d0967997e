"""Run directories in a bucket: everything of ours that is written and read there."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import bucket
import numpy as np
import pytest

from t5g2 import cli, run_lease
from t5g2.checkpoints import directory
from t5g2.checkpoints.keeping import CheckpointConfig, CheckpointStore
from t5g2.checkpoints.manifest import verify, write_manifest
from t5g2.errors import UserError
from t5g2.files import append, local_copy, new_directory, remove, to_path, write_atomically
from t5g2.reporting import appended_objects
from t5g2.reporting.metrics_log import MetricsLog, has_metrics, read_metrics
from t5g2.reporting.report import write_report
from t5g2.run_lock import LOCK_FILE, run_lock


@pytest.fixture
def objects(monkeypatch):
    with bucket.bucket_here(monkeypatch) as found:
        yield found


@pytest.fixture
def run_dir(objects):
    return to_path("gs://bucket/runs/one")


# ---- Paths and files


def test_a_path_of_a_bucket_behaves_as_one_of_the_file_system(run_dir, tmp_path):
    def look(home):
        write_atomically(home / "config.gin", "a = 1\n")
        write_atomically(home / "tokenizer" / "x.model", b"\0\xff")
        append(home / "samples" / "lines.jsonl", "1\n")
        append(home / "samples" / "lines.jsonl", "2\n")
        yield sorted(path.name for path in home.iterdir())
        yield sorted(path.relative_to(home).as_posix() for path in home.rglob("*.*"))
        yield [path.relative_to(home).as_posix() for path in home.glob("*/*.model")]
        yield (home / "samples" / "lines.jsonl").read_text()
        yield (home / "tokenizer" / "x.model").read_bytes(), (home / "config.gin").stat().st_size
        for path in (home, home / "config.gin", home / "tokenizer", home / "none"):
            yield path.exists(), path.is_dir(), path.is_file()
        yield (home / "tokenizer" / ".." / "config.gin").resolve().relative_to(home.resolve()).name
        yield remove(home / "tokenizer"), remove(home / "none"), (home / "tokenizer").exists()
        with pytest.raises(FileNotFoundError):
            (home / "none").read_bytes()
        yield list((home / "none").glob("*"))

    assert list(look(run_dir)) == list(look(tmp_path))


def test_a_file_is_put_at_once(run_dir, objects):
    write_atomically(run_dir / "config.gin", "a = 1\n")
    assert objects.puts == ["bucket/runs/one/config.gin"]


def test_other_stores_and_a_missing_package_are_told(monkeypatch, capsys):
    assert cli.main(["inspect", "run", "s3://bucket/run"]) == 2
    assert "of object stores only gs:// is read and written; mount this" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gcs", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"gs:// needs gcsfs: pip install 't5g2\[gcs\]'"):
        to_path("gs://bucket/run")


def test_a_store_that_refuses_is_the_users_to_mend(run_dir, objects, capsys):
    objects.refuses = LOCK_FILE
    with pytest.raises(UserError, match="run_dir gs://bucket/runs/one cannot be written: Forbid"):
        run_lock(run_dir).__enter__()


def test_a_directory_appears_whole_or_says_that_it_is_not(objects, capsys):
    path = to_path("gs://bucket/out")

    def write():
        with new_directory(path) as partial:
            (partial / "a").mkdir()
            (partial / "a" / "b.txt").write_text("b")
            (partial / "config.json").write_text("{}")

    objects.refuses = "config.json"
    with pytest.raises(UserError, match="gs://bucket/out was not written: Forbidden"):
        write()
    assert "bucket/out/a/b.txt" in objects.content
    assert cli.main(["generate", "--checkpoint", str(path), "--text", "x"]) == 2
    assert "gs://bucket/out is not whole" in capsys.readouterr().err
    objects.refuses = None
    write()
    assert set(objects.content) == {"bucket/out/a/b.txt", "bucket/out/config.json"}
    with pytest.raises(UserError, match="gs://bucket/out exists and is not empty"):
        write()
    assert (local_copy(path) / "a" / "b.txt").read_text() == "b"


# ---- Records


def record(run_dir, first, last):
    with MetricsLog(run_dir) as log:
        log.start(first - 1, total_steps=9)
        for step in range(first, last + 1):
            log.write("train", step, loss=10.0 - step, tokens=100 * step)
        log.write("eval", last, split="heldout", weights="last", loss=1.0)


def test_records_of_several_processes_are_those_of_a_local_run(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(appended_objects, "_LONGEST", 200)  # bytes: a few records an object
    monkeypatch.setattr(appended_objects, "_SECONDS", 0.01)
    for home in (run_dir, tmp_path):
        assert not has_metrics(home)
        record(home, 1, 6)
        record(home, 5, 9)
        assert has_metrics(home)
    assert len(list(run_dir.glob("metrics.jsonl.*"))) > 4

    def what_counts(home):
        history = read_metrics(home)
        rows = [*history.train, *history.eval, *history.starts]
        return history.superseded, [
            {name: value for name, value in row.items() if name != "time"} for row in rows
        ]

    assert what_counts(run_dir) == what_counts(tmp_path)
    assert what_counts(run_dir)[0] == 3  # two steps and the held-out loss
    # The objects, put together, are the file.
    whole = b"".join(path.read_bytes() for path in sorted(run_dir.glob("metrics.jsonl.*")))
    (tmp_path / "metrics.jsonl").write_bytes(whole)
    assert what_counts(run_dir) == what_counts(tmp_path)


def test_tensorboard_reads_the_scalars(run_dir):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    record(run_dir, 1, 6)
    record(run_dir, 5, 9)
    events = EventMultiplexer().AddRunsFromDirectory(str(local_copy(run_dir / "tensorboard")))
    events.Reload()
    scalars = events.Scalars(".", "train/loss")
    assert [event.step for event in scalars] == list(range(1, 10))


def test_what_a_failing_store_does_not_take_is_kept_and_told_once(
    run_dir, objects, monkeypatch, caplog
):
    monkeypatch.setattr(appended_objects, "_SECONDS", 0.01)
    monkeypatch.setattr(appended_objects, "_SECONDS_AFTER_FAILURE", 0.01)
    objects.refuses = "metrics"
    with MetricsLog(run_dir) as log:
        log.write("event", 1, level="info", message="one")
        log.flush()  # does not wait for ever
        time.sleep(0.2)
        objects.refuses = None
        log.write("event", 2, level="info", message="two")
        log.flush()
        assert [row["message"] for row in read_metrics(run_dir).events] == ["one", "two"]
    assert sum("is kept until it can be" in line for line in caplog.messages) == 1


def test_what_is_appended_while_its_object_is_put_is_put_too(run_dir, monkeypatch):
    monkeypatch.setattr(appended_objects, "_LONGEST", 8)  # bytes
    monkeypatch.setattr(appended_objects, "_SECONDS", 0.01)
    path, done = run_dir / "lines", []
    write_bytes = type(path).write_bytes

    def append_to_it_and_begin_the_next(part, data):
        if not done:
            done.append(part)
            log.append(b"two\n")
            log.append(b"three\n")
        return write_bytes(part, data)

    monkeypatch.setattr(type(path), "write_bytes", append_to_it_and_begin_the_next)
    log = appended_objects.AppendedObjects(path)
    log.append(b"one\n")
    log.close()
    assert appended_objects.read_parts(path) == b"one\ntwo\nthree\n"


def test_records_that_never_find_room_are_an_error(run_dir, objects):
    log = MetricsLog(run_dir)
    objects.refuses = "metrics"
    log.write("event", 1, level="info", message="one")
    with pytest.raises(UserError, match=r"the last of gs://bucket/runs/one/metrics.jsonl could"):
        log.close()


def test_inspect_run_and_the_report(run_dir, objects, capsys):
    record(run_dir, 1, 9)
    write_atomically(run_dir / "config.gin", "train.total_steps = 9\n")
    assert cli.main(["inspect", "run", str(run_dir)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("gs://bucket/runs/one: ")
    assert "at step 9 of 9" in told
    write_report(run_dir)
    assert b"train.total_steps" in objects.content["bucket/runs/one/report.html"]
    assert cli.main(["inspect", "run", str(run_dir), str(run_dir)]) == 0
    assert cli.main(["inspect", "run", "gs://bucket/nothing"]) == 2
    assert "no metrics there" in capsys.readouterr().err


# ---- The lease


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lease, "_SETTLING_SECONDS", 0.05)
    monkeypatch.setattr(run_lease, "_LOOKS_EVERY_SECONDS", 0.02)
    monkeypatch.setattr(run_lease, "_GIVEN_UP_AFTER", 3.0)
    monkeypatch.setattr(run_lease, "RENEWED_EVERY_SECONDS", 0.1)


@pytest.mark.usefixtures("quick")
def test_a_second_trainer_is_refused_as_long_as_the_first_renews(run_dir, objects):
    with run_lock(run_dir) as told:
        assert told is None
        owner = f"one is being trained by process {os.getpid()} on {socket.gethostname()}, since"
        with pytest.raises(UserError, match=owner), run_lock(run_dir):
            pass
    assert objects.content == {}
    with run_lock(run_dir) as told:
        assert told is None


@pytest.mark.usefixtures("quick")
def test_a_killed_trainer_of_another_machine_is_recognised_by_its_silence(run_dir, capsys):
    owner = {"pid": 7, "host": "elsewhere", "since": 0, "token": "x", "count": 3}
    (run_dir / LOCK_FILE).write_text(json.dumps(owner))
    with run_lock(run_dir) as told:
        assert "a trainer was killed here: process 7 on elsewhere" in str(told)
    assert "waiting up to" in capsys.readouterr().err


def test_a_killed_trainer_of_this_machine_is_recognised_at_once(run_dir, monkeypatch):
    monkeypatch.setattr(run_lease, "_SETTLING_SECONDS", 0.0)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    owner = {"pid": process.pid, "host": socket.gethostname(), "since": 0}
    (run_dir / LOCK_FILE).write_text(json.dumps(owner))
    begin = time.monotonic()
    with run_lock(run_dir) as told:
        assert f"killed here: process {process.pid} on" in str(told)
    assert time.monotonic() - begin < 5


def test_of_two_that_begin_at_once_one_goes_on(run_dir, monkeypatch):
    monkeypatch.setattr(run_lease, "_SETTLING_SECONDS", 2.0)
    ended, over = [], threading.Event()
    both, put = threading.Barrier(2, timeout=20), run_lease._Lease.put

    def put_beside_the_other(lease):
        both.wait()  # both have seen that nobody has it
        put(lease)

    monkeypatch.setattr(run_lease._Lease, "put", put_beside_the_other)

    def begin():
        try:
            with run_lock(run_dir):
                ended.append("went on")
                over.wait(10)
        except UserError:
            ended.append("refused")
            over.set()

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == ["refused", "went on"]


def test_a_trainer_whose_lease_was_taken_stops(run_dir):
    code = (
        "import bucket, time; bucket.use()\n"
        "from t5g2 import run_lease; run_lease.RENEWED_EVERY_SECONDS = 0.05\n"
        "run_lease._SETTLING_SECONDS = 0\n"
        "from t5g2.files import to_path; from t5g2.run_lock import run_lock\n"
        "with run_lock(to_path('gs://bucket/runs/one')):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    (run_dir / LOCK_FILE).write_text(json.dumps({"pid": 7, "host": "elsewhere", "token": "x"}))
    _, told = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "was taken by process 7 on elsewhere; this one stops" in told


# ---- Checkpoints


def write_checkpoint(home, step, **facts):
    directory.begin(home, step)
    path = directory.place(home, step)
    write_atomically(path / "params" / "d", b"numbers" * step)
    write_manifest(path, {"temporary": False, **facts})
    return path


def saved(home):
    return [checkpoint.step for checkpoint in directory.saved_checkpoints(home)]


def test_a_checkpoint_counts_once_it_is_finished(run_dir, objects):
    home = run_dir / "checkpoints"
    assert not directory.has_checkpoint(home)
    write_checkpoint(home, 3)
    directory.finish(home, 3)
    write_checkpoint(home, 6, temporary=True)
    assert saved(home) == [3]
    assert directory.clear_remains(run_dir) == [".6.partial"]
    assert all("/checkpoints/3/" in name for name in objects.content)
    write_checkpoint(home, 6, temporary=True)
    directory.finish(home, 6)
    assert saved(home) == [3, 6]
    assert [c.step for c in directory.permanent(directory.saved_checkpoints(home))] == [3]
    write_checkpoint(home, 9)
    directory.discard(home, 9)
    assert not any("9" in name for name in objects.content)


def test_what_is_killed_while_pruning_leaves_no_half_checkpoint(run_dir, objects, monkeypatch):
    home = run_dir / "checkpoints"
    write_checkpoint(home, 3)
    directory.finish(home, 3)

    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(directory, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            directory.prune(home / "3")
    assert "bucket/runs/one/checkpoints/3/manifest.json" in objects.content
    assert saved(home) == []
    assert directory.clear_remains(run_dir) == [".3.partial"]
    assert objects.content == {}


def test_a_damaged_checkpoint_is_set_aside_with_all_its_files(run_dir, objects):
    home = run_dir / "checkpoints"
    path = write_checkpoint(home, 3)
    directory.finish(home, 3)
    before = {name.rsplit("/3/")[1]: content for name, content in objects.content.items()}
    aside = directory.set_aside(path)
    assert str(aside) == "gs://bucket/runs/one/checkpoints/3.damaged-1"
    after = {name.split("damaged-1/")[1]: content for name, content in objects.content.items()}
    assert after == before
    assert saved(home) == []


def test_a_checkpoint_that_is_read_is_not_pruned(run_dir, objects):
    home = run_dir / "checkpoints"
    path = write_checkpoint(home, 3)
    directory.finish(home, 3)
    assert not directory.is_in_use(path)
    with directory.in_use([path]):
        assert directory.is_in_use(path)
        assert saved(home) == [3]
    assert not directory.is_in_use(path)
    # A reader that was killed days ago holds nothing up.
    (home / ".3.in-use-00").write_text(json.dumps(time.time() - 2 * 24 * 3600))
    assert not directory.is_in_use(path)
    directory.prune(path)
    assert objects.content == {}


def test_every_changed_truncated_or_missing_object_is_named(run_dir, objects):
    home = run_dir / "checkpoints"
    path = write_checkpoint(home, 3)
    name = "bucket/runs/one/checkpoints/3/params/d"
    whole = objects.content[name]
    for content, told in ((whole[:-1], "20 bytes instead of 21"), (b"N" + whole[1:], "differs")):
        objects.content[name] = content
        with pytest.raises(UserError, match=f"gs://{name}.*{told}"):
            verify(path)
    objects.delete(name)
    with pytest.raises(UserError, match=f"gs://{name} is missing"):
        verify(path)


def test_records_are_put_before_a_checkpoint_counts(run_dir):
    log = MetricsLog(run_dir)
    seen = []

    def before_commit():
        log.flush()
        seen.append((len(read_metrics(run_dir).events), directory.has_checkpoint(home)))

    home = run_dir / "checkpoints"
    with CheckpointStore(home, CheckpointConfig(), before_commit=before_commit) as store:
        directory.begin(home, 3)
        write_atomically(home / "3" / "params" / "d", b"numbers")
        log.write("event", 3, level="info", message="one")
        store._checkpointer.wait_until_finished()
        store._complete(3, home / "3", {})
        assert seen == [(1, False)]
        assert store.newest_sound() == 3
    log.close()


def test_a_tree_of_arrays_is_written_to_the_bucket_and_read_back(run_dir):
    import orbax.checkpoint as ocp

    from t5g2.checkpoints.store import open_arrays, read_arrays

    arrays = {"a": np.arange(12.0).reshape(3, 4), "b": {"c": np.ones(5, np.int32)}}
    path = run_dir / "checkpoints" / "3"
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.Composite(params=ocp.args.StandardSave(arrays)))
    write_manifest(path, {})
    for read in (read_arrays(path / "params"), open_arrays(path / "params")):
        np.testing.assert_array_equal(np.asarray(read["a"]), arrays["a"])
        np.testing.assert_array_equal(np.asarray(read["b"]["c"]), arrays["b"]["c"])
