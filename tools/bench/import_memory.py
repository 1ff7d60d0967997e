"""Measures the memory that `t5g2 import` and `t5g2 export` take for a model of a released size.

    python tools/bench/import_memory.py --size 1b --scratch DIR

Makes a directory of random weights below DIR (in bfloat16; 4.2 GB for 1b, and as much again for the
checkpoint and the export), imports it and exports that, each in a process of its own, and prints
the most memory each has had resident, as Linux counts it (`VmHWM` of /proc/self/status: heap,
libraries and mapped files). Compares the export with the source, byte for byte.
"""

import argparse
import filecmp
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from random_hf_model import SIZES, write_random_model

from t5g2.data.tokenizer import train_sentencepiece

# `getrusage` would count the parent's memory, too, from before the child's program began.
_PROGRAM = """
import sys
from t5g2.cli import main
code = main(sys.argv[1:])
with open("/proc/self/status") as status:
    print(*(line.split()[1] for line in status if line.startswith("VmHWM")))
sys.exit(code)
"""


def peak_bytes(*arguments: object) -> int:
    """Runs a job of t5g2 in a process of its own and returns its peak of resident memory."""
    command = [sys.executable, "-c", _PROGRAM, *map(str, arguments)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return 1024 * int(output.splitlines()[-1])


def write_tokenizer(out: Path) -> Path:
    """Trains a small tokenizer on Python's own modules."""
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]
    documents = [path.read_text(encoding="utf-8", errors="replace") for path in modules]
    train_sentencepiece(documents, out, vocab_size=600, sentinels=32, max_bytes=200_000)
    return out


def main() -> None:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--scratch", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    source, checkpoint, out = (args.scratch / name for name in ("source", "checkpoint", "export"))
    count = write_random_model(SIZES[args.size], source)
    print(f"{count:,} parameters, {2 * count / 1e9:.2f} GB in bfloat16")
    tokenizer = write_tokenizer(args.scratch / "tokenizer.model")
    jobs = (
        ("import", source, "--out", checkpoint, "--tokenizer", tokenizer),
        ("export", "--checkpoint", checkpoint, "--out", out),
    )
    for job in jobs:
        started = time.perf_counter()
        peak = peak_bytes(*job)
        print(f"{job[0]}: peak {peak / 1e9:.2f} GB, {time.perf_counter() - started:.0f} s")
    before, after = sorted(source.glob("*.safetensors")), sorted(out.glob("*.safetensors"))
    same = [a.name for a in before] == [b.name for b in after] and all(
        filecmp.cmp(a, b, shallow=False) for a, b in zip(before, after, strict=True)
    )
    print(f"the export's weights are the source's, byte for byte: {same}")


if __name__ == "__main__":
    main()
