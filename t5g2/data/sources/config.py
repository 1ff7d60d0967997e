"""The settings of where documents come from."""

import dataclasses

# The corpus that is on every machine: the source and prose of Python's own standard library.
STANDARD_LIBRARY = "python-stdlib"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """A directory of text, or the sources that a mixture file lists.

    Attributes:
        path: the directory, searched recursively; "python-stdlib": Python's standard library.
        mixture: a mixture file (TOML) that lists sources, in place of `path`.
        cache: a cache that `t5g2 cache` made: the documents come from there, tokenised, and neither
            `path` nor the sources' files are read; a mixture file still says how they are mixed.
        suffixes: text files that are documents.
        heldout_share: share of the documents that is kept from training, chosen by their file names
            or, in files of many records, by their numbers.
        split_bytes: a longer text becomes several documents, split at line ends, of at most so many
            bytes (a longer line stays whole); None: a file or record is a document.
        max_bad_records: so many records of all sources together may be unreadable; they count as
            empty documents. One more, or any where it is 0, is an error.
    """

    path: str = STANDARD_LIBRARY
    mixture: str | None = None
    cache: str | None = None
    suffixes: tuple[str, ...] = (".py", ".txt", ".rst", ".md")
    heldout_share: float = 0.02
    split_bytes: int | None = None
    max_bad_records: int = 0

    def __post_init__(self) -> None:
        if self.mixture is not None and self.path != STANDARD_LIBRARY:
            raise ValueError(
                f"path ({self.path}) and mixture ({self.mixture}) exclude each other: make the "
                "directory a source of the mixture file"
            )
        if not 0 < self.heldout_share < 1:
            raise ValueError(f"heldout_share must lie between 0 and 1, not {self.heldout_share}")
        if self.split_bytes is not None and self.split_bytes < 1:
            raise ValueError(f"split_bytes must be at least 1, not {self.split_bytes}")
        if self.max_bad_records < 0:
            raise ValueError(f"max_bad_records must be at least 0, not {self.max_bad_records}")
