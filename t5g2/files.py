"""Writing files and directories so that a reader never sees half of one.

Every path that a person names may be of the file system or of a bucket (`to_path`); here is what
differs between the two, see `t5g2.object_stores`.
"""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from t5g2.errors import UserError


def to_path(name: str | os.PathLike[str]) -> Path:
    """The path that a person named, of the file system or of a bucket (`gs://bucket/...`).

    Raises:
        UserError: an address of something else, or what reads buckets is not installed.
    """
    text = os.fspath(name)
    if "://" not in text:
        return Path(text)
    from t5g2.object_stores import open_path  # takes a while, and is for those who need it

    return open_path(text)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of an object store."""
    return "://" in os.fspath(path)


def local_copy(path: Path) -> Path:
    """The path itself, or a copy of what a bucket has there, for what reads local files only."""
    if not is_remote(path):
        return path
    from t5g2.object_stores import download

    return download(path)


def append(path: Path, line: str) -> None:
    """Writes a line at the end of a file, which may be missing.

    One that is killed meanwhile leaves no half line in front of a whole one. In a bucket the file
    is written anew: for small files of a single writer.
    """
    data = line.encode()
    if is_remote(path):
        path.write_bytes((path.read_bytes() if path.exists() else b"") + data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, data)
    finally:
        os.close(file)


def remove(path: Path) -> bool:
    """Removes a file or a directory with all it holds; whether nothing of it is left."""
    if is_remote(path):
        with contextlib.suppress(FileNotFoundError):
            cast(Any, path).rmtree()
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return not path.exists()


def mark_partial(path: Path) -> None:
    """Says, beside what a bucket has at a path, that it is not whole."""
    _mark(path).write_bytes(b"")


def unmark_partial(path: Path) -> None:
    """Says that it is whole, or gone."""
    remove(_mark(path))


def marked_partial(path: Path) -> bool:
    """Whether what a bucket has at a path is being written, or was when that was killed."""
    return is_remote(path) and _mark(path).exists()


def _mark(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file under a temporary name beside it, then renames it into place.

    In a bucket an object is put at once or not at all.
    """
    data = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Gives a directory to fill, which becomes `path` when all went well, and vanishes if not.

    What killed processes left of the same is removed. For a path in a bucket it is a temporary
    directory of this machine, whose files are put there at the end.

    Raises:
        UserError: `path` exists and is not an empty directory, cannot be made, or there is no room
            for what it is to hold.
    """
    if marked_partial(path):
        remove(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists and is not empty: name a new directory")
    if is_remote(path):
        with _uploaded(path) as partial:
            yield partial
        return
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError), _held(left):  # Else someone is at work on it.
            shutil.rmtree(left, ignore_errors=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:  # Made in here: an interrupt may come as soon as it is there.
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{path} cannot be made: {error.strerror}") from error
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
def _uploaded(path: Path) -> Iterator[Path]:
    """As `new_directory`, in a bucket; what failed on the way there is marked as not whole."""
    from t5g2.object_stores import upload

    with tempfile.TemporaryDirectory(prefix="t5g2-") as home:
        partial = Path(home) / path.name
        partial.mkdir()
        yield partial
        try:
            mark_partial(path)
            upload(partial, path)
            unmark_partial(path)
        except OSError as error:
            raise UserError(f"{path} was not written: {error.strerror}") from error


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
