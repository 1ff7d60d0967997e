"""Making rows takes no more memory the longer it goes on."""

import multiprocessing
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from cache_parts import make_cache, opened, small_parts
from reconstruction import SPECIAL, numbered_documents

from t5g2.data.loader import RowBatches
from t5g2.data.mixture import Mixture, Source, TokenSource
from t5g2.data.packing import RowStream

MOST_GROWN = 2_000_000  # 50 bytes kept of every row of 10,000 steps are as much


class Read:
    """Documents that are made anew whenever they are read, as those of a cache are."""

    def __init__(self) -> None:
        lengths = np.random.default_rng(0).lognormal(np.log(600), 1.25, 500).astype(int)
        self.documents = numbered_documents(lengths.tolist())

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.documents[index].copy()


def resident() -> int:
    """Bytes of this process and its workers that are in memory and in no file."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    sizes = [Path(f"/proc/{pid}/statm").read_text().split() for pid in pids]
    return sum(int(size[1]) - int(size[2]) for size in sizes) * os.sysconf("SC_PAGE_SIZE")


def grown(documents: list[TokenSource], steps: int, workers: int = 0) -> int:
    """Bytes by which memory grows in so many steps, after a quarter of them."""
    sources = tuple(Source(name=str(i), documents=found) for i, found in enumerate(documents))
    stream = RowStream(Mixture(sources=sources, special=SPECIAL), 4, 256, 256, 0)
    with closing(RowBatches(stream, stream.start(), 0, 4, workers).prefetched()) as batches:
        for _ in range(steps // 4):
            next(batches)
        early = resident()
        for _ in range(steps):
            next(batches)
        return resident() - early


@pytest.mark.parametrize(
    ("steps", "workers"),
    [
        (800, 0),
        pytest.param(10_000, 0, marks=pytest.mark.slow),
        pytest.param(10_000, 2, marks=pytest.mark.slow),
    ],
)
def test_memory_is_flat(steps, workers):
    assert grown([Read() for _ in "abc"], steps, workers) < MOST_GROWN


def test_memory_is_flat_over_a_cache(tmp_path, tiny_tokenizer):
    make_cache(tmp_path / "cache", tiny_tokenizer.path, small_parts()[:2])
    documents = [opened(tmp_path / "cache", "train", name) for name in ("prose", "code")]
    assert grown(documents, 10_000) < MOST_GROWN
