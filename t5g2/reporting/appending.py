"""A file that only grows, and whose writer outlasts a full disk."""

import errno
import logging
import os
from pathlib import Path

from t5g2.errors import UserError

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
