"""Writing files and directories so that a reader never sees half of one."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from t5g2.errors import UserError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name beside it, then renames it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Gives a directory to fill, which becomes `path` when all went well, and vanishes if not.

    What killed processes left of the same is removed.

    Raises:
        UserError: `path` exists and is not an empty directory, cannot be made, or there is no room
            for what it is to hold.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty: name a new directory")
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError), _held(left):  # Else someone is at work on it.
            shutil.rmtree(left, ignore_errors=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}") from error
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # A file system without locks.
                stack.enter_context(_held(partial))
            yield partial
            partial.replace(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise UserError(
                f"{path} was not written: {error.strerror}; make room, or name another place"
            ) from error
        raise


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """Locks a directory; the lock ends with the process, whatever ends that.

    Raises:
        OSError: another holds it, or the file system has no such locks.
    """
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
