"""A file that only grows, and whose writer outlasts a full disk.

In a bucket, where nothing grows, several objects stand in its place: see `appended_objects`.
"""

import errno
import logging
import os
from pathlib import Path

from t5g2.errors import UserError
from t5g2.files import is_remote
from t5g2.reporting.appended_objects import AppendedObjects, parts, read_parts

# What may pass while a run goes on: no room, a quota, a network's file system that is away.
_MAY_PASS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT}

logger = logging.getLogger(__name__)


class AppendedFile:
    """Appends to a file with one `os.write` each; nothing waits in this process to be written.

    Except what found no room: that is kept, in order, and written before what comes next. It says
    so once until it has succeeded.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file, which is made if it is missing, for appending and reading."""
        self.path = path
        self.number = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting = b""

    def append(self, data: bytes) -> None:
        """Appends bytes, or keeps them until there is room.

        Raises:
            OSError: of another kind.
        """
        told = bool(self._waiting)
        self._waiting += data
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self.number, self._waiting) :]
        except OSError as error:
            if error.errno not in _MAY_PASS:
                raise
            if not told:
                logger.warning(
                    "%s: %s; what is to be written there is kept until it can be",
                    self.path,
                    error.strerror,
                )

    def end_line(self) -> None:
        """Ends a last line that a power cut tore: its remains must not swallow the next."""
        size = os.fstat(self.number).st_size
        if size and os.pread(self.number, 1, size - 1) != b"\n":
            self.append(b"\n")

    def flush(self) -> None:
        """Does nothing: what could be written is."""

    def close(self) -> None:
        """Closes the file; a second call does nothing.

        Raises:
            UserError: what was kept can still not be written.
        """
        if self.number < 0:
            return
        try:
            self.append(b"")
        finally:
            os.close(self.number)
            self.number = -1
        if self._waiting:
            raise UserError(f"the last {len(self._waiting):,} bytes of {self.path} found no room")


def open_appended(path: Path) -> AppendedFile | AppendedObjects:
    """Opens a file, or what stands in its place in a bucket, for appending."""
    return AppendedObjects(path) if is_remote(path) else AppendedFile(path)


def has_appended(path: Path) -> bool:
    """Whether there is such a file."""
    return bool(parts(path)) if is_remote(path) else path.is_file()


def read_appended(path: Path) -> bytes:
    """All of such a file.

    Raises:
        FileNotFoundError: there is none.
    """
    return read_parts(path) if is_remote(path) else path.read_bytes()
