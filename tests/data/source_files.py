"""Files of records, written with the libraries that others write them with."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from t5g2.data.sources import CorpusConfig, TextSource, open_sources

TEXTS = [f"Document {i}: " + "naïve ▁ words, " * (i % 7) + "\n" for i in range(200)]


def json_lines(texts: Sequence[str], field: str = "text") -> bytes:
    """One object a line."""
    return b"".join(json.dumps({"id": i, field: t}).encode() + b"\n" for i, t in enumerate(texts))


def write_jsonl(path: Path, texts: Sequence[str] = TEXTS, field: str = "text") -> Path:
    """Plain, or compressed as the suffix says."""
    content = json_lines(texts, field)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.ZstdCompressor().compress(content)
    path.write_bytes(content)
    return path


def write_parquet(path: Path, texts: Sequence[str | None] = TEXTS, **options) -> Path:
    """Columns "id" and "text"."""
    table = pyarrow.table({"id": range(len(texts)), "text": list(texts)})
    pyarrow.parquet.write_table(table, path, **options)
    return path


def write_array_record(path: Path, texts: Sequence[str] = TEXTS, field: str | None = None) -> Path:
    """Records are text, or JSON objects with a field."""
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in texts:
        writer.write(text.encode() if field is None else json.dumps({field: text}).encode())
    writer.close()
    return path


def write_mixture(path: Path, *sources: dict, **settings) -> Path:
    """A mixture file; JSON's texts, numbers and lists are TOML's too."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    for source in sources:
        lines.append("[[source]]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in source.items()]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def opened(path: Path, source: dict | None = None, **config) -> TextSource:
    """The one source of a mixture file beside `path`, by default the file itself."""
    described = {"name": "mine", "path": path.name, **(source or {})}
    file = write_mixture(path.parent / "mixture.toml", described)
    settings = {"heldout_share": 0.1, **config}
    (found,) = open_sources(CorpusConfig(mixture=str(file), **settings))
    return found


def all_texts(source: TextSource) -> list[str]:
    """Both splits, in the order of the records."""
    train, heldout = (iter(source.documents[split]) for split in ("train", "heldout"))
    held = set(source.documents["heldout"].numbers)
    return [next(heldout if i in held else train) for i in range(len(source.records))]
