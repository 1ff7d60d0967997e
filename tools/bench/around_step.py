"""What is not the step: starting, importing the package, export and import beside the bare disk.

    python tools/bench/around_step.py --scratch DIR

Starting is timed in processes of their own, alternating with an empty Python process. Import and
export are of a model of --size in bfloat16 (text alone), alternating with the disk: as many bytes
written and synced, and read again. From the start of the process to its end, and without what the
same job takes for a model of next to nothing. The page cache is not emptied: all readers profit
alike.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from import_memory import write_tokenizer
from random_hf_model import SIZES, write_random_model

from t5g2.models.config import TINY

_STARTS = {
    "python": ("-c", ""),
    "import t5g2": ("-c", "import t5g2"),
    "t5g2 --help": ("-m", "t5g2", "--help"),
}
_CHUNK = 2**24


def seconds_of(*arguments: object) -> float:
    """Of a Python process."""
    began = time.perf_counter()
    command = [sys.executable, *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def disk(path: Path, size: int) -> dict[str, float]:
    """Bytes a second of one sequential writer, synced, and of one reader."""
    chunk = os.urandom(_CHUNK)
    began = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(size // _CHUNK):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(_CHUNK):
            pass
    read = time.perf_counter()
    path.unlink()
    total = size // _CHUNK * _CHUNK
    return {"write": total / (written - began), "read": total / (read - written)}


def main() -> None:
    """Prints the tables, and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model_rounds", type=int, default=3, help="of import and export")
    parser.add_argument("--size", choices=tuple(SIZES), default="1b")
    parser.add_argument("--scratch", type=Path, help="on the disk to compare with")
    args = parser.parse_args()
    starts: dict[str, list[float]] = {name: [] for name in _STARTS}
    for _ in range(args.rounds):
        for name, arguments in _STARTS.items():
            starts[name].append(seconds_of(*arguments))
    for name, times in starts.items():
        over = statistics.median(a - b for a, b in zip(times, starts["python"], strict=True))
        print(f"{name:12} {statistics.median(times):6.3f} s, {over:6.3f} s over python's start")
    report: dict[str, object] = {"starts": starts}
    if args.model_rounds:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            report["model"] = models(Path(scratch), args.size, args.model_rounds)
    print(json.dumps(report))


def models(scratch: Path, name: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of import and export, of the same for a tiny model and of the disk, round by round.

    The disk reads the model's bytes once and writes them once.
    """
    size = 2 * write_random_model(dataclasses.replace(SIZES[name], vision=None), scratch / "source")
    write_random_model(TINY, scratch / "tiny_source")
    tokenizer = write_tokenizer(scratch / "tokenizer.model")
    found: dict[str, list[dict[str, float]]] = {"import": [], "export": []}

    def arguments(job: str, prefix: str, number: int) -> tuple[object, ...]:
        made = scratch / f"{prefix}checkpoint{number}"
        if job == "import":
            return scratch / f"{prefix}source", "--out", made, "--tokenizer", tokenizer
        return "--checkpoint", made, "--out", scratch / f"{prefix}export{number}"

    for number in range(rounds):
        for job, seconds in found.items():
            speeds = disk(scratch / "floor", size)
            start = seconds_of("-m", "t5g2", job, *arguments(job, "tiny_", number))
            taken = seconds_of("-m", "t5g2", job, *arguments(job, "", number))
            floor = size / speeds["read"] + size / speeds["write"]
            seconds.append({"taken": taken, "start": start, "disk": floor})
            print(
                f"{job}: {taken:.1f} s (start {start:.1f} s) for {size / 1e9:.2f} GB; the disk, "
                f"{speeds['write'] / 1e6:,.0f} MB/s written, {speeds['read'] / 1e6:,.0f} read, "
                f"would take {floor:.1f} s: {floor / taken:.0%}, without the start "
                f"{floor / (taken - start):.0%}",
                flush=True,
            )
        for made in scratch.glob(f"*{number}"):
            shutil.rmtree(made)
    return found


if __name__ == "__main__":
    main()
