"""One trainer a run directory: a lock that tells its owner and ends with the process."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from t5g2.errors import UserError
from t5g2.files import is_remote
from t5g2.parallel import hosts
from t5g2.run_lease import TakenError, run_lease

LOCK_FILE = "trainer.lock"

_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextlib.contextmanager
def run_lock(run_dir: Path) -> Iterator[str | None]:
    """Keeps other trainers out of a run directory; of several processes the first one does.

    The lock is the operating system's, on a file that names its owner: it ends with the process,
    whatever ends that, and on file systems that hosts share it holds between them. What a killed
    owner left in the file is recognised by the lock being free. In a bucket it is a lease, see
    `run_lease`.

    Yields:
        What a person should know: that the last trainer was killed, or that the file system has no
        locks. None: nothing.

    Raises:
        UserError: another trainer is at work there, or the directory cannot be written.
    """
    if not hosts.is_first():
        yield None
        return
    path = run_dir / LOCK_FILE
    own = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    if is_remote(run_dir):
        with _leased(path, own) as told:
            yield told
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(
            f"--run_dir {run_dir} cannot be written: {error.strerror}; name another one, or make "
            "it writable"
        ) from error
    with file:
        told = None
        try:
            # Not flock: a forked child would share that lock, and hold it when this process dies.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise _taken(run_dir, _owner(file)) from error
            told = f"{path}: no locks on this file system, a second trainer would go unnoticed"
        else:
            if os.fstat(file.fileno()).st_size:
                told = f"a trainer was killed here: {_owner(file)}; going on"
        _write(file, own)
        try:
            yield told
        finally:
            file.truncate(0)


def _write(file: IO[str], owner: dict[str, object]) -> None:
    file.truncate(0)
    with contextlib.suppress(OSError):  # No room: the lock holds all the same.
        file.write(json.dumps(owner))
        file.flush()


@contextlib.contextmanager
def _leased(path: Path, own: dict[str, Any]) -> Iterator[str | None]:
    with contextlib.ExitStack() as stack:
        try:
            before = stack.enter_context(run_lease(path, own))
        except TakenError as error:
            raise _taken(path.parent, _told(error.owner)) from error
        except OSError as error:
            raise UserError(
                f"--run_dir {path.parent} cannot be written: {error.strerror}"
            ) from error
        yield None if before is None else f"a trainer was killed here: {_told(before)}; going on"


def _taken(run_dir: Path, owner: str) -> UserError:
    return UserError(f"{run_dir} is being trained by {owner}: stop that, or name another --run_dir")


def _owner(file: IO[str]) -> str:
    file.seek(0)
    try:
        return _told(json.loads(file.read()))
    except (OSError, ValueError):
        return _told({})


def _told(owner: dict[str, Any]) -> str:
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
        return f"process {owner['pid']} on {owner['host']}, since {since}"
    except (KeyError, TypeError, ValueError):
        return "a process that did not say its name"
