"""Parquet: a row is a record, one column the text."""

import itertools
import logging
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5g2.data.sources.records import BadRecord, FileRecords, Recent, cannot_read, one_line
from t5g2.errors import UserError

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

# Bytes of decoded row groups that are kept.
KEPT_BYTES = 256 << 20
# A row group is decoded as a whole. Larger ones, if not all can be kept, make random order slow.
_LARGE_GROUP = 4 << 20


class ParquetRows(FileRecords):
    """The rows of Parquet files. Whatever the codec, they are read in any order, by row groups."""

    def __init__(self, root: Path, names: list[str], field: str, where: str) -> None:
        """Reads what the files say of themselves.

        Args:
            root: a directory above all files.
            names: the files, relative to it.
            field: the column.
            where: what said so, for messages.

        Raises:
            UserError: pyarrow is not installed, a file cannot be read, it lacks the column, or the
                column is no text.
        """
        super().__init__(root, names)
        self.field = field
        self._kept: Recent[int, pyarrow.ChunkedArray | str] = Recent(KEPT_BYTES)
        # Of each row group its file and number there, or what is wrong with the whole file.
        self._groups: list[tuple[Path, int | str]] = []
        sizes: list[int] = []
        bytes_of_text = 0
        for path in self.paths:
            rows = _row_groups(path, field, where)
            if isinstance(rows, str):
                self._groups.append((path, rows))
                sizes.append(1)
            else:
                self._groups += [(path, number) for number in range(len(rows))]
                sizes += [count for count, _ in rows]
                bytes_of_text += sum(size for _, size in rows)
        self._starts = [0, *itertools.accumulate(sizes)]
        mean = bytes_of_text // max(len(sizes), 1)
        if mean > _LARGE_GROUP and bytes_of_text > KEPT_BYTES:
            logger.warning(
                "%s: each document read in random order decodes a row group of about %d MB: "
                "`t5g2 cache` makes that fast",
                root,
                mean >> 20,
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def text(self, number: int) -> str:
        """The text in a row; raises `BadRecord` if there is none."""
        group = bisect_right(self._starts, number) - 1
        path, place = self._groups[group][0], number - self._starts[group]
        column = self._kept.get(group, lambda: self._column(group))
        if isinstance(column, str):
            raise BadRecord(column)
        row = f"{path}, row {place} of row group {self._groups[group][1]}"
        try:
            text = column[place].as_py()
        except UnicodeDecodeError as error:
            raise BadRecord(f"{row}: not UTF-8 (byte {error.start})") from None
        if text is None:
            raise BadRecord(f"{row}: column {self.field!r} is null")
        return text

    def _column(self, group: int) -> tuple["pyarrow.ChunkedArray | str", int]:
        import pyarrow
        import pyarrow.parquet

        path, number = self._groups[group]
        if isinstance(number, str):
            return number, 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                table = file.read_row_group(number, columns=[self.field], use_threads=False)
        except FileNotFoundError as error:
            raise cannot_read(path, error) from None
        except (OSError, pyarrow.ArrowException) as error:
            return f"{path}: row group {number} is damaged: {one_line(error)}", 0
        column = table.column(0)
        return column, column.nbytes


def _row_groups(path: Path, field: str, where: str) -> list[tuple[int, int]] | str:
    """Rows, and uncompressed bytes of the column, of each row group; or what is wrong."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading it needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (FileNotFoundError, PermissionError) as error:
        raise cannot_read(path, error) from None
    except (OSError, pyarrow.ArrowException) as error:
        return f"{path}: not a whole Parquet file: {one_line(error)}"
    if field not in schema.names:
        there = one_line(", ".join(map(repr, schema.names)))
        raise UserError(f"{where}: {path} has no column {field!r}; it has {there}")
    kind: Any = schema.field(field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    tests = ("is_string", "is_large_string", "is_string_view")
    if not any(getattr(pyarrow.types, test)(kind) for test in tests):
        raise UserError(f"{where}: column {field!r} of {path} is not text but {kind}")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    # The leaf columns' paths: that of a column of text is its name.
    return [
        (
            group.num_rows,
            sum(
                column.total_uncompressed_size
                for column in map(group.column, range(group.num_columns))
                if column.path_in_schema == field
            ),
        )
        for group in groups
    ]
