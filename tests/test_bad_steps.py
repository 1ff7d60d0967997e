"""Steps whose loss is not finite, or a spike: told of, left out, rolled back from, or the end."""

import json
import math
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from poison import poison
from small_run import write_corpus, write_recipe

from t5g2 import cli
from t5g2.checkpoints.store import read_arrays, read_meta
from t5g2.data.corpus import reopen_corpus, row_stream
from t5g2.data.feed import documents_between
from t5g2.data.loader import RowBatches
from t5g2.reporting.metrics_log import read_metrics
from t5g2.settings import run_settings

BAD = (7, 8)
FAST = ("finish.samples=0", "finish.export=False", "train.log_every=4", "checkpoints.every=3")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, standard_library):
    home = tmp_path_factory.mktemp("recipe")
    return write_recipe(
        home / "recipe.gin", write_corpus(home / "corpus", standard_library(300_000))
    )


def arguments(recipe, run_dir, *bindings):
    flags = [f"--gin.{binding}" for binding in (*FAST, *bindings)]
    return ["train", "--run_dir", str(run_dir), "--gin_file", str(recipe), *flags]


def train(recipe, run_dir, *bindings):
    return cli.main(arguments(recipe, run_dir, *bindings))


@pytest.fixture(scope="module")
def begun(recipe, tmp_path_factory):
    """A run without a bad step, up to step 3."""
    run_dir = tmp_path_factory.mktemp("runs") / "begun"
    assert train(recipe, run_dir, "train.stop_at=3") == 0
    return run_dir


@pytest.fixture(scope="module")
def digests(begun):
    """Of the batches 1 to 12, as the loader makes them."""
    settings = run_settings(begun)
    corpus = reopen_corpus(settings.corpus, begun, settings.model)
    stream = row_stream(corpus, "train", settings.data, 4)
    batches = iter(RowBatches(stream, stream.start(), 0, 4))
    return [int(next(batches).batch["row_digest"].sum(dtype=np.uint32)) for _ in range(12)]


@pytest.fixture
def nans(digests):
    undo = poison([digests[number - 1] for number in BAD])
    yield
    undo()


@pytest.fixture
def spikes(digests):
    undo = poison([digests[number - 1] for number in BAD], 1e3)
    yield
    undo()


def events(run_dir):
    return [event for event in read_metrics(run_dir).events if "bad_step" in event]


def losses(run_dir):
    exact = ("loss", "grad_norm", "tokens", "data_digest", "learning_rate")
    return {row["step"]: [row[name] for name in exact] for row in read_metrics(run_dir).train}


def arrays(run_dir, step):
    return read_arrays(run_dir / "checkpoints" / str(step) / "params"), read_arrays(
        run_dir / "checkpoints" / str(step) / "optimizer"
    )


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_step_that_is_not_finite_leaves_every_bit_and_names_its_batch(
    recipe, nans, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, "checkpoints.every=1", "checkpoints.keep=12") == 0
    (params, optimizer), (after, optimizer_after) = arrays(run_dir, 6), arrays(run_dir, 8)
    assert_same(params, after)
    assert_same(optimizer["opt_state"], optimizer_after["opt_state"])
    assert (optimizer["step"], optimizer_after["step"]) == (6, 8)
    moved = arrays(run_dir, 9)[0]
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(moved), strict=True)
    )
    found = events(run_dir)
    assert [(e["step"], e["bad_step"], e["skipped"]) for e in found] == [
        (7, "nonfinite", True),
        (8, "nonfinite", True),
    ]
    assert math.isnan(found[0]["loss"])
    rows = read_metrics(run_dir).train
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert [row.get("skipped_steps", 0) for row in rows] == [0, 2, 0]
    # The schedule counts updates: after 12 steps, two of them left out, it stands where it would
    # after 10.
    rates = {row["step"]: row["learning_rate"] for row in rows}
    count = optax_count(arrays(run_dir, 12)[1])
    assert count == 10
    assert rates[12] > 0.1 * 1e-3
    command = re.search(r"t5g2 (inspect data .*--batch 7)", found[0]["message"])
    capsys.readouterr()
    assert cli.main(command[1].split()) == 0
    said = capsys.readouterr().out
    assert f"digest {found[0]['batch_digest']}; as the run recorded it" in said
    listed = {
        (source, int(number))
        for source, number in re.findall(r"(\S+) (\d+) \[\d+:\d+\] ", said.split("\n\n")[0])
    }
    recorded = {
        (source, int(n)) for source, ids in found[0]["documents"].items() for n in ids.split()
    }
    assert listed == recorded
    assert "not finite" in (run_dir / "report.html").read_text()
    capsys.readouterr()
    assert cli.main(["inspect", "data", "--run_dir", str(run_dir), "--step", "7"]) == 0
    assert capsys.readouterr().out == said


def optax_count(optimizer):
    found = [
        int(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(optimizer["opt_state"])
        if "count" in jax.tree_util.keystr(path)
    ]
    assert len(set(found)) == 1
    return found[0]


@pytest.fixture(scope="module")
def without(recipe, digests, tmp_path_factory):
    """A run whose loader never made the bad batches; by the same compiled step."""
    run_dir = tmp_path_factory.mktemp("runs") / "without"
    undo, prefetched = poison([digests[n - 1] for n in BAD]), RowBatches.prefetched

    class Others:
        def __init__(self, loader):
            self.batches, self.number = prefetched(loader), 0

        def __next__(self):
            self.number += 1
            while self.number in BAD:
                next(self.batches)
                self.number += 1
            return next(self.batches)

        def close(self):
            self.batches.close()

    RowBatches.prefetched = lambda loader: Others(loader)
    try:
        assert train(recipe, run_dir) == 0
    finally:
        RowBatches.prefetched = prefetched
        undo()
    return run_dir


ROLLBACK = ("bad_steps.nonfinite=rollback", "bad_steps.checkpoints_back=2")


def assert_rolled_back(run_dir, without):
    ours, theirs = losses(run_dir), losses(without)
    # The record of step 4 is over the steps since the checkpoint of step 3: its loss is of fewer.
    assert ours.pop(4)[1:] == theirs.pop(4)[1:]
    assert ours == theirs
    assert_same(arrays(run_dir, 12), arrays(without, 12))
    metas = [read_meta(where / "checkpoints" / "12") for where in (run_dir, without)]
    assert metas[0]["digest"] == metas[1]["digest"]
    assert metas[0]["guard"] == metas[1]["guard"]
    assert metas[0]["batch"] == 14
    (entry,) = json.loads((run_dir / "rollbacks.json").read_text())
    assert entry == {"back_to": 3, "first": 7, "last": 8}
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"3", "6", "9", "12"}


def test_after_a_rollback_a_run_is_the_one_that_never_had_these_batches(
    recipe, nans, without, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    assert train(recipe, run_dir, *ROLLBACK) == 0
    assert "back from step 8 to step 3, and on without batches 7 to 8" in capsys.readouterr().err
    assert_rolled_back(run_dir, without)
    assert [event["batch"] for event in events(run_dir)] == [7, 8]
    # Of the step, the batch that it has now; of the number, the one that went wrong.
    for flag, batch in (("--step", "batch 9,"), ("--batch", "batch 7,")):
        assert cli.main(["inspect", "data", "--run_dir", str(run_dir), flag, "7"]) == 0
        assert capsys.readouterr().out.startswith(batch)


def test_a_run_that_is_to_stop_does_so_before_the_bad_step_and_goes_on_once_told_to(
    recipe, nans, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    for _ in range(2):
        assert train(recipe, run_dir, "bad_steps.nonfinite=stop") == 3
        assert "stopped at step 7; the last checkpoint is of step 6" in capsys.readouterr().err
    assert train(recipe, run_dir, "bad_steps.nonfinite=skip", "bad_steps.most_in_a_row=2") == 3
    assert "2 steps in a row were skipped" in capsys.readouterr().err
    assert train(recipe, run_dir) == 0


def test_spikes_are_told_of_or_left_out_and_a_stopped_run_decides_alike(recipe, spikes, tmp_path):
    window = ("bad_steps.window=4", "train.log_every=2")
    assert train(recipe, tmp_path / "logged", *window) == 0
    found = events(tmp_path / "logged")
    assert [(e["step"], e["bad_step"], e["skipped"]) for e in found][:2] == [
        (7, "spike", False),
        (8, "spike", False),
    ]
    window += ("bad_steps.spike=skip", "checkpoints.every=1", "checkpoints.keep=12")
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(recipe, whole, *window) == 0
    assert_same(arrays(whole, 6)[0], arrays(whole, 8)[0])
    assert train(recipe, halves, *window, "train.stop_at=7") == 0
    assert train(recipe, halves, *window) == 0
    assert_same(arrays(whole, 12), arrays(halves, 12))
    assert [e["step"] for e in events(halves)] == [e["step"] for e in events(whole)]


def test_the_documents_of_a_batch_are_known_without_reading_them(begun):
    settings = run_settings(begun)
    stream = row_stream(
        reopen_corpus(settings.corpus, begun, settings.model), "train", settings.data, 4
    )
    before = stream.start()
    for _ in range(40):
        after = before.copy()
        cuts, after[2:] = stream.cut_rows(2, before[2:])
        taken = set(cuts.document.tolist())
        (documents,) = documents_between(stream, 2, before[2:], after[2:]).values()
        assert set(documents) == taken
        before = after


def test_a_batch_that_is_none_or_no_longer_the_same_is_refused(begun, tmp_path, capsys):
    def refused(*flags):
        assert cli.main(["inspect", "data", *map(str, flags)]) == 2
        return capsys.readouterr().err

    assert "--step must be at least 1" in refused("--run_dir", begun, "--step", 0)
    assert "give --run_dir" in refused("--run_dir", begun, "--batch", 1, "--split", "heldout")
    copied = tmp_path / "run"
    subprocess.run(["cp", "-r", begun, copied], check=True)
    event = {"kind": "event", "step": 1, "time": 0, "batch": 1, "batch_digest": "00000000"}
    with (copied / "metrics.jsonl").open("a") as log:
        log.write(json.dumps(event) + "\n")
    assert "batch 1 cannot be made again" in refused("--run_dir", copied, "--batch", 1)


def begin(recipe, run_dir, digests, kill, *bindings):
    bad = ",".join(f"{digests[number - 1]:08x}" for number in BAD)
    command = [sys.executable, str(Path(__file__).parent / "poison.py"), bad, *kill]
    return subprocess.Popen(
        [*command, *arguments(recipe, run_dir, *bindings)], stderr=subprocess.PIPE, text=True
    )


KILLS = (
    ("t5g2.recovery:roll_back", "1"),
    ("t5g2.checkpoints.keeping:_remove", "1"),
    ("t5g2.starting:remove_abandoned", "2"),
    ("t5g2.train:start_or_restore", "2"),
)


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill[0].rpartition(":")[2])
def test_a_rollback_that_was_killed_is_completed_by_the_same_command(
    recipe, digests, without, tmp_path, kill
):
    run_dir = tmp_path / "run"
    process = begin(recipe, run_dir, digests, kill, *ROLLBACK)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, stderr
    process = begin(recipe, run_dir, digests, ("", ""), *ROLLBACK)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert_rolled_back(run_dir, without)


@pytest.mark.slow
def test_two_processes_go_back_alike_as_one_with_two_devices_does(recipe, digests, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    hosts = [f"hosts.coordinator={address}", "hosts.count=2"]
    processes = [
        begin(recipe, two, digests, ("", ""), *ROLLBACK, *hosts, f"hosts.index={index}")
        for index in range(2)
    ]
    written = [process.communicate(timeout=400)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], written
    process = begin(recipe, one, digests, ("", ""), *ROLLBACK, "mesh.cpu_devices=2")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert losses(two) == losses(one)
    assert_same(arrays(two, 12), arrays(one, 12))
    names = ("step", "batch", "batch_digest", "documents", "skipped")
    told = [[[event[name] for name in names] for event in events(where)] for where in (two, one)]
    assert told[0] == told[1]
    assert [event["batch"] for event in events(two)] == [7, 8]
    rollbacks = [json.loads((where / "rollbacks.json").read_text()) for where in (two, one)]
    assert rollbacks[0] == rollbacks[1] == [{"back_to": 3, "first": 7, "last": 8}]
