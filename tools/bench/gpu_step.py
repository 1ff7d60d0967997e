"""Our train step on one GPU, on packed UL2 rows: speed, MFU, memory; beside transformers.

    python tools/bench/gpu_step.py
    python tools/bench/gpu_step.py --sizes 270m --lengths 2048 --peers sdpa --profile traces

Needs jax for the GPU, flax, optax and numpy, and for --peers torch and transformers; neither
TensorFlow, seqio nor grain. Rows are T5Gemma 2's UL2 mixture over this Python's standard library,
packed, laid end to end to documents of three rows. The peer gets the same examples, as many at a
time as --peer_rows, padded to the longest of them. Both multiply in bfloat16 (torch: autocast), on
float32 weights with clipping and AdamW. Each measurement is a process of its own, in turn.

MFU is honest: of each example's own tokens alone, by `planning.flops` (windows and causality at
their true width, the vocabulary head, no recomputation, no padding), over the published peak of
the chip. The floor is what a product of bfloat16 matrices reaches in the same run.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
import types
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))  # The package need not be installed.

_WARM = 2


def stand_in() -> None:
    """Stands in for what the package needs besides and is not installed, as far as a step goes.

    Of jaxtyping, shapes in annotations say nothing then; isal's checksums are zlib's, only faster.
    """
    if importlib.util.find_spec("jaxtyping") is None:

        class Shaped:
            def __class_getitem__(cls, _: object) -> type:
                return cls

        shapes = types.ModuleType("jaxtyping")
        shapes.__dict__["__getattr__"] = lambda _: Shaped
        sys.modules["jaxtyping"] = shapes
    if importlib.util.find_spec("isal") is None:
        sys.modules |= {"isal": types.ModuleType("isal"), "isal.isal_zlib": zlib}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What one process measures.

    Attributes:
        side: "t5g2"; "eager" or "sdpa" of transformers; or "gemm".
        size: of the model.
        length: of either side of a row.
        rows: of a batch.
        peer_rows: examples that the peer takes at a time.
        steps: to time.
        remat: see `ModelConfig`.
        attention: see `ModelConfig`.
        layers: of either stack; None: all.
        profile: directory for a trace of our steps.
    """

    side: str
    size: str
    length: int
    rows: int
    peer_rows: int
    steps: int
    remat: str
    attention: str
    layers: int | None
    profile: str | None


def model_of(job: Job) -> Any:
    """The text model of a size."""
    from t5g2.models.config import T5GEMMA2_1B, T5GEMMA2_270M

    config = {"270m": T5GEMMA2_270M, "1b": T5GEMMA2_1B}[job.size]
    return dataclasses.replace(
        config,
        vision=None,
        num_layers=job.layers or config.num_layers,
        dtype="bfloat16",
        remat=job.remat,
        attention=job.attention,
    )


def stream_of(job: Job) -> Any:
    """Rows of the mixture over Python's standard library."""
    import rows  # beside this file

    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    files = [
        rows.tokens_of(path.read_text(errors="replace"))
        for path in paths
        if "site-packages" not in path.parts
    ]
    return rows.stream_of(rows.joined(files, 3 * job.length), job.length, job.rows)


def batches(job: Job) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """The examples of each batch."""
    from rows import examples_of

    yield from examples_of(stream_of(job))


def needed(config: Any, examples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[int, int]:
    """Model FLOPs of a step on these examples, and their tokens of both sides."""
    from t5g2.planning.flops import Load, model_flops

    flops = tokens = 0
    for inputs, targets in examples:
        load = Load(rows=1, inputs=len(inputs), targets=len(targets))
        flops += model_flops(config, load).total
        tokens += load.tokens
    return flops, tokens


def our_steps(job: Job) -> tuple[Callable[[], float], Callable[[], int]]:
    """A function that makes a step and gives its loss, and one that gives the peak of memory."""
    import jax
    import optax
    from our_step import prepare  # beside this file

    from t5g2.data.batch import empty_batch, fill_rows
    from t5g2.training.optimizer import OptimizerConfig, make_optimizer

    stream = stream_of(job)
    optimizer = make_optimizer(OptimizerConfig(), optax.constant_schedule(1e-3))
    room = (job.length, job.length)
    ours = prepare(model_of(job), optimizer, rows=job.rows, room=room, num_tasks=len(stream.tasks))
    held = {"state": ours.state, "cursors": stream.start()}
    step, place, device = ours.step, ours.place, jax.devices()[0]
    del ours  # The state is consumed.

    def one() -> float:
        batch = empty_batch(job.rows, *room)
        held["cursors"] = fill_rows(batch, stream, 0, held["cursors"])
        held["state"], metrics = step(held["state"], place(batch))
        return float(metrics.loss)

    return one, lambda: (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def peer_steps(job: Job) -> tuple[Callable[[], float], Callable[[], int]]:
    """As `our_steps`, of transformers."""
    import torch
    from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration
    from transformers_step import torch_steps  # beside this file

    from t5g2.interop.hf_config import to_hf_config

    config = T5Gemma2Config(**to_hf_config(model_of(job)))
    config._attn_implementation = job.side
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = T5Gemma2ForConditionalGeneration(config)
    one = torch_steps(model, batches(job), job.peer_rows, "bfloat16", device)
    peak = torch.cuda.max_memory_allocated if device == "cuda" else lambda: 0
    return lambda: one()[0], peak


def gemm(size: int = 8192) -> float:
    """FLOP/s of a product of bfloat16 matrices in jax, the best of ten."""
    import jax

    size = size if jax.default_backend() == "gpu" else 1024
    left = jax.random.normal(jax.random.key(0), (size, size), "bfloat16")
    multiply = jax.jit(lambda a: a @ a)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(multiply(left))
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def measure(job: Job) -> dict[str, Any]:
    """What a process prints."""
    stand_in()
    if job.side == "gemm":
        return {"flops_per_second": gemm()}
    began = time.perf_counter()
    one, peak = (our_steps if job.side == "t5g2" else peer_steps)(job)
    losses = [one() for _ in range(_WARM)]
    started = time.perf_counter() - began
    seconds = []
    for _ in range(job.steps):
        began = time.perf_counter()
        losses.append(one())
        seconds.append(time.perf_counter() - began)
    config, peaked = model_of(job), peak()
    fed = [
        needed(config, examples) for examples in itertools.islice(batches(job), _WARM + job.steps)
    ]
    flops, tokens = (sum(values) for values in zip(*fed[_WARM:], strict=True))
    found = {
        "started": started,
        "seconds": seconds,
        "tokens_per_second": tokens / sum(seconds),
        "flops_per_second": flops / sum(seconds),
        "filled": tokens / (2 * job.length * job.rows * job.steps),
        "peak_bytes": peaked,
        "losses": losses,
    }
    if job.side == "t5g2":
        import jax

        from t5g2.planning.rate import chip_of

        kind = jax.devices()[0].device_kind
        chip = chip_of(kind)
        found |= {"device": kind, "peak_flops": None if chip is None else chip.flops}
        if job.profile is not None:
            with jax.profiler.trace(job.profile):
                one()
    return found


def run(job: Job) -> dict[str, Any]:
    """A job in a process of its own; of one that fails, the last line it wrote."""
    command = [sys.executable, __file__, "--child", json.dumps(dataclasses.asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def told(side: str, rounds: list[dict[str, Any]], ours: list[dict[str, Any]]) -> str:
    """A line of the table."""
    good = [
        (mine, theirs)
        for mine, theirs in zip(ours, rounds, strict=True)
        if "failed" not in mine and "failed" not in theirs
    ]
    if not good:
        return f"  {side:6} failed: {rounds[0].get('failed', 'ours did')}"
    first = good[0][1]
    faster = statistics.median(
        mine["tokens_per_second"] / theirs["tokens_per_second"] for mine, theirs in good
    )
    rate = statistics.median(theirs["flops_per_second"] for _, theirs in good)
    peak = next((mine["peak_flops"] for mine, _ in good), None)
    mfu = f", MFU {rate / peak:.1%}" if peak else ""
    beside = "" if side == "t5g2" else f"; ours {faster:.2f} x as fast"
    return (
        f"  {side:6} {first['tokens_per_second']:10,.0f} tokens/s, {first['filled']:.0%} filled, "
        f"{rate / 1e12:.1f} TFLOP/s{mfu}, peak {first['peak_bytes'] / 2**30:.1f} GiB, started in "
        f"{first['started']:.0f} s, losses {first['losses'][0]:.3f} to {first['losses'][-1]:.3f}"
        f"{beside}"
    )


def main() -> None:
    """Runs the cases and prints a table of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=("270m", "1b"), default=["270m", "1b"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--tokens", type=int, default=65_536, help="places of a batch, both sides")
    parser.add_argument("--peer_rows", type=int, default=4)
    parser.add_argument("--peers", nargs="*", choices=("eager", "sdpa"), default=["sdpa"])
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--layers", type=int, help="of either stack; default: all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="timed in each process")
    parser.add_argument("--profile", help="directory for traces of our steps")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(Job(**json.loads(args.child)))))
        return
    # A process gives its memory back when it ends, so that each may take what it needs.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    report = []
    for size, length in itertools.product(args.sizes, args.lengths):
        job = functools.partial(
            Job,
            size=size,
            length=length,
            rows=max(args.tokens // (2 * length), 1),
            peer_rows=args.peer_rows,
            steps=args.steps,
            remat=args.remat,
            attention=args.attention,
            layers=args.layers,
            profile=args.profile and f"{args.profile}/{size}_{length}",
        )
        sides: dict[str, list[dict[str, Any]]] = {side: [] for side in ("t5g2", *args.peers)}
        floors = []
        for _ in range(args.rounds):
            for side, rounds in sides.items():
                rounds.append(run(job(side=side)))
            floors.append(run(job(side="gemm")))
        print(f"{size}, packed UL2 at {length}/{length}, bfloat16", flush=True)
        for side, rounds in sides.items():
            print(told(side, rounds, sides["t5g2"]), flush=True)
        floor = [found["flops_per_second"] for found in floors if "failed" not in found]
        if floor:
            print(f"  gemm   {statistics.median(floor) / 1e12:.1f} TFLOP/s", flush=True)
        report.append({"size": size, "length": length, "gemm": floors, **sides})
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
