"""One trainer a run directory, in a bucket, which has no locks: an object that its owner renews.

Whoever finds one waits and sees whether it is renewed; if not, its owner was killed. So no clocks
are compared. An owner that finds another's in place of its own stops at once, as if killed, which a
run withstands.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t5g2.errors import UserError
from t5g2.files import remove

RENEWED_EVERY_SECONDS = 15.0
# Four renewals may fail, of a store that is away for a moment.
_GIVEN_UP_AFTER = 4 * RENEWED_EVERY_SECONDS + 5.0
_LOOKS_EVERY_SECONDS = 1.0
# Of two that begin at once, the one whose object is there a while later goes on.
_SETTLING_SECONDS = 3.0


@contextlib.contextmanager
def run_lease(path: Path, owner: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Holds `path` while the block runs, and renews it in the background.

    Args:
        path: the object.
        owner: facts for a person, with `pid` and `host`.

    Yields:
        The facts of an owner that was killed; None: there was none.

    Raises:
        TakenError: another holds it.
        OSError: the store fails.
    """
    before = _read(path)
    if before is not None and not _is_dead(before):
        told = f"{path}: waiting up to {_GIVEN_UP_AFTER:.0f} s to see whether its trainer is alive"
        print(told, file=sys.stderr, flush=True)
        _see_it_stand_still(path, before)
    lease = _Lease(path, owner)
    lease.put()
    time.sleep(_SETTLING_SECONDS)
    if not lease.stands():
        raise TakenError(_read(path) or {})
    lease.start()
    try:
        yield before
    finally:
        lease.end()


class TakenError(UserError):
    """Another has it; `owner` is what is known of that."""

    def __init__(self, owner: dict[str, Any]) -> None:
        super().__init__("another trainer has it")
        self.owner = owner


class _Lease:
    """Ours: put, and put again and again."""

    def __init__(self, path: Path, owner: dict[str, Any]) -> None:
        self._path, self._owner, self._token = path, owner, secrets.token_hex(8)
        self._count = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="run lease", daemon=True)

    def put(self) -> None:
        self._count += 1
        facts = {**self._owner, "token": self._token, "count": self._count}
        self._path.write_text(json.dumps(facts))

    def stands(self) -> bool:
        found = _read(self._path)
        return found is not None and found.get("token") == self._token

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self.stands():
                remove(self._path)

    def _renew(self) -> None:
        while not self._over.wait(RENEWED_EVERY_SECONDS):
            try:
                if (found := _read(self._path)) and found.get("token") != self._token:
                    _stop(self._path, found)
                self.put()
            except OSError:
                continue  # Saving says what is wrong with the store.


def _stop(path: Path, owner: dict[str, Any]) -> None:
    told = f"{path} was taken by process {owner.get('pid')} on {owner.get('host')}"
    print(f"t5g2: error: {told}; this one stops", file=sys.stderr, flush=True)
    os._exit(1)


def _see_it_stand_still(path: Path, before: dict[str, Any]) -> None:
    """Returns once it was not renewed for long enough, or is gone.

    Raises:
        TakenError: it was renewed.
    """
    until = time.monotonic() + _GIVEN_UP_AFTER
    while time.monotonic() < until:
        time.sleep(_LOOKS_EVERY_SECONDS)
        found = _read(path)
        if found is None:
            return
        if found != before:
            raise TakenError(found)


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether it was a process of this machine that there is no more."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
