"""A cache small enough for a test: a few hundred short documents in two sources."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t5g2.data import cache_format
from t5g2.data.cache_workers import write_in_processes
from t5g2.data.cache_writing import CacheWriter, Part, cache_directory, write_cache
from t5g2.data.tokenizer import load_tokenizer


def paragraphs(count: int, skip: int = 0) -> list[str]:
    """Pieces of Python's own modules, among them an empty one and one that is very long."""
    text = "".join(
        path.read_text(encoding="utf-8")
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:20]
    )
    lengths = np.random.default_rng(skip).integers(1, 900, count)
    ends = np.cumsum(lengths)
    pieces = [
        text[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
    ]
    pieces[1], pieces[count // 2] = "", text[:60_000]
    return pieces


def small_parts() -> tuple[Part, ...]:
    """Three shards of one source, one shard each of another in both splits."""
    return (
        Part(split="train", source="code", texts=paragraphs(700), fingerprint="c0"),
        Part(split="train", source="prose", texts=paragraphs(40, 1), fingerprint="c1"),
        Part(split="heldout", source="code", texts=paragraphs(30, 2), fingerprint="c2"),
    )


def describe(counts: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """The number of tokens and of different tokens of each source in each split."""
    return {
        f"{split}/{name}": [int(found.sum()), int((found > 0).sum())]
        for split, sources in counts.items()
        for name, found in sources.items()
    }


def make_cache(
    directory: Path, tokenizer_path: Path, parts: Sequence[Part], workers: int = 0
) -> cache_format.Manifest:
    """Writes a cache, in this process or with workers."""
    writer = CacheWriter(
        directory=directory, parts=tuple(parts), tokenizer=load_tokenizer(tokenizer_path)
    )

    def here(todo):
        for each in todo:
            writer.write(each, lambda *_: None)

    def spawned(todo):
        write_in_processes(writer, todo, workers, lambda *_: None)

    with cache_directory(directory):
        return write_cache(writer, spawned if workers else here, describe)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
