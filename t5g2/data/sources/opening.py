"""Opening sources: which files they are, how they are read, and their two splits."""

import dataclasses
import glob
import logging
import os
import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from t5g2.data.sources.arrayrecord import ArrayRecords
from t5g2.data.sources.config import CorpusConfig
from t5g2.data.sources.documents import Documents, SequentialDocuments, TokenizedTexts
from t5g2.data.sources.image_text import ImageDocuments, ImageRecords, ImageTexts
from t5g2.data.sources.jsonl import JsonLines, JsonLineStream, is_compressed
from t5g2.data.sources.mixture_file import FORMATS, MixtureSpec, SourceSpec, read_mixture
from t5g2.data.sources.parquet import ParquetRows
from t5g2.data.sources.prompted import PromptedDocuments, PromptedRecords, PromptedTexts
from t5g2.data.sources.records import BadRecords, Records, RecordStream, file_names
from t5g2.data.sources.splits import Numbers, Without, heldout_of_names, heldout_of_numbers
from t5g2.data.sources.text import TextFiles, text_directory
from t5g2.data.tokenizer import Tokenizer
from t5g2.errors import UserError
from t5g2.models.config import ModelConfig

logger = logging.getLogger(__name__)

SPLITS = ("train", "heldout")
# The formats that the ends of file names stand for; those of text are `corpus.suffixes`.
_SUFFIXES = {
    "jsonl": tuple(
        f"{end}{codec}" for end in (".jsonl", ".ndjson") for codec in ("", ".gz", ".zst")
    ),
    "parquet": (".parquet",),
    "arrayrecord": (".array_record", ".arrayrecord"),
}

AnyDocuments: TypeAlias = Documents | SequentialDocuments


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource:
    """An opened source.

    Attributes:
        spec: what it was opened by.
        records: what its files hold.
        documents: of the splits "train" and "heldout".
        bad: the bad records of all sources.
    """

    spec: SourceSpec
    records: Records | RecordStream
    documents: dict[str, AnyDocuments]
    bad: BadRecords

    @property
    def name(self) -> str:
        """The source's name."""
        return self.spec.name

    @property
    def sequential(self) -> bool:
        """Whether its documents come in their own order only."""
        return self.documents["train"].sequential

    @property
    def has_images(self) -> bool:
        """Whether its documents are images with text."""
        return isinstance(self.records, ImageRecords)

    @property
    def has_prompts(self) -> bool:
        """Whether its documents are prompts with answers."""
        return isinstance(self.records, PromptedRecords)

    def fingerprint(self) -> str:
        """Changes with the files, as far as that can be told without reading them."""
        return self.records.fingerprint()

    def tokens(
        self, split: str, tokenizer: Tokenizer
    ) -> TokenizedTexts | ImageTexts | PromptedTexts:
        """The documents of a split as token ids.

        Raises:
            UserError: documents with images, and a tokenizer without image tokens.
        """
        documents = self.documents[split]
        if isinstance(documents, ImageDocuments):
            return ImageTexts(documents, tokenizer)
        if isinstance(documents, PromptedDocuments):
            return PromptedTexts(documents, tokenizer)
        return TokenizedTexts(documents, tokenizer)

    def check_splits(self, counts: Mapping[str, int], heldout_share: float) -> None:
        """Refuses a source that has nothing in a split.

        Args:
            counts: documents, or records, of each split.
            heldout_share: by which they were chosen.

        Raises:
            UserError: naming the source and the split.
        """
        empty = [split for split in SPLITS if not counts[split]]
        if empty:
            raise UserError(
                f"{self.spec.where('path')}: of {sum(counts.values())} documents in "
                f"{self.spec.path} none falls into the {empty[-1]} split; change "
                f"corpus.heldout_share ({heldout_share}) or add documents"
            )


def open_sources(config: CorpusConfig) -> tuple[TextSource, ...]:
    """Opens the sources of a corpus, each with its training and its held-out documents.

    A text file is held out by its name, any other record by its source's name and its number, so
    that adding documents moves no other from one split to the other.

    Raises:
        UserError: a mistake in the mixture file, files that are missing or cannot be read, or a
            source with too few documents for both splits.
    """
    return open_mixture(read_mixture(config), config)


def open_mixture(
    mixture: MixtureSpec, config: CorpusConfig, model: ModelConfig | None = None
) -> tuple[TextSource, ...]:
    """As `open_sources`, of a mixture file that has been read, for a model that may read images.

    Raises:
        UserError: as above, or a source of images and a model that reads none.
    """
    bad = BadRecords(config.max_bad_records)
    return tuple(
        _open_images(spec, config, bad, model)
        if spec.format == "image_text"
        else _open(spec, config, bad)
        for spec in mixture.sources
    )


def _open_images(
    spec: SourceSpec, config: CorpusConfig, bad: BadRecords, model: ModelConfig | None
) -> TextSource:
    check_reads_images(spec.where("format"), model)
    assert model is not None
    root, names = _plain_jsonl(spec, config, "lines with images")
    records = ImageRecords(root, names, spec.field or "text")
    heldout = records.heldout(config.heldout_share)
    numbers: dict[str, Numbers] = {
        "train": Without(heldout, len(records)),
        "heldout": array("q", heldout.tobytes()),
    }
    documents: dict[str, AnyDocuments] = {
        split: ImageDocuments(spec.name, records, numbers[split], bad, model) for split in SPLITS
    }
    source = TextSource(spec=spec, records=records, documents=documents, bad=bad)
    source.check_splits(
        {split: len(found) for split, found in numbers.items()}, config.heldout_share
    )
    return source


def _plain_jsonl(spec: SourceSpec, config: CorpusConfig, what: str) -> tuple[Path, list[str]]:
    base = Path() if spec.file is None else spec.file.parent
    root, names, _ = _files(dataclasses.replace(spec, format="jsonl"), config, base)
    if packed := next(filter(is_compressed, names), None):
        raise UserError(
            f"{spec.where('path')}: {root / packed}: {what} are read in any order: "
            "decompress it first"
        )
    return root, names


def check_reads_images(where: str, model: ModelConfig | None) -> None:
    """Refuses images for a model without a vision tower.

    Raises:
        UserError: naming `where` they are.
    """
    if model is None or model.vision is None:
        raise UserError(
            f"{where}: the source has images but the model has no vision tower: set model.vision, "
            "or leave the source out"
        )


def _open(spec: SourceSpec, config: CorpusConfig, bad: BadRecords) -> TextSource:
    records = _records(spec, config)
    share, split_bytes = config.heldout_share, config.split_bytes
    documents: dict[str, AnyDocuments]
    if isinstance(records, RecordStream):
        logger.warning(
            "source %s can only be read in its own order: it is not shuffled, and a run resumes "
            "exactly only on as many hosts",
            spec.name,
        )
        documents = {
            split: SequentialDocuments(spec.name, records, split, share, split_bytes, bad)
            for split in SPLITS
        }
        return TextSource(spec=spec, records=records, documents=documents, bad=bad)
    size = len(records)
    if isinstance(records, TextFiles):
        heldout = heldout_of_names(records.names, share)
    else:
        heldout = heldout_of_numbers(spec.name, size, share)
    # Whole blocks of memory: a source can have very many records.
    numbers: dict[str, Numbers] = {
        "train": Without(heldout, size),
        "heldout": array("q", heldout.tobytes()),
    }
    documents = {
        split: PromptedDocuments(spec.name, records, numbers[split], bad)
        if isinstance(records, PromptedRecords)
        else Documents(spec.name, records, numbers[split], split_bytes, bad)
        for split in SPLITS
    }
    source = TextSource(spec=spec, records=records, documents=documents, bad=bad)
    source.check_splits({split: len(found) for split, found in numbers.items()}, share)
    return source


def _records(spec: SourceSpec, config: CorpusConfig) -> Records | RecordStream:
    base = Path() if spec.file is None else spec.file.parent
    field = spec.field or "text"
    if spec.format == "tfds":
        from t5g2.data.sources.with_tensorflow import open_tfds

        return open_tfds(spec.path, base, field, spec.where("path"))
    if spec.format == "seqio":
        from t5g2.data.sources.with_tensorflow import open_seqio

        return open_seqio(spec.path, field, spec.where("path"))
    if spec.format == "prompted":
        return PromptedRecords(*_plain_jsonl(spec, config, "prompted lines"))
    root, names, kind = _files(spec, config, base)
    if kind == "text":
        return TextFiles(root, names)
    if kind == "parquet":
        return ParquetRows(root, names, field, spec.where("field"))
    if kind == "arrayrecord":
        return ArrayRecords(root, names, spec.field)
    if any(map(is_compressed, names)):
        return JsonLineStream(root, names, field)
    return JsonLines(root, names, field)


def _files(spec: SourceSpec, config: CorpusConfig, base: Path) -> tuple[Path, list[str], str]:
    """The files of a source, sorted, relative to a directory above them, and their format."""
    directory, excluded = text_directory(spec.path, base)
    if directory.is_dir():
        return _files_below(directory, excluded, spec, config)
    if spec.file is None:
        raise UserError(f"{spec.where('path')}: {directory} is not a directory")
    if directory.exists():
        paths = [directory]
    elif glob.has_magic(spec.path):
        found = sorted(glob.glob(str(directory), recursive=True))
        paths = [path for path in map(Path, found) if path.is_file()]
    else:
        paths = []
    if not paths:
        raise UserError(f"{spec.where('path')}: {directory} does not exist")
    kinds = {format_of(path.name, config.suffixes) for path in paths}
    if spec.format is None and (len(kinds) > 1 or None in kinds):
        raise UserError(
            f"{spec.where('format')}: missing, and the names of the files ({paths[0].name}) do not "
            f"say which it is of {', '.join(FORMATS)}"
        )
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return root, file_names(paths, root), spec.format or str(kinds.pop())


def _files_below(
    root: Path, excluded: frozenset[str], spec: SourceSpec, config: CorpusConfig
) -> tuple[Path, list[str], str]:
    by_format: dict[str, list[str]] = {}
    for path in root.rglob("*"):
        kind = format_of(path.name, config.suffixes)
        wanted = kind is not None and spec.format in (None, kind)
        if wanted and not excluded.intersection(path.relative_to(root).parts) and path.is_file():
            by_format.setdefault(str(kind), []).extend(file_names([path], root))
    if not by_format:
        suffixes = {"text": config.suffixes, **_SUFFIXES}
        formats = suffixes if spec.format is None else [spec.format]
        looked_for = ", ".join(suffix for kind in formats for suffix in suffixes[kind])
        raise UserError(f"{spec.where('path')}: no document below {root}; looked for {looked_for}")
    if len(by_format) > 1:
        raise UserError(
            f"{spec.where('format')}: missing, and {root} holds files of several: "
            f"{', '.join(sorted(by_format))}"
        )
    ((kind, names),) = by_format.items()
    return root, sorted(names), kind


def format_of(name: str, text_suffixes: Sequence[str]) -> str | None:
    """The format that a file's name stands for, or None."""
    if Path(name).suffix in text_suffixes:
        return "text"
    name = re.sub(r"-\d+-of-\d+$", "", name)
    for kind, suffixes in _SUFFIXES.items():
        if name.endswith(suffixes):
            return kind
    return None
