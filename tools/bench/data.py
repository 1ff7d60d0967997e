"""Speed and filling of packed rows, beside seqio's pipeline and a bare copy of the tokens.

    python tools/bench/data.py
    python tools/bench/data.py --peer t5 plain  # the former wants `pip install t5`
    python tools/bench/data.py --lengths 512 --workers 1 2 --peer --json data.json
    python tools/bench/data.py --lengths 2048 --peer --rounds 0 --memory 10000

The documents are those of Python's standard library (or of --corpus), words and signs as tokens.
Each round times every way of making rows of T5Gemma 2's mixture in turn. Tokens are real ones, of
both sides; padding does not count. "one core" is bound to it, the same one for all; ours is a
single thread. It reads documents held in memory, as all others do, and "cache" the same documents
from the shards of a t5g2 cache in a temporary directory; it is the others that this favours. A
seqio pipeline is started anew each time, once with all cores and once with one; T5's takes up to 16
GB at 16,384. Speed by the second of CPU time is given, too, which other load on the machine matters
less to. Documents are shorter than long rows: with --join they are laid end to end until they are
three rows long; with --cut N they are cut into short ones of at most N tokens. --memory looks at
what a loader that reads the cache holds, ten times in so many steps of eight rows.
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from cached import cached
from rows import SPECIAL, Documents, joined, stream_of, tokens_of

from t5g2.data.cache import CachedDocuments
from t5g2.data.loader import RowBatches
from t5g2.data.mixture import TokenSource
from t5g2.data.sources.config import CorpusConfig
from t5g2.data.sources.opening import open_mixture

WARM_BATCHES = 8
MEMORY_ROWS = 8


def read_documents(path: str | None) -> Documents:
    """The training documents of a directory, a word or a sign a token."""
    from t5g2.data.sources.mixture_file import read_mixture

    config = CorpusConfig() if path is None else CorpusConfig(path=path)
    (source,) = open_mixture(read_mixture(config), config)
    made = map(tokens_of, source.documents["train"])
    return [tokens for tokens in made if len(tokens)]


def real_tokens(batch: dict[str, np.ndarray]) -> int:
    """Tokens of a batch that are no padding."""
    return sum(np.count_nonzero(batch[f"{side}_segment_ids"]) for side in ("encoder", "decoder"))


def measure(tokens_of_batches: Iterator[int], seconds: float, places: int) -> dict[str, float]:
    """Real tokens a second, of the clock's and of this process' CPU's, after a warm-up.

    The warm-up takes what was made ahead while there was no hurry. "filled" is the share of real
    tokens in the places of a batch.
    """
    until = time.perf_counter() + seconds
    warm = [next(tokens_of_batches)]
    while len(warm) < WARM_BATCHES or time.perf_counter() < until:
        warm.append(next(tokens_of_batches))
    tokens, batches, began, cpu_began = 0, 0, time.perf_counter(), time.process_time()
    while time.perf_counter() < began + seconds:
        tokens += next(tokens_of_batches)
        batches += 1
    spent, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return {
        "tokens_per_second": tokens / spent,
        "tokens_per_cpu_second": tokens / cpu,
        "filled": tokens / (batches * places),
    }


def peer(
    kind: str, cores: set[int], documents: Documents, length: int, rows: int, seconds: float
) -> dict[str, float]:
    """A seqio pipeline's speed, in a new process: its buffers can take many gigabytes.

    Args:
        kind: as `seqio_peer.batches` knows it.
        cores: that the process is bound to.
        documents: to read.
        length: of either side.
        rows: in a batch.
        seconds: to measure.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_measure_peer,
        args=(theirs, kind, cores, documents, length, rows, seconds),
        daemon=True,
    )
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        sys.exit(f"the seqio pipeline ({kind}) ended early, exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _measure_peer(
    pipe: Connection,
    kind: str,
    cores: set[int],
    documents: Documents,
    length: int,
    rows: int,
    seconds: float,
) -> None:
    os.sched_setaffinity(0, cores)  # before TensorFlow counts them
    import seqio_peer  # beside this file

    batches = seqio_peer.batches(kind, documents, SPECIAL, length, rows)
    pipe.send(measure(map(real_tokens, batches), seconds, 2 * rows * length))


def copies(documents: Documents, batch_tokens: int) -> Iterator[int]:
    """The documents' tokens copied into memory, nothing else."""
    inputs = np.zeros(batch_tokens + max(map(len, documents)), np.int32)
    at = 0
    while True:
        for document in documents:
            inputs[at : at + len(document)] = document
            at += len(document)
            if at >= batch_tokens:
                yield at
                at = 0


def filling(documents: Documents, length: int, examples: int) -> dict[str, Any]:
    """How full rows get, how long examples are, and how the mixture's rates are met."""
    rows = 8
    stream = stream_of(documents, length, rows)
    cursors, used, pieces = stream.start(), [], []
    while len(pieces) < examples:
        for row in range(rows):
            made, cursors[row] = stream.next_row(row, cursors[row])
            used.append([sum(len(piece.example[side]) for piece in made) for side in (0, 1)])
            pieces += [(piece.task, piece.length) for piece in made]
    shares = np.array(used) / length
    tasks, lengths = np.array(pieces).T
    found = np.bincount(tasks, minlength=len(stream.tasks)) / len(tasks)
    return {
        "examples": len(pieces),
        "inputs": shares[:, 0].mean(),
        "targets": shares[:, 1].mean(),
        "fuller_side": shares.max(1).mean(),
        "both_sides": shares.mean(),
        "examples_in_a_row": len(pieces) / len(used),
        "example_tokens_mean": lengths.mean(),
        "example_tokens_median": float(np.median(lengths)),
        "tokens_in_examples_of_half_a_row_or_more": lengths[lengths >= length / 2].sum()
        / lengths.sum(),
        "document_tokens_mean": np.mean([len(document) for document in documents]),
        "largest_error_of_a_share": np.abs(found - stream.mixture.rates).max(),
    }


def memory(documents: TokenSource, length: int, steps: int, workers: int) -> list[int]:
    """Bytes that a loader and its processes hold, ten times while they make so many batches."""
    stream = stream_of(documents, length, MEMORY_ROWS)
    dataset = RowBatches(stream, stream.start(), 0, MEMORY_ROWS, workers)
    found = []
    with closing(dataset.prefetched()) as batches:
        for _ in range(10):
            for _ in range(steps // 10):
                next(batches)
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            pages = [Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in pids]
            found.append(sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE"))
    return found


def speeds(
    documents: Documents, cache: CachedDocuments, length: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Every way of making rows, in turn, round by round."""
    rows = max(args.batch_tokens // (2 * length), 2)
    every = os.sched_getaffinity(0)
    one = {max(every)}

    def bound(way: Callable[[], dict[str, float]]) -> dict[str, float]:
        os.sched_setaffinity(0, one)
        try:
            return way()
        finally:
            os.sched_setaffinity(0, every)

    def ours(documents: TokenSource, workers: int | None) -> dict[str, float]:
        stream = stream_of(documents, length, rows)
        dataset = RowBatches(stream, stream.start(), 0, rows, workers or 0)
        with closing(iter(dataset) if workers is None else dataset.prefetched()) as steps:
            tokens = (real_tokens(step.batch) for step in steps)
            return measure(tokens, args.seconds, 2 * rows * length)

    ways: dict[str, Callable[[], dict[str, float]]] = {
        "t5g2, one core": lambda: bound(lambda: ours(documents, None)),
        "t5g2, one core, cache": lambda: bound(lambda: ours(cache, None)),
        **{f"t5g2, workers = {n}": functools.partial(ours, documents, n) for n in args.workers},
        "copy": lambda: measure(
            copies(documents, args.batch_tokens), args.seconds / 3, args.batch_tokens
        ),
    }
    for kind in args.peer:
        for label, cores in (("all cores", every), ("one core", one)):
            ways[f"seqio, {kind}, {label}"] = functools.partial(
                peer, kind, cores, documents, length, rows, args.seconds
            )
    found: dict[str, Any] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            found[name].append(way())
    return found


def print_speeds(found: dict[str, Any]) -> None:
    """A line for each way: millions of tokens a second, and how ours compares in each round."""
    ours = found["t5g2, one core"]
    for name, rounds in found.items():
        cells = [f"{r['tokens_per_second'] / 1e6:9.3f}" for r in rounds]
        median = {
            of: statistics.median(
                mine[of] / theirs[of] for mine, theirs in zip(ours, rounds, strict=True)
            )
            for of in ("tokens_per_second", "tokens_per_cpu_second")
        }
        # Worker processes' CPU time is not this process'.
        cpu = "" if "workers" in name else f", {median['tokens_per_cpu_second']:.3g} x by CPU time"
        ratio = f"one core is {median['tokens_per_second']:.3g} x as fast{cpu}"
        filled = f"{rounds[0]['filled']:4.0%} filled"
        print(
            f"  {name:24} {' '.join(cells)} M tokens/s, {filled}"
            f"{'' if rounds is ours else ', ' + ratio}"
        )


def main() -> None:
    """Prints tables and writes the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", help="directory of text; default: Python's standard library")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 16384])
    parser.add_argument("--join", action="store_true", help="long documents, see above")
    parser.add_argument("--cut", type=int, metavar="N", help="short documents, see above")
    parser.add_argument("--workers", type=int, nargs="*", default=[], help="also with processes")
    parser.add_argument(
        "--peer",
        nargs="*",
        choices=("t5", "plain"),
        default=["plain"],
        help="seqio pipelines to compare with, with the `t5` library or without; none: no name",
    )
    parser.add_argument("--memory", type=int, default=0, metavar="STEPS", help="see above")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each way in each round")
    parser.add_argument("--batch_tokens", type=int, default=262_144, help="places in a batch")
    parser.add_argument("--examples", type=int, default=20_000, help="that filling is taken from")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if "t5" in args.peer and importlib.util.find_spec("t5") is None:
        sys.exit("--peer t5 needs the t5 library: pip install t5")
    everything = read_documents(args.corpus)
    if args.cut is not None:
        everything = [
            tokens[at : at + args.cut]
            for tokens in everything
            for at in range(0, len(tokens), args.cut)
        ]
    report = {}
    for length in args.lengths:
        documents = joined(everything, 3 * length) if args.join else everything
        size = sum(map(len, documents))
        print(f"{length} inputs, {length} targets; {len(documents):,} documents, {size:,} tokens")
        full = filling(documents, length, args.examples)
        for name, value in full.items():
            print(f"  {name.replace('_', ' '):42} {value:,.4g}")
        held = {}
        with tempfile.TemporaryDirectory() as directory:
            cache = cached(documents, Path(directory))
            found = speeds(documents, cache, length, args) if args.rounds else {}
            if found:
                print_speeds(found)
            for workers in (0, *args.workers) if args.memory else ():
                held[workers] = memory(cache, length, args.memory, workers)
                cells = " ".join(f"{size / 1e6:.1f}" for size in held[workers])
                print(f"  resident, workers = {workers}, {args.memory:,} steps: {cells} MB")
        report[length] = {"filling": full, "speed": found, "memory": held}
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1, default=float))


if __name__ == "__main__":
    main()
