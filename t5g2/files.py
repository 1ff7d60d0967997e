"""Writing files and directories so that a reader never sees half of one."""

import contextlib
import errno
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

    Raises:
        UserError: `path` exists and is not an empty directory, cannot be made, or there is no room
            for what it is to hold.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty: name a new directory")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}") from error
    try:
        yield partial
        partial.replace(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            raise UserError(
                f"{path} was not written: {error.strerror}; make room, or name another place"
            ) from error
        raise
