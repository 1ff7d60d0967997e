"""A file that only grows, in a bucket, where nothing can be appended to: objects in its place.

`metrics.jsonl` is then `metrics.jsonl.000001`, `metrics.jsonl.000002` and so on: put together they
are the file. Every process begins an object of its own; while it is short it is put anew.
"""

import concurrent.futures
import logging
import threading
from pathlib import Path

from t5g2.errors import UserError

# Stores take about one change of an object a second.
_SECONDS = 1.0
_SECONDS_AFTER_FAILURE = 10.0
_LONGEST = 512 << 10  # bytes of an object; one that has more is done
_READERS = 16

logger = logging.getLogger(__name__)


class AppendedObjects:
    """Appends in the background: what is killed within about a second of a call may lack it."""

    def __init__(self, path: Path) -> None:
        """Goes on after the objects that there are.

        Args:
            path: what the name of each begins with.
        """
        self.path = path
        numbers = [0, *(int(part.suffix[1:]) for part in parts(path) if part != path)]
        self._number = max(numbers) + 1
        self._objects: dict[int, bytes] = {self._number: b""}
        self._changed = threading.Condition()
        self._calls, self._put = 0, 0  # calls of append, and those of them that are put
        self._tries, self._failed = 0, 0  # attempts begun, and the last of them, if it failed
        self._hurry, self._closing = False, False
        self._thread = threading.Thread(target=self._work, name=f"put {path.name}", daemon=True)
        self._thread.start()

    def append(self, data: bytes) -> None:
        """Appends bytes."""
        with self._changed:
            if len(self._objects[self._number]) + len(data) > _LONGEST:
                self._number += 1
            self._objects[self._number] = self._objects.get(self._number, b"") + data
            self._calls += 1
            self._changed.notify_all()

    def end_line(self) -> None:
        """Does nothing: no object is torn."""

    def flush(self) -> None:
        """Waits until all of it is put, or an attempt begun after this call has failed."""
        with self._changed:
            calls, tries = self._calls, self._tries
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._put >= calls or self._failed > tries)

    def close(self) -> None:
        """Ends it; a second call does nothing.

        Raises:
            UserError: the last of it could not be put.
        """
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        if self._put < self._calls:
            raise UserError(f"the last of {self.path} could not be put there")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._put < self._calls or self._closing)
                if self._put == self._calls:
                    return
                closing, calls, objects = self._closing, self._calls, dict(self._objects)
                self._tries += 1
                self._hurry = False
            put = self._try(objects)
            with self._changed:
                self._failed = 0 if put else self._tries
                if put:
                    self._put = calls
                    for number, data in objects.items():
                        if number != self._number and self._objects[number] is data:
                            del self._objects[number]
                self._changed.notify_all()
                if closing and not put:
                    return
                if put:
                    self._changed.wait_for(lambda: self._closing, _SECONDS)
                else:
                    self._changed.wait_for(
                        lambda: self._closing or self._hurry, _SECONDS_AFTER_FAILURE
                    )

    def _try(self, objects: dict[int, bytes]) -> bool:
        try:
            for number, data in sorted(objects.items()):
                if data:
                    self.path.with_name(f"{self.path.name}.{number:06}").write_bytes(data)
        except OSError as error:
            if not self._failed:
                logger.warning(
                    "%s: %s; what is to be put there is kept until it can be",
                    self.path,
                    error.strerror,
                )
            return False
        return True


def read_parts(path: Path) -> bytes:
    """The file that the objects are together.

    Raises:
        FileNotFoundError: there is none.
    """
    found = parts(path)
    if not found:
        raise FileNotFoundError(path)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as threads:
        return b"".join(threads.map(lambda part: part.read_bytes(), found))


def parts(path: Path) -> list[Path]:
    """The objects, in order; one that was copied there whole, as `path`, comes first."""
    found = path.parent.glob(f"{path.name}*")
    return sorted(part for part in found if part == path or part.suffix[1:].isdigit())
