"""Speed and filling of packed rows, beside seqio's pipeline and a bare copy of the tokens.

    python tools/bench/data.py
    python tools/bench/data.py --lengths 512 --workers 1 2 --no_seqio --json data.json

The documents are those of Python's standard library (or of --corpus), words and signs as tokens,
in memory as a cache's are. Each round times every way of making rows of T5Gemma 2's mixture in
turn. Tokens are real ones, of both sides; padding does not count. "one core" is a single thread;
the seqio pipeline uses all cores, so its speed by the second of CPU time is given, too. Documents
are shorter than long rows: with --join they are laid end to end until they are three rows long;
with --cut N they are cut into short ones of at most N tokens.
"""

import argparse
import json
import re
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from t5g2.data.loader import RowBatches
from t5g2.data.mixture import Mixture, Source
from t5g2.data.packing import RowStream
from t5g2.data.sources.config import CorpusConfig
from t5g2.data.sources.opening import open_mixture
from t5g2.data.ul2 import SpecialTokens

SPECIAL = SpecialTokens(2, 1, range(256_002, 256_002 + 4096))
WARM_BATCHES = 8
Documents = list[np.ndarray]


def read_documents(path: str | None) -> Documents:
    """The training documents of a directory, a word or a sign a token."""
    from t5g2.data.sources.mixture_file import read_mixture

    config = CorpusConfig() if path is None else CorpusConfig(path=path)
    (source,) = open_mixture(read_mixture(config), config)
    made = []
    for text in source.documents["train"]:
        words = re.findall(r"\w+|[^\w\s]|\s+", text)
        ids = [1000 + zlib.crc32(word.encode()) % 250_000 for word in words]
        made.append(np.array(ids, np.int32))
    return [tokens for tokens in made if len(tokens)]


def joined(documents: Documents, length: int) -> Documents:
    """Documents laid end to end until each has at least `length` tokens."""
    made, held, size = [], [], 0
    for document in documents:
        held.append(document)
        size += len(document)
        if size >= length:
            made.append(np.concatenate(held))
            held, size = [], 0
    return made


def stream_of(documents: Documents, length: int, rows: int) -> RowStream:
    """Rows of T5Gemma 2's mixture."""
    mixture = Mixture(sources=(Source(name="text", documents=documents),), special=SPECIAL)
    return RowStream(mixture, rows, length, length, seed=0)


def real_tokens(batch: dict[str, np.ndarray]) -> int:
    """Tokens of a batch that are no padding."""
    return sum(np.count_nonzero(batch[f"{side}_segment_ids"]) for side in ("encoder", "decoder"))


def measure(tokens_of_batches: Iterator[int], seconds: float) -> dict[str, float]:
    """Real tokens a second, of the clock's and of this process' CPU's, after a warm-up.

    The warm-up takes what was made ahead while there was no hurry.
    """
    until = time.perf_counter() + seconds
    warm = [next(tokens_of_batches)]
    while len(warm) < WARM_BATCHES or time.perf_counter() < until:
        warm.append(next(tokens_of_batches))
    tokens, began, cpu_began = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() < began + seconds:
        tokens += next(tokens_of_batches)
    spent, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return {"tokens_per_second": tokens / spent, "tokens_per_cpu_second": tokens / cpu}


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


def speeds(documents: Documents, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Every way of making rows, in turn, round by round."""
    rows = max(args.batch_tokens // (2 * length), 2)

    def ours(workers: int | None) -> dict[str, float]:
        stream = stream_of(documents, length, rows)
        dataset = RowBatches(stream, stream.start(), 0, rows, workers or 0)
        with closing(iter(dataset) if workers is None else dataset.prefetched()) as steps:
            return measure((real_tokens(step.batch) for step in steps), args.seconds)

    ways: dict[str, Callable[[], dict[str, float]]] = {
        "t5g2, one core": lambda: ours(None),
        **{f"t5g2, workers = {n}": lambda n=n: ours(n) for n in args.workers},  # type: ignore[misc]
        "copy": lambda: measure(copies(documents, args.batch_tokens), args.seconds / 3),
    }
    if not args.no_seqio:
        import seqio_peer  # beside this file

        def peer() -> dict[str, float]:
            batches = seqio_peer.batches(documents, SPECIAL, length, rows)
            return measure(map(real_tokens, batches), args.seconds)

        ways["seqio + tf.data"] = peer
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
            for of in rounds[0]
        }
        # Worker processes' CPU time is not this process'.
        cpu = "" if "workers" in name else f", {median['tokens_per_cpu_second']:.3g} x by CPU time"
        ratio = f"one core is {median['tokens_per_second']:.3g} x as fast{cpu}"
        print(f"  {name:20} {' '.join(cells)} M tokens/s   {'' if rounds is ours else ratio}")


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
    parser.add_argument("--no_seqio", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each way in each round")
    parser.add_argument("--batch_tokens", type=int, default=262_144, help="places in a batch")
    parser.add_argument("--examples", type=int, default=20_000, help="that filling is taken from")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
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
        found = speeds(documents, length, args) if args.rounds else {}
        if found:
            print_speeds(found)
        report[length] = {"filling": full, "speed": found}
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1, default=float))


if __name__ == "__main__":
    main()
