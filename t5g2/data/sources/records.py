"""Records: what a source's files hold, one text each, before they are split into documents."""

import logging
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from t5g2.errors import UserError

logger = logging.getLogger(__name__)

# So many bad records are logged one by one; the count of all is in the corpus' facts.
_LOGGED = 10

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class BadRecord(Exception):  # noqa: N818 - it is one, whether or not it ends anything
    """A record that has no text: the message is one line that names its place."""


class Records(Protocol):
    """Records by number; reading one twice gives the same."""

    def __len__(self) -> int: ...

    def text(self, number: int) -> str:
        """The text of a record; raises `BadRecord` if it has none."""

    def fingerprint(self) -> str:
        """Changes when files come, go or change their size."""


@runtime_checkable
class RecordStream(Protocol):
    """Records that can only be read in their own order, always the same."""

    def records(self) -> Iterator[Callable[[], str]]:
        """For each record a function that gives its text, or raises `BadRecord`."""

    def fingerprint(self) -> str:
        """Changes with the data, as far as that can be told without reading it."""


class BadRecords:
    """The bad records of a whole corpus, and how many there may be."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._found: dict[str, set[int]] = {}

    def add(self, source: str, number: int, problem: BadRecord) -> None:
        """Counts a record of a source, once.

        Raises:
            UserError: there are more than `limit` now.
        """
        found = self._found.setdefault(source, set())
        if number in found:
            return
        found.add(number)
        total = sum(map(len, self._found.values()))
        if not self.limit:
            raise UserError(
                f"{problem}; mend it, or have it skipped by corpus.max_bad_records (source "
                f"{source})"
            )
        if total > self.limit:
            raise UserError(
                f"{problem}; with it source {source} brings the bad records to {total}, and "
                f"corpus.max_bad_records is {self.limit}"
            )
        if total <= _LOGGED:
            logger.warning("skipped: %s", problem)

    def count(self, source: str) -> int:
        """How many of a source have been found so far."""
        return len(self._found.get(source, ()))


class Recent(Generic[Key, Value]):
    """The values used last, up to a total size; any of several threads may ask."""

    def __init__(self, limit: int) -> None:
        """Holds values of at most `limit` together, but always the last one."""
        self.limit = limit
        self._clear()

    def _clear(self) -> None:
        self._items: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._total = 0
        self._lock = threading.RLock()

    def get(self, key: Key, make: Callable[[], tuple[Value, int]]) -> Value:
        """The value of `key`; where it is not held, `make` gives it and its size."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
                return self._items[key][0]
            value, size = make()
            self._items[key] = value, size
            self._total += size
            while self._total > self.limit and len(self._items) > 1:
                self._total -= self._items.popitem(last=False)[1][1]
            return value

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.limit = state["limit"]
        self._clear()


def decoded(content: bytes, place: object) -> str:
    """UTF-8 as text; `BadRecord` names the place and the first byte that is none."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"{place}: not UTF-8 (byte {error.start})") from None


def file_names(paths: Iterable[Path], root: Path) -> list[str]:
    """Names of files relative to a directory above them."""
    return [path.relative_to(root).as_posix() for path in paths]


def cannot_read(path: Path, error: OSError) -> UserError:
    """The error for a file that the system does not give."""
    problem = one_line(error) if error.errno is None else os.strerror(error.errno)
    return UserError(f"{path}: cannot be read: {problem}")


def one_line(error: object) -> str:
    """An error's message without line ends, cut where it grows long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + " …"


class FileRecords:
    """What all readers of files share.

    Attributes:
        root: a directory above all files.
        names: the files, relative to it, in the order that their records have.
    """

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root = root
        self.names = names

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.root / name for name in self.names]

    def fingerprint(self) -> str:
        """Changes when a file comes, goes or changes its size.

        Raises:
            UserError: a file cannot be read.
        """
        digest = 0
        for name in self.names:
            try:
                size = (self.root / name).stat().st_size
            except OSError as error:
                raise cannot_read(self.root / name, error) from None
            line = f"{name}\0{size}\n".encode(errors="surrogateescape")
            digest = zlib.crc32(line, digest)
        return f"{digest:08x}"
