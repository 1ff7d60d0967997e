"""ArrayRecord: records are UTF-8 text, or JSON objects one field of which is the text."""

import itertools
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING

from t5g2.data.sources.jsonl import text_of_json
from t5g2.data.sources.records import (
    BadRecord,
    FileRecords,
    Recent,
    cannot_read,
    decoded,
    one_line,
)

if TYPE_CHECKING:
    from array_record.python.array_record_module import ArrayRecordReader

# Files that are held open.
_OPEN_FILES = 64


class ArrayRecords(FileRecords):
    """The records of ArrayRecord files."""

    def __init__(self, root: Path, names: list[str], field: str | None) -> None:
        """Reads how many records the files hold.

        Args:
            root: a directory above all files.
            names: the files, relative to it.
            field: of JSON objects; None: records are text.

        Raises:
            UserError: a file cannot be read.
        """
        super().__init__(root, names)
        self.field = field
        self._readers: Recent[int, ArrayRecordReader] = Recent(_OPEN_FILES)
        self._damaged: dict[int, str] = {}
        # A file that is damaged as a whole is one bad record: its index is at its end.
        sizes = [self._size(number) for number in range(len(names))]
        self._starts = [0, *itertools.accumulate(sizes)]

    def __len__(self) -> int:
        return self._starts[-1]

    def text(self, number: int) -> str:
        """The text of a record; raises `BadRecord` if it has none."""
        file = bisect_right(self._starts, number) - 1
        if file in self._damaged:
            raise BadRecord(self._damaged[file])
        place = number - self._starts[file]
        where = f"{self.root / self.names[file]}, record {place}"
        try:
            (content,) = self._reader(file).read([place])
        except RuntimeError as error:
            raise BadRecord(f"{where}: damaged: {one_line(error)}") from None
        if self.field is None:
            return decoded(content, where)
        return text_of_json(content, self.field, where)

    def fingerprint(self) -> str:
        """As of all files, and the number of records: the files grow in large blocks."""
        return f"{super().fingerprint()}-{len(self)}"

    def _size(self, file: int) -> int:
        path = self.root / self.names[file]
        reader = self._reader(file)
        if reader.ok():
            return reader.num_records()
        try:
            reader.read([0])
            problem = "it has no index"
        except (RuntimeError, IndexError) as error:
            problem = one_line(error)
        self._damaged[file] = f"{path}: not a whole ArrayRecord file: {problem}"
        return 1

    def _reader(self, file: int) -> "ArrayRecordReader":
        from array_record.python.array_record_module import ArrayRecordReader

        path = self.root / self.names[file]

        def opened() -> tuple[ArrayRecordReader, int]:
            try:
                path.open("rb").close()
            except OSError as error:
                raise cannot_read(path, error) from None
            return ArrayRecordReader(str(path)), 1

        return self._readers.get(file, opened)
