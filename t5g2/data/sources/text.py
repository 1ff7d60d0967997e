"""Text files: a file is a record."""

import sysconfig
from pathlib import Path

from t5g2.data.sources.config import STANDARD_LIBRARY
from t5g2.data.sources.records import FileRecords, cannot_read, decoded

# Left out of the standard library: third-party packages; tests, some of which are no text on
# purpose; and the tables of character encodings, a tenth of all the bytes.
_NOT_CORPUS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "encodings"}
)


class TextFiles(FileRecords):
    """The UTF-8 text files below a directory."""

    def __len__(self) -> int:
        return len(self.names)

    def text(self, number: int) -> str:
        """The text of a file.

        Raises:
            BadRecord: it is not UTF-8.
            UserError: it cannot be read.
        """
        path = self.root / self.names[number]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise cannot_read(path, error) from None
        return decoded(content, path)


def text_directory(path: str, base: Path) -> tuple[Path, frozenset[str]]:
    """The directory that a path means, and the folders below it that are left out."""
    if path == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib")), _NOT_CORPUS
    return base / Path(path).expanduser(), frozenset()
