"""The directory of a run's checkpoints: which there are, which are whole, in use, damaged.

On a file system a checkpoint is written as `.<step>.partial`, and becomes `<step>` by being renamed
once its manifest is written: what has that name is whole. In a bucket nothing can be renamed: there
an object `.<step>.partial` says of `<step>` that it is not whole, or no longer.
"""

import contextlib
import fcntl
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from t5g2.checkpoints.manifest import MANIFEST, read_manifest
from t5g2.checkpoints.store import CHECKPOINTS_DIR
from t5g2.errors import UserError
from t5g2.files import is_remote, mark_partial, marked_partial, remove, unmark_partial

# A reader of a bucket that has not said for so long that it reads on was killed.
_LONGEST_USE_SECONDS = 24 * 3600.0


class Saved(NamedTuple):
    """A checkpoint of a run.

    Attributes:
        step: after which it was saved.
        path: its directory.
        temporary: whether it was saved out of turn and is not kept.
    """

    step: int
    path: Path
    temporary: bool


def saved_checkpoints(directory: Path) -> list[Saved]:
    """The checkpoints of a run's directory of checkpoints, by step; damaged ones, too."""
    paths = [directory / str(step) for step in _steps(directory)]
    return [Saved(int(path.name), path, _is_temporary(path)) for path in paths]


def permanent(saved: list[Saved]) -> list[Saved]:
    """Those of some checkpoints that a run keeps whether or not it was interrupted."""
    return [checkpoint for checkpoint in saved if not checkpoint.temporary]


def has_checkpoint(directory: Path) -> bool:
    """Whether a run's directory of checkpoints holds a finished one; nothing is opened."""
    return bool(_steps(directory))


def begin(directory: Path, step: int) -> None:
    """Prepares for what `place` names to be written; one process of a run does."""
    if is_remote(directory):
        path = place(directory, step)
        mark_partial(path)
        remove(path)


def place(directory: Path, step: int) -> Path:
    """Where a step's checkpoint is written until `finish`."""
    return directory / (str(step) if is_remote(directory) else f".{step}.partial")


def finish(directory: Path, step: int) -> None:
    """Makes the checkpoint of a step count, whose manifest is written."""
    if is_remote(directory):
        unmark_partial(directory / str(step))
    else:
        place(directory, step).rename(directory / str(step))


def discard(directory: Path, step: int) -> None:
    """Removes what was written of a step that cannot be finished."""
    if is_remote(directory):
        if marked_partial(directory / str(step)):
            prune(directory / str(step))
        return
    for path in directory.glob(f".{step}.partial*"):
        remove(path)


def prune(checkpoint: Path) -> None:
    """Removes a checkpoint; a process that is killed meanwhile leaves none."""
    if not is_remote(checkpoint):
        remove(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.pruned")))
        return
    mark_partial(checkpoint)
    remove(checkpoint)
    for use in _uses(checkpoint):
        remove(use)
    unmark_partial(checkpoint)


def set_aside(checkpoint: Path) -> Path:
    """Gives a damaged checkpoint a name that is none of a step; returns where it is now."""
    number = 1
    while (aside := checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")).exists():
        number += 1
    if not is_remote(checkpoint):
        return checkpoint.rename(aside)
    cast(Any, checkpoint).copy_tree(aside)
    prune(checkpoint)
    return aside


def clear_remains(run_dir: Path) -> list[str]:
    """Removes what killed processes of a run left unfinished; returns the names."""
    directories = (run_dir, run_dir / CHECKPOINTS_DIR)
    if is_remote(run_dir):
        marks = [path for where in directories for path in where.glob(".*.partial")]
        for path in (mark.with_name(mark.name[1 : -len(".partial")]) for mark in marks):
            remove(path)
            unmark_partial(path)
        return sorted(path.name for path in marks)
    patterns = (".*.partial*", ".*.tmp", ".*.pruned", "*.orbax-checkpoint-tmp*")
    remains = [path for where in directories for name in patterns for path in where.glob(name)]
    remains += run_dir.glob("*/*.tmp")  # a tokenizer's
    return sorted({path.name for path in remains if remove(path)})


@contextlib.contextmanager
def in_use(checkpoints: list[Path]) -> Iterator[None]:
    """Keeps checkpoints from being pruned by a run that is going on."""
    with contextlib.ExitStack() as stack:
        for path in checkpoints:
            if not (path / MANIFEST).is_file():
                continue
            if is_remote(path):
                stack.enter_context(_using(path))
                continue
            # Ends with the process, whatever ends that.
            file = stack.enter_context((path / MANIFEST).open("rb"))
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def is_in_use(checkpoint: Path) -> bool:
    """Whether another process has it `in_use`."""
    if is_remote(checkpoint):
        return any(map(_is_current, _uses(checkpoint)))
    try:
        with (checkpoint / MANIFEST).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no manifest, or a file system without locks
        return False
    return False


@contextlib.contextmanager
def _using(checkpoint: Path) -> Iterator[None]:
    """Says beside a checkpoint of a bucket that it is read, if one may write there."""
    use = checkpoint.with_name(f".{checkpoint.name}.in-use-{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        use.write_text(json.dumps(time.time()))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            remove(use)


def _uses(checkpoint: Path) -> list[Path]:
    return list(checkpoint.parent.glob(f".{checkpoint.name}.in-use-*"))


def _is_current(use: Path) -> bool:
    try:
        return time.time() - float(use.read_text()) < _LONGEST_USE_SECONDS
    except (FileNotFoundError, ValueError):  # it has just ended
        return False


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    names = {path.name for path in directory.iterdir()}
    steps = (int(name) for name in names if name.isdigit())
    if is_remote(directory):
        return sorted(step for step in steps if f".{step}.partial" not in names)
    return sorted(steps)


def _is_temporary(checkpoint: Path) -> bool:
    try:
        manifest = read_manifest(checkpoint)
    except UserError:
        return False  # Its files are kept for whoever verifies it.
    return manifest is not None and bool(manifest.get("temporary"))
