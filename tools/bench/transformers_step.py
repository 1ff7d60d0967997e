"""Our train step beside transformers' T5Gemma 2 in torch, on CPU: speed, memory, losses.

    python tools/bench/transformers_step.py
    python tools/bench/transformers_step.py --dtypes float32 --lengths 512 --json out.json

The 270M-270M model (text alone) at its full vocabulary; forward, backward, clipping and AdamW on
float32 weights, the same at the start; bfloat16 is autocast's in torch. "full" rows have one
example and no padding. The "stream" is T5Gemma 2's UL2 mixture over Python's standard library (or
--corpus): ours packs it; the peer gets the very same examples, as many at a time as our batch has
rows, padded to the longest of them, their gradients added up. Tokens of a stream are real targets.

Every measurement is a process of its own, one at a time, in turn, on the same cores, with the same
settings of malloc; peak memory is the resident memory's (`VmHWM`), counted from when the weights
are loaded. A process may take --memory_gb; what does not fit is told so. The floor is what a matrix
product of the vocabulary head's shape reaches in the same run, in each library: a step of that
speed in all of its model FLOPs is the bound.
"""

import argparse
import ctypes
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# glibc keeps freed memory, in huge pages: both sides are faster so.
_MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592"
_MALLOC += ":glibc.malloc.trim_threshold=8589934592"
_WARM = 1
_LEARNING_RATE = 1e-3

Examples = list[tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What one process measures.

    Attributes:
        side: "t5g2", "eager", "sdpa"; or "gemm t5g2", "gemm torch".
        dtype: to multiply in.
        kind: "full" or "stream".
        length: of either side of a row.
        rows: of a batch.
        steps: to time, after one that is not.
        weights: directory of Hugging Face's format.
        cores: threads and cores.
        corpus: see `--corpus`.
        memory: bytes that the process may take.
        gin: settings of our step.
    """

    side: str
    dtype: str
    kind: str
    length: int
    rows: int
    steps: int
    weights: str
    cores: int
    corpus: str | None
    memory: int
    gin: tuple[str, ...] = ()


def _stream(job: Job) -> Any:
    from data import read_documents  # beside this file
    from rows import stream_of

    return stream_of(read_documents(job.corpus), job.length, job.rows)


def our_batches(job: Job) -> Iterator[dict[str, np.ndarray]]:
    """Packed batches, endless."""
    from our_step import full_batch

    from t5g2.data.batch import empty_batch, fill_rows

    if job.kind == "full":
        batch = full_batch(job.rows, job.length, job.length, 262_144)
        while True:
            yield batch
    stream = _stream(job)
    cursors = stream.start()
    while True:
        batch = empty_batch(job.rows, job.length, job.length)
        cursors = fill_rows(batch, stream, 0, cursors)
        yield batch


def peer_batches(job: Job) -> Iterator[Examples]:
    """The examples of `our_batches`."""
    if job.kind == "full":
        for batch in our_batches(job):
            yield list(
                zip(batch["encoder_input_tokens"], batch["decoder_target_tokens"], strict=True)
            )
    from rows import examples_of

    yield from examples_of(_stream(job))


def our_steps(job: Job) -> Callable[[], tuple[float, int, int]]:
    """A function that makes a step: its loss, the tokens that count, the places it multiplied."""
    import jax
    from our_step import prepare_recipe

    from t5g2.interop.hf import load_hf
    from t5g2.settings import read_settings

    settings = read_settings(
        ["configs/models/t5gemma2_270m.gin"],
        [
            "model.vision=None",
            f"model.dtype={job.dtype}",
            f"data.inputs_length={job.length}",
            f"data.targets_length={job.length}",
            f"train.rows={job.rows}",
            "train.total_steps=1000000",
            "schedule.warmup_steps=0",
            f"schedule.peak_learning_rate={_LEARNING_RATE}",
            *job.gin,
        ],
    )
    ours = prepare_recipe(settings, load_hf(Path(job.weights))[1])
    held, batches = [ours.state], our_batches(job)
    step, place = ours.step, ours.place
    del ours

    def one() -> tuple[float, int, int]:
        batch = next(batches)
        held[0], metrics = step(held[0], place(batch))
        jax.block_until_ready(held[0])
        tokens = np.count_nonzero(batch["decoder_segment_ids"])
        return float(metrics.loss), int(tokens), batch["decoder_segment_ids"].size

    return one


def padded(examples: Examples) -> dict[str, np.ndarray]:
    """As transformers' collators pad: to the longest, labels with -100."""
    shape = [max(len(example[side]) for example in examples) for side in (0, 1)]
    ids = np.zeros((len(examples), shape[0]), np.int64)
    labels = np.full((len(examples), shape[1]), -100, np.int64)
    for row, (inputs, targets) in enumerate(examples):
        ids[row, : len(inputs)] = inputs
        labels[row, : len(targets)] = targets
    lengths = np.array([len(inputs) for inputs, _ in examples])
    mask = (np.arange(shape[0]) < lengths[:, None]).astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def peer_steps(job: Job) -> Callable[[], tuple[float, int, int]]:
    """As `our_steps`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import T5Gemma2ForConditionalGeneration

    torch.set_num_threads(job.cores)
    model = T5Gemma2ForConditionalGeneration.from_pretrained(
        job.weights, attn_implementation=job.side, dtype=torch.float32
    )
    return torch_steps(model, peer_batches(job), job.rows, job.dtype, "cpu")


def torch_steps(
    model: Any, batches: Iterator[Examples], rows: int, dtype: str, device: str
) -> Callable[[], tuple[float, int, int]]:
    """A function that makes a step of transformers' model, as `our_steps` returns one of ours.

    Args:
        model: transformers' T5Gemma 2, with float32 weights.
        batches: the examples of each step.
        rows: examples at a time; their gradients are added up.
        dtype: autocast's; "float32": none.
        device: torch's name of it.
    """
    import torch

    model = model.to(device).train()
    model.model.encoder.vision_tower.requires_grad_(False)
    decayed = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed["norm" not in name and "eoi" not in name].append(parameter)
    groups = [
        {"params": parameters, "weight_decay": 0.1 if decays else 0.0}
        for decays, parameters in decayed.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    autocast = functools.partial(
        torch.autocast, device, torch.bfloat16, enabled=dtype == "bfloat16"
    )

    def one() -> tuple[float, int, int]:
        examples = next(batches)
        tokens = sum(len(targets) for _, targets in examples)
        loss, places = 0.0, 0
        for first in range(0, len(examples), rows):
            part = examples[first : first + rows]
            arrays = {
                name: torch.from_numpy(array).to(device) for name, array in padded(part).items()
            }
            share = sum(len(targets) for _, targets in part) / tokens
            with autocast():
                partial = model(**arrays).loss * share
            partial.backward()
            loss += partial.item()
            places += arrays["labels"].numel()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss, tokens, places

    return one


def gemm(job: Job) -> dict[str, Any]:
    """FLOP/s of [tokens, 640] x [640, 262144] in a library."""
    tokens, width, vocabulary = 512, 640, 262_144
    if job.side == "gemm torch":
        import torch

        torch.set_num_threads(job.cores)
        left = torch.randn(tokens, width).to(getattr(torch, job.dtype))
        right = torch.randn(width, vocabulary).to(left.dtype)
        product: Callable[[], Any] = lambda: left @ right  # noqa: E731
    else:
        import jax

        left, right = (
            jax.random.normal(jax.random.key(0), shape, job.dtype)
            for shape in ((tokens, width), (width, vocabulary))
        )
        multiply = jax.jit(lambda a, b: a @ b)
        product = lambda: jax.block_until_ready(multiply(left, right))  # noqa: E731
    seconds = []
    for _ in range(job.steps + 2):
        began = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - began)
    return {"flops": 2 * tokens * width * vocabulary / statistics.median(seconds[1:])}


def measure(job: Job) -> dict[str, Any]:
    """What the process prints."""
    import resource

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job.cores])
    resource.setrlimit(resource.RLIMIT_DATA, (job.memory, job.memory))
    if job.side.startswith("gemm"):
        return gemm(job)
    one = (our_steps if job.side == "t5g2" else peer_steps)(job)
    # The peak from here on, without what loading and compiling have freed and malloc has kept.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    made = []
    for _ in range(_WARM + job.steps):
        began = time.perf_counter()
        loss, tokens, places = one()
        made.append((time.perf_counter() - began, loss, tokens, places))
    status = Path("/proc/self/status").read_text()
    (peak,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    seconds, losses, tokens_of, places_of = zip(*made, strict=True)
    return {
        "seconds": seconds[_WARM:],
        "tokens_per_second": sum(tokens_of[_WARM:]) / sum(seconds[_WARM:]),
        "filled": sum(tokens_of[_WARM:]) / sum(places_of[_WARM:]),
        "losses": losses,
        "peak_bytes": 1024 * peak,
    }


def run(job: Job) -> dict[str, Any]:
    """A job in a process of its own; what failed for want of memory has "failed"."""
    environment = {**os.environ, "GLIBC_TUNABLES": _MALLOC}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job.cores))
    command = [sys.executable, __file__, "--child", json.dumps(dataclasses.asdict(job))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    said = [
        line
        for line in done.stderr.splitlines()
        if "emory" in line or "bad_alloc" in line or "RESOURCE_EXHAUSTED" in line
    ]
    if not said:
        sys.exit(f"{job.side} failed:\n{done.stderr[-3000:]}")
    return {"failed": said[-1][:200]}


def available_bytes() -> int:
    """Memory that processes can still have."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def print_case(title: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A table of one case, and its ratios: medians over the rounds."""
    print(title, flush=True)
    ours, summary = found["t5g2"], {}
    for side, rounds in found.items():
        good = [r for r in rounds if "failed" not in r]
        if not good:
            print(f"  {side:6} {rounds[0]['failed']}")
            continue
        speed = statistics.median(r["tokens_per_second"] for r in good)
        peak = max(r["peak_bytes"] for r in good)
        pairs = [
            (a, b)
            for a, b in zip(ours, rounds, strict=True)
            if "failed" not in a and "failed" not in b
        ]
        faster = statistics.median(
            a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs
        )
        memory = statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in pairs)
        losses = " ".join(f"{loss:.4f}" for loss in good[0]["losses"])
        versus = "" if side == "t5g2" else f"; ours {faster:.2f} x as fast, {memory:.2f} x memory"
        print(
            f"  {side:6} {speed:8.1f} tokens/s, {good[0]['filled']:4.0%} filled, peak "
            f"{peak / 2**30:5.2f} GiB, losses {losses}{versus}",
            flush=True,
        )
        summary[side] = {"speed_ratio": faster, "memory_ratio": memory, "tokens_per_second": speed}
    return summary


def main() -> None:
    """Runs the cases and prints a table of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 2048], help="of full rows")
    parser.add_argument("--stream", type=int, nargs="*", default=[512], help="lengths of streams")
    parser.add_argument("--stream_rows", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1, help="of full batches")
    parser.add_argument("--peers", nargs="*", choices=("eager", "sdpa"), default=["eager", "sdpa"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed in each process")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--corpus", help="directory of text; default: Python's standard library")
    parser.add_argument("--memory_gb", type=float, help="default: 0.85 of what is available")
    parser.add_argument("--gin", action="append", default=[], metavar="SECTION.SETTING=VALUE")
    parser.add_argument("--scratch", type=Path, help="where the weights are written, and kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(Job(**json.loads(args.child)))))
        return
    report: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        weights = (args.scratch or Path(scratch)) / "weights"
        if not weights.exists():
            _write_weights(weights)
        cases = [("full", length, args.rows) for length in args.lengths]
        cases += [("stream", length, args.stream_rows) for length in args.stream]
        for dtype in args.dtypes:
            job = functools.partial(
                Job,
                dtype=dtype,
                steps=args.steps,
                weights=str(weights),
                cores=args.cores,
                corpus=args.corpus,
                gin=tuple(args.gin),
            )
            for kind, length, rows in cases:
                sides: dict[str, list[dict[str, Any]]] = {
                    side: [] for side in ("t5g2", *args.peers)
                }
                floors: dict[str, list[float]] = {"gemm t5g2": [], "gemm torch": []}
                for _ in range(args.rounds):
                    memory = int(1e9 * args.memory_gb) if args.memory_gb else 0
                    case = {"kind": kind, "length": length, "rows": rows}
                    case["memory"] = memory or int(0.85 * available_bytes())
                    for side, measured in sides.items():
                        measured.append(run(job(side=side, **case)))
                    for side, floor in floors.items():
                        floor.append(run(job(side=side, **case))["flops"])
                title = f"{kind} {rows} x {length}/{length}, {dtype}, {args.cores} cores"
                summary = print_case(title, sides)
                bound = {side: statistics.median(floor) for side, floor in floors.items()}
                print("  " + _bounds(sides, bound, kind, length, rows), flush=True)
                report.append({"case": title, "summary": summary, "gemm": floors, **sides})
                if args.json is not None:
                    args.json.write_text(json.dumps(report, indent=1))


def _bounds(
    sides: dict[str, list[dict[str, Any]]],
    bound: dict[str, float],
    kind: str,
    length: int,
    rows: int,
) -> str:
    """What the matrix products alone would take of the steps' time."""
    from t5g2.models.config import T5GEMMA2_270M
    from t5g2.planning.flops import Load, model_flops

    told = ", ".join(f"{side} {flops / 1e9:.0f} GFLOP/s" for side, flops in bound.items())
    if kind == "stream":
        return told
    config = dataclasses.replace(T5GEMMA2_270M, vision=None)
    needed = model_flops(config, Load(rows=rows, inputs=length, targets=length)).total
    shares = []
    for side, rounds in sides.items():
        seconds = [s for r in rounds if "failed" not in r for s in r["seconds"]]
        if seconds:
            floor = needed / bound["gemm t5g2" if side == "t5g2" else "gemm torch"]
            shares.append(f"{side} {floor / statistics.median(seconds):.0%}")
    return f"{told}; the floor's share of the step: {', '.join(shares)}"


def _write_weights(out: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from random_hf_model import write_random_model

    from t5g2.models.config import T5GEMMA2_270M

    out.parent.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(T5GEMMA2_270M, vision=None)
    print(f"{write_random_model(config, out, 'float32'):,} parameters", flush=True)


if __name__ == "__main__":
    main()
