"""A cache small enough for a test: a few hundred short documents in two sources."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from t5g2.data.cache import CachedDocuments
from t5g2.data.cache_format import Manifest, read_manifest
from t5g2.data.cache_workers import write_in_processes
from t5g2.data.cache_writing import (
    CacheWriter,
    Part,
    begin_cache,
    begun_cache,
    cache_directory,
    write_cache,
)
from t5g2.data.tokenizer import load_tokenizer

PLAN = {"cache": {"format": 1}}


def paragraphs(count: int, skip: int = 0) -> list[str]:
    """Pieces of Python's own modules, among them an empty one and one that is very long."""
    text = "".join(
        path.read_text(encoding="utf-8")
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:20]
    )
    lengths = np.random.default_rng(skip).integers(1, 900, count).tolist()
    ends = np.cumsum(lengths).tolist()
    pieces = [text[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    pieces[1], pieces[count // 2] = "", text[:60_000]
    return pieces


def small_parts() -> tuple[Part, ...]:
    """Three shards of one source; one shard of another, and of the held-out documents."""
    return (
        Part(split="train", source="prose", texts=paragraphs(40, 1)),
        Part(split="train", source="code", texts=paragraphs(700)),
        Part(split="heldout", source="code", texts=paragraphs(30, 2)),
    )


def make_cache(
    directory: Path, tokenizer: Path, parts: Sequence[Part] | None = None, workers: int = 0
) -> Manifest:
    """Writes a cache, or goes on with it, in this process or in workers."""
    with cache_directory(directory):
        kept = begun_cache(directory, PLAN)
        if kept is None:
            (directory / "tokenizer").mkdir(exist_ok=True)
            (directory / "tokenizer" / tokenizer.name).write_bytes(tokenizer.read_bytes())
            kept = load_tokenizer(directory / "tokenizer")
            begin_cache(directory, PLAN, kept)
        writer = CacheWriter(
            directory=directory, parts=tuple(parts or small_parts()), tokenizer=kept
        )

        def run(todo):
            if workers:
                write_in_processes(writer, todo, workers, lambda *_: None)
            for each in () if workers else todo:
                writer.write(each, lambda *_: None)

        return write_cache(writer, PLAN, run)


def opened(directory: Path, split: str, source: str) -> CachedDocuments:
    """The documents of one source."""
    manifest = read_manifest(directory)
    dtype = np.dtype(manifest.tokenizer["dtype"])
    return CachedDocuments(directory, manifest.shards[split][source], dtype)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
