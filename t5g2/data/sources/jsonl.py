"""JSON Lines: each line is an object, one field of which is the text."""

import gzip
import json
import zlib
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from t5g2.data.sources.records import (
    BadRecord,
    FileRecords,
    cannot_read,
    decoded,
    one_line,
)
from t5g2.data.sources.splits import Without
from t5g2.errors import UserError

_CHUNK = 1 << 22
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_COMPRESSED = (".gz", ".zst")


def is_compressed(name: str) -> bool:
    """Whether a file can only be read from its beginning."""
    return name.endswith(_COMPRESSED)


def text_of_json(content: bytes, field: str, place: object) -> str:
    """The text in a JSON object.

    Raises:
        BadRecord: no JSON, no object, or a field that is missing or no text.
    """
    try:
        line = content.removeprefix(_BYTE_ORDER_MARK).rstrip(b"\r\n")
        value = json.loads(decoded(line, place))
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"{place}: not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise BadRecord(f"{place}: not a JSON object but {_kind(value)}")
    if field not in value:
        there = ", ".join(map(repr, value)) or "none"
        raise BadRecord(f"{place}: no field {field!r}; there are {one_line(there)}")
    text = value[field]
    if not isinstance(text, str):
        raise BadRecord(f"{place}: field {field!r} is not a string but {_kind(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"{place}: field {field!r} holds a lone surrogate at character {error.start}"
        ) from None
    return text


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return "null" if value is None else kinds.get(type(value), "a number")


class JsonLines(FileRecords):
    """The lines of plain files, found by their byte offsets. Empty lines are no records."""

    def __init__(self, root: Path, names: list[str], field: str) -> None:
        """Reads every file once, to find its lines: 8 bytes of memory a line.

        Raises:
            UserError: a file cannot be read.
        """
        super().__init__(root, names)
        self.field = field
        self._files = [_line_starts(path) for path in self.paths]
        counts = [len(starts) - 1 for starts, _ in self._files]
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def text(self, number: int) -> str:
        """The text in a line; raises `BadRecord` if there is none."""
        content, place = self.line(number)
        return text_of_json(content, self.field, place)

    def line(self, number: int) -> tuple[bytes, str]:
        """What a line holds, and the name of its place.

        Raises:
            UserError: the file cannot be read.
        """
        file = self._file(number)
        starts, empty = self._files[file]
        place = number - int(self._ends[file] - (len(starts) - 1))
        path = self.root / self.names[file]
        start, stop = int(starts[place]), int(starts[place + 1])
        try:
            with path.open("rb") as lines:
                lines.seek(start)
                content = lines.read(stop - start)
        except OSError as error:
            raise cannot_read(path, error) from None
        line = Without(empty, len(starts) + len(empty))[place] + 1
        return content, f"{path}, line {line}"

    def file(self, number: int) -> Path:
        """The file of a line."""
        return self.root / self.names[self._file(number)]

    def _file(self, number: int) -> int:
        return int(np.searchsorted(self._ends, number, side="right"))


def _line_starts(path: Path) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " empty"]]:
    """Offsets of the lines that are not empty, and the end; numbers of the empty lines, from 0."""
    starts = array("q", [0])
    offset, last = 0, b"\n"
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
                starts.frombytes((ends.astype(np.int64) + (offset + 1)).tobytes())
                offset += len(chunk)
                last = chunk[-1:]
            if last != b"\n":
                starts.append(offset)
            found = np.frombuffer(starts, np.int64)
            lengths = np.diff(found)
            is_empty = lengths == 1
            if last != b"\n":
                is_empty[-1] = False
            for line in np.flatnonzero(lengths == 2):
                file.seek(found[line])
                is_empty[line] = file.read(2) == b"\r\n"
    except OSError as error:
        raise cannot_read(path, error) from None
    kept = found[:-1][~is_empty]
    return np.append(kept, found[-1]), np.flatnonzero(is_empty)


class JsonLineStream(FileRecords):
    """The lines of files of which some are compressed (`.gz`, `.zst`), in their order.

    A file that ends too early, or is damaged, gives its lines up to there and one bad record.
    """

    def __init__(self, root: Path, names: list[str], field: str) -> None:
        super().__init__(root, names)
        self.field = field

    def records(self) -> Iterator[Callable[[], str]]:
        """For each line a function that gives its text; see `RecordStream`."""
        for path in self.paths:
            number = 0
            try:
                for number, line in enumerate(_lines(_content(path)), 1):
                    if line not in (b"", b"\r"):
                        place = f"{path}, line {number}"
                        yield partial(text_of_json, line, self.field, place)
            except (EOFError, zlib.error, gzip.BadGzipFile, _Damaged) as error:
                problem = f"{path}: damaged or cut off after line {number}: {one_line(error)}"
                yield partial(_raise, BadRecord(problem))
            except OSError as error:
                raise cannot_read(path, error) from None


class _Damaged(Exception):  # noqa: N818
    pass


def _raise(error: Exception) -> str:
    raise error


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends; linear in the length also of a line of many chunks."""
    pending: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pending.append(first)
        for line in others:
            yield b"".join(pending)
            pending = [line]
    if last := b"".join(pending):
        yield last


def _content(path: Path) -> Iterator[bytes]:
    """What a file holds, decompressed, in chunks."""
    if path.suffix == ".zst":
        yield from _zstandard_content(path)
        return
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        # All that stands before a damage: `read` would lose what it had when it came to it.
        while chunk := file.read1(_CHUNK):
            yield chunk


def _zstandard_content(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading it needs zstandard: pip install zstandard") from None
    # A stream reader would take a file that is cut off for one that ends there.
    frame: Any = None
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 17):
                while chunk:
                    frame = frame or zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(chunk)
                    chunk, frame = frame.unused_data, None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise _Damaged(one_line(error)) from None
    if frame is not None:
        raise _Damaged("the last frame is incomplete")
