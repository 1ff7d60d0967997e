"""Where documents come from."""

import dataclasses
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from t5g2.data.tokenizer import Tokenizer
from t5g2.errors import UserError

# The corpus that is on every machine: the source and prose of Python's own standard library.
STANDARD_LIBRARY = "python-stdlib"
# Left out of it: third-party packages; tests, some of which are no text on purpose; and the tables
# of character encodings, a tenth of all the bytes.
_NOT_CORPUS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "encodings"}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """A directory of text.

    Attributes:
        path: the directory, searched recursively; "python-stdlib": Python's standard library.
        suffixes: files that are documents.
        heldout_share: share of the files that is kept from training, chosen by their names.
        split_bytes: a longer file becomes several documents, split at line ends, of at most so many
            bytes (a longer line stays whole); None: a file is a document.
    """

    path: str = STANDARD_LIBRARY
    suffixes: tuple[str, ...] = (".py", ".txt", ".rst", ".md")
    heldout_share: float = 0.02
    split_bytes: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.heldout_share < 1:
            raise ValueError(f"heldout_share must lie between 0 and 1, not {self.heldout_share}")
        if self.split_bytes is not None and self.split_bytes < 1:
            raise ValueError(f"split_bytes must be at least 1, not {self.split_bytes}")


class TextFiles(Sequence[str]):
    """The documents in UTF-8 text files below a directory, in the order of the files' names."""

    def __init__(self, root: Path, names: Sequence[str], split_bytes: int | None = None) -> None:
        """Finds the documents.

        Args:
            root: the directory.
            names: the files, relative to it.
            split_bytes: see `CorpusConfig`; with it every file is read once, to find the splits.

        Raises:
            UserError: a file cannot be read.
        """
        self.root = root
        self.names = names
        self._documents = [
            (name, part)
            for name in names
            for part in ([slice(None)] if split_bytes is None else self._parts(name, split_bytes))
        ]

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        name, part = self._documents[index]
        content = self._read(name)[part]
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.root / name}: not UTF-8 (byte {(part.start or 0) + error.start}); convert "
                "it or leave its suffix out of corpus.suffixes"
            ) from None

    def _read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise UserError(f"{self.root / name}: cannot be read: {error.strerror}") from None

    def _parts(self, name: str, split_bytes: int) -> list[slice]:
        """Where the documents in a file lie, in bytes."""
        parts, start, end = [], 0, 0
        for line in self._read(name).splitlines(keepends=True):
            if end > start and end + len(line) - start > split_bytes:
                parts.append(slice(start, end))
                start = end
            end += len(line)
        return [*parts, slice(start, end)]

    def fingerprint(self) -> str:
        """Changes when a file comes, goes or changes its size."""
        digest = 0
        for name in self.names:
            try:
                size = (self.root / name).stat().st_size
            except OSError as error:
                raise UserError(f"{self.root / name}: cannot be read: {error.strerror}") from None
            digest = zlib.crc32(os.fsencode(f"{name}\0{size}\n"), digest)
        return f"{digest:08x}"


class TokenizedTexts:
    """Texts as token ids, tokenised when read; a `TokenSource`."""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer) -> None:
        self.texts = texts
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Int[np.ndarray, " n"]:
        return self.tokenizer.encode(self.texts[index])

    def __iter__(self) -> Iterator[Int[np.ndarray, " n"]]:
        return (self[i] for i in range(len(self)))


def open_corpus(config: CorpusConfig) -> dict[str, TextFiles]:
    """The training and the held-out documents ("train", "heldout") of a directory.

    Raises:
        UserError: no such directory, or too few documents for both.
    """
    standard = config.path == STANDARD_LIBRARY
    root = Path(sysconfig.get_path("stdlib") if standard else config.path).expanduser()
    if not root.is_dir():
        raise UserError(f"corpus.path: {root} is not a directory")
    excluded = _NOT_CORPUS if standard else frozenset()
    names = sorted(
        name
        for path in root.rglob("*")
        if path.suffix in config.suffixes
        and not excluded.intersection((relative := path.relative_to(root)).parts)
        and path.is_file()
        and (name := relative.as_posix())
    )
    if not names:
        suffixes = ", ".join(config.suffixes)
        raise UserError(f"corpus.path: no document below {root}; looked for {suffixes}")
    threshold = config.heldout_share * 2**32
    # A document's side depends on its name alone, so that adding others does not move it.
    heldout = [name for name in names if zlib.crc32(os.fsencode(name)) < threshold]
    train = sorted(set(names) - set(heldout))
    if not heldout or not train:
        missing = "heldout" if not heldout else "train"
        raise UserError(
            f"corpus.path: of {len(names)} documents below {root} none falls into the {missing} "
            f"split; change corpus.heldout_share ({config.heldout_share}) or add documents"
        )
    return {
        split: TextFiles(root, names, config.split_bytes)
        for split, names in (("train", train), ("heldout", heldout))
    }
