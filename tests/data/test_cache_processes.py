"""What happens to the processes that write a cache, told by running and killing them."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cache_parts import contents, make_cache

from t5g2.data.cache_workers import write_in_processes
from t5g2.data.cache_writing import CacheWriter, Part, Todo
from t5g2.errors import UserError

HERE = Path(__file__).parent
SCRIPT = """
import signal, sys, time
from pathlib import Path
from cache_parts import make_cache, small_parts
from t5g2.data.cache_writing import Part

class Slow(list):
    def __getitem__(self, index):
        time.sleep(0.003)
        return super().__getitem__(index)

if __name__ == "__main__":
    # Tests started in the background of a shell inherit that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parts = [Part(split=p.split, source=p.source, texts=Slow(p.texts)) for p in small_parts()]
    make_cache(Path(sys.argv[1]), Path(sys.argv[2]), parts, workers=2)
"""


@pytest.fixture
def start(tmp_path, tiny_tokenizer):
    """Starts writing the cache `tmp_path / "cache"`, slowly, in a group of processes of its own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    started: list[subprocess.Popen] = []

    def begin() -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "cache"), str(tiny_tokenizer.path)],
            env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stderr.close()


def wait_for(happened, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_cache_killed_at_any_moment_goes_on_to_the_same_bytes(start, tmp_path, tiny_tokenizer):
    cache = tmp_path / "cache"
    moments = random.Random(os.getpid())
    kept: set[str] = set()
    for kill in range(3):
        process = start()
        if kill:
            wait_for(
                lambda: list(cache.glob(".partial/*.tmp")) or (cache / "manifest.json").exists()
            )
        time.sleep(moments.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # What is noted as finished stays finished.
        notes = {path.name for path in cache.glob(".partial/*/*.npz")}
        assert kept <= notes or not notes
        kept = notes
    last = start()
    stderr = last.communicate(timeout=30)[1]
    assert last.returncode == 0, stderr
    make_cache(tmp_path / "undisturbed", tiny_tokenizer.path)
    assert contents(cache) == contents(tmp_path / "undisturbed")


def test_workers_end_when_their_parent_is_killed(start, tmp_path):
    process = start()
    wait_for(lambda: len(list((tmp_path / "cache").glob(".partial/*.tmp"))) == 2)
    process.kill()
    process.wait()
    wait_for(lambda: group_is_gone(process.pid), 5)


def test_ctrl_c_ends_all_processes_and_leaves_no_half_a_shard(start, tmp_path):
    process = start()
    wait_for(lambda: len(list((tmp_path / "cache").glob(".partial/*.tmp"))) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    stderr = process.communicate(timeout=10)[1]
    assert process.returncode == -signal.SIGINT
    assert stderr.count("Traceback") == 1  # the parent's own KeyboardInterrupt, which the CLI eats
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    wait_for(lambda: group_is_gone(process.pid), 5)
    assert not list((tmp_path / "cache").rglob("*.tmp"))


class Deadly(list):
    """Documents one of which takes its reader with it, as a shortage of memory does."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("texts", "message"),
    [(["good", "\ud800"], "lone surrogate"), (Deadly(["x"]), "worker process was killed")],
)
def test_what_goes_wrong_in_a_worker_is_one_line(tmp_path, tiny_tokenizer, texts, message):
    (tmp_path / ".partial").mkdir()
    part = Part(split="train", source="text", texts=texts)
    writer = CacheWriter(directory=tmp_path, parts=(part,), tokenizer=tiny_tokenizer)
    with pytest.raises(UserError, match=message) as error:
        write_in_processes(writer, [Todo(0, 0)], 1, lambda *_: None)
    assert "\n" not in str(error.value)
