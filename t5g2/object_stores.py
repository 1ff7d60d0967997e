"""Run directories and checkpoints in a bucket: paths of `gs://` that behave as those of pathlib.

An object store has no rename, no append, no locks, no empty directories: an object is put whole or
not at all. What is to be written goes through `t5g2.files`, which knows both.
"""

from __future__ import annotations

import atexit
import errno
import fnmatch
import functools
import importlib.util
import os
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from etils.epath.backend import fsspec_backend
from etils.epath.gpath import PosixGPath
from etils.epath.stat_utils import StatResult

from t5g2.errors import UserError

SCHEME = "gs://"

# epath would import TensorFlow where that is installed, which takes seconds and has other errors.
os.environ.setdefault("EPATH_USE_TF", "false")


class _Stat(StatResult):
    """epath's, with pathlib's names."""

    @property
    def st_size(self) -> int:
        return self.length

    @property
    def st_mtime(self) -> float:
        return self.mtime


class ObjectPath(PosixGPath):
    """epath's path of an object, with what pathlib has and epath has not.

    What fails is an OSError, as of a file system, whichever package reports it.
    """

    def resolve(self, strict: bool = False) -> ObjectPath:
        """Without `..`, which a bucket has not; a path of a bucket is absolute."""
        bucket, _, name = os.fspath(self).removeprefix(SCHEME).partition("/")
        inside = posixpath.normpath(f"/{name}").lstrip("/")
        return type(self)(f"{SCHEME}{bucket}/{inside}")

    absolute = resolve

    @property
    def _backend(self) -> Any:
        # Of epath's back ends the one that is the same whether or not TensorFlow is installed.
        return _OSErrors(fsspec_backend)

    @property
    def _store(self) -> Any:
        """The file system of fsspec."""
        return _OSErrors(fsspec_backend.fs(self))

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """The objects below it, in no order, whose name matches; directories are none."""
        for name in self._store.find(os.fspath(self)):
            if fnmatch.fnmatchcase(posixpath.basename(name), pattern):
                yield type(self)(SCHEME + name)

    def read_bytes(self) -> bytes:
        """The object."""
        return self._store.cat_file(os.fspath(self))

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """As pathlib's, UTF-8 by default."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: bytes) -> int:
        """Puts the object: a reader sees the old one or this one."""
        self._store.pipe_file(os.fspath(self), data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        """As `write_bytes`, in UTF-8 by default."""
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def open(
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
    ) -> IO[Any]:
        """As pathlib's; nothing can be appended to, see `t5g2.files.append`."""
        if mode.strip("bt") not in ("r", "w"):
            raise ValueError(f"{self}: an object is written whole, not opened with {mode!r}")
        return super().open(mode)

    def stat(self) -> _Stat:
        """Size and time of the last change."""
        return _Stat(**vars(super().stat()))

    def put_file(self, source: Path) -> None:
        """Puts a local file, however large."""
        self._store.put_file(os.fspath(source), os.fspath(self))

    def get_file(self, target: Path) -> None:
        """Writes the object to a local file, however large."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self._store.get_file(os.fspath(self), os.fspath(target))

    def copy_tree(self, target: ObjectPath) -> None:
        """Copies all objects below it, within the store."""
        for source in self.rglob("*"):
            to = target / source.relative_to(self).as_posix()
            self._store.cp_file(os.fspath(source), os.fspath(to))


class _OSErrors:
    """Something whose methods raise nothing but OSErrors."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._inner, name)

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except OSError as error:
                if error.strerror is not None or isinstance(error, FileNotFoundError):
                    raise
                raise OSError(errno.EIO, str(error) or type(error).__name__) from error
            except Exception as error:  # of the network, the service, the credentials
                told = " ".join(str(error).split()) or type(error).__name__
                raise OSError(errno.EIO, told) from error

        return call


def open_path(text: str) -> Path:
    """The path of an address with a scheme.

    Raises:
        UserError: an address of something else, or what reads buckets is not installed.
    """
    if not text.startswith(SCHEME):
        raise UserError(
            f"{text}: of object stores only {SCHEME} is read and written; mount this one, and name "
            "the directory there"
        )
    if text == SCHEME or text.startswith(f"{SCHEME}/"):
        raise UserError(f"{text} names no bucket")
    _prepare()
    return cast(Path, ObjectPath(text).resolve())


def download(name: Path) -> Path:
    """A local copy of an object, or of all objects below a path; it lasts as the process does."""
    path = ObjectPath(name).resolve()
    home = Path(tempfile.mkdtemp(prefix="t5g2-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    copy = home / path.name
    if path.is_file():
        path.get_file(copy)
    else:
        for source in path.rglob("*"):
            source.get_file(copy / source.relative_to(path).as_posix())
    return copy


def upload(directory: Path, path: Path) -> None:
    """Puts all files of a local directory below a path."""
    for source in sorted(directory.rglob("*")):
        if source.is_file():
            ObjectPath(path / source.relative_to(directory).as_posix()).put_file(source)


def _prepare() -> None:
    """Sees that objects can be read, and that what other processes write is seen.

    Raises:
        UserError: the package that does it is not installed.
    """
    import fsspec
    from fsspec.registry import registry

    if "gcs" not in registry and importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{SCHEME} needs gcsfs: pip install 't5g2[gcs]'")
    # Else it remembers its first listing of a directory for ever.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
