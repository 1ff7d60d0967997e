"""Documents: the texts of one split of a source, by number, and the same as token ids."""

import logging
import sys
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import Any, Protocol, TypeVar

import numpy as np
from jaxtyping import Int

from t5g2.data.sources.records import BadRecord, BadRecords, Recent, Records, RecordStream
from t5g2.data.sources.splits import Numbers, heldout_flags, line_splits
from t5g2.data.tokenizer import Tokenizer
from t5g2.errors import UserError

logger = logging.getLogger(__name__)

# Bytes of texts that are kept for being asked for again.
KEPT_BYTES = 128 << 20
# Longer texts are tokenised in stretches of so many characters: a tokenizer's time and memory grow
# faster than a text.
LONGEST_ENCODED = 1 << 20


Item = TypeVar("Item", covariant=True)


class Numbered(Protocol[Item]):
    """What is read by number, or all of it in order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...

    def __iter__(self) -> Iterator[Item]: ...


class Documents:
    """The documents of one split of records that can be read in any order.

    Attributes:
        sequential: False.
    """

    sequential = False

    def __init__(
        self,
        source: str,
        records: Records,
        numbers: Numbers,
        split_bytes: int | None,
        bad: BadRecords,
    ) -> None:
        """Says which records.

        Args:
            source: the source's name.
            records: of the source.
            numbers: those in this split.
            split_bytes: see `CorpusConfig`; with it every record is read once when the number of
                documents is first asked for, to find the splits.
            bad: told of the records that cannot be read.
        """
        self.source = source
        self.records = records
        self.numbers = numbers
        self.split_bytes = split_bytes
        self.bad = bad
        # Of records that are several documents: where they are split, and their bytes.
        self._split: Recent[int, tuple[bytes, list[slice]]] = Recent(KEPT_BYTES)

    def __len__(self) -> int:
        return len(self.numbers) if self.split_bytes is None else self._ends[-1]

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        if self.split_bytes is None:
            return self._text(index)
        place = bisect_right(self._ends, index) - 1
        first, stop = self._ends[place], self._ends[place + 1]
        if stop == first + 1:
            return self._text(place)

        def split() -> tuple[tuple[bytes, list[slice]], int]:
            content = self._text(place).encode()
            return (content, line_splits(content, self.split_bytes)), len(content)

        content, parts = self._split.get(place, split)
        return content[parts[index - first]].decode()

    def __iter__(self) -> Iterator[str]:
        return self.iterate()

    def iterate(self, start: int = 0) -> Iterator[str]:
        """The documents from number `start` on."""
        return (self[i] for i in range(start, len(self)))

    @cached_property
    def _ends(self) -> "array[int]":
        """0, then for each record the number of documents up to its end."""
        ends = array("q", [0])
        for place in range(len(self.numbers)):
            content = self._text(place).encode()
            ends.append(ends[-1] + len(line_splits(content, self.split_bytes)))
        return ends

    def _text(self, place: int) -> str:
        number = self.numbers[place]
        return text_or_nothing(lambda: self.records.text(number), self.source, number, self.bad)


class SequentialDocuments:
    """The documents of one split of records that come in their own order only.

    They can be asked for by number, as rows do whose numbers grow at nearly the same pace: what was
    read last is kept, up to `KEPT_BYTES`. An earlier document is read from the beginning again.

    Attributes:
        sequential: True.
    """

    sequential = True

    def __init__(
        self,
        source: str,
        stream: RecordStream,
        split: str,
        heldout_share: float,
        split_bytes: int | None,
        bad: BadRecords,
    ) -> None:
        """Says which records: those that `split` ("train" or "heldout") has of the stream."""
        self.source = source
        self.stream = stream
        self.split = split
        self.heldout_share = heldout_share
        self.split_bytes = split_bytes
        self.bad = bad
        self._count: int | None = None
        # Two places: when an epoch ends, some rows begin the next one while others are behind.
        self._windows = self._new_windows()

    def _new_windows(self) -> "list[_Window]":
        return [_Window(self.source, self.iterate) for _ in range(2)]

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(1 for _ in self._parts())
        return self._count

    def know_count(self, count: int) -> None:
        """Tells how many documents there are, as found before, to spare reading them all."""
        self._count = count

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        able = [window for window in self._windows if window.first <= index]
        window = max(able, key=lambda window: window.next) if able else self._windows[0]
        if not able:
            if window.next:
                logger.warning(
                    "source %s: document %d is asked for again, long after it was read: reading "
                    "from the beginning",
                    self.source,
                    index,
                )
            window.restart()
        # The one used last is the last to be restarted.
        self._windows.remove(window)
        self._windows.append(window)
        return window[index]

    def __iter__(self) -> Iterator[str]:
        return self.iterate()

    def iterate(self, start: int = 0) -> Iterator[str]:
        """The documents from number `start` on; those before it are read past."""
        for index, part in enumerate(self._parts()):
            if index >= start:
                yield part()

    def _parts(self) -> Iterator[Callable[[], str]]:
        """For each document a function that gives it; without splits, unread ones cost little."""
        wanted = self.split == "heldout"
        flags = heldout_flags(self.source, self.heldout_share)
        for number, (record, heldout) in enumerate(zip(self.stream.records(), flags, strict=False)):
            if heldout != wanted:
                continue
            if self.split_bytes is None:
                yield partial(self._text, record, number)
                continue
            content = self._text(record, number).encode()
            for part in line_splits(content, self.split_bytes):
                yield content[part].decode

    def _text(self, record: Callable[[], str], number: int) -> str:
        return text_or_nothing(record, self.source, number, self.bad)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_windows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._windows = self._new_windows()


class _Window:
    """A place in a stream of texts, and the last texts before it.

    Attributes:
        first: number of the first text that is still held.
        next: number of the text to be read next.
    """

    def __init__(self, source: str, iterate: Callable[[], Iterable[str]]) -> None:
        self._source = source
        self._iterate = iterate
        self.restart()

    def restart(self) -> None:
        self._texts: deque[str] = deque()
        self._size = self.first = self.next = 0
        self._iterator: Iterator[str] | None = None

    def __getitem__(self, index: int) -> str:
        if self._iterator is None:
            self._iterator = iter(self._iterate())
        while self.next <= index:
            text = next(self._iterator, None)
            if text is None:
                raise UserError(
                    f"source {self._source} ended after {self.next} documents: it has become "
                    "shorter since they were counted; restore it or use another run directory"
                )
            self._texts.append(text)
            self._size += sys.getsizeof(text)
            self.next += 1
            while self._size > KEPT_BYTES and len(self._texts) > 1:
                self._size -= sys.getsizeof(self._texts.popleft())
                self.first += 1
        return self._texts[index - self.first]


def text_or_nothing(read: Callable[[], str], source: str, number: int, bad: BadRecords) -> str:
    """The text of a record, or "" of a bad one that may be passed over.

    Raises:
        UserError: a bad record too many.
    """
    try:
        return read()
    except BadRecord as problem:
        bad.add(source, number, problem)
        return ""


class TokenizedTexts:
    """Texts as token ids, tokenised when read; a `TokenSource`.

    Attributes:
        sequential: whether they can only be read in their own order at a good speed.
    """

    def __init__(self, texts: Numbered[str], tokenizer: Tokenizer) -> None:
        self.texts = texts
        self.tokenizer = tokenizer
        self.sequential: bool = getattr(texts, "sequential", False)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Int[np.ndarray, " n"]:
        return encode(self.texts[index], self.tokenizer)

    def __iter__(self) -> Iterator[Int[np.ndarray, " n"]]:
        return (encode(text, self.tokenizer) for text in self.texts)


def encode(text: str, tokenizer: Tokenizer) -> Int[np.ndarray, " n"]:
    """The token ids of a text; a very long one is cut, where it can be at line ends or blanks."""
    if len(text) <= LONGEST_ENCODED:
        return tokenizer.encode(text)
    ids, start = [], 0
    while start < len(text):
        stop = start + LONGEST_ENCODED
        if stop < len(text):
            stop = max(text.rfind("\n", start, stop), text.rfind(" ", start, stop)) + 1 or stop
        ids.append(tokenizer.encode(text[start:stop]))
        start = stop
    return np.concatenate(ids)
