"""`t5g2 evaluate --task`: seqio Tasks on one checkpoint, the newest, all, or as they are written.

Results are lines of JSON, a line for each checkpoint and Task: in `eval/<task>.jsonl` of the run
directory, or of `--out`.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from t5g2 import settings
from t5g2.checkpoints.directory import in_use, saved_checkpoints
from t5g2.checkpoints.store import CHECKPOINTS_DIR
from t5g2.errors import UserError
from t5g2.files import append, to_path
from t5g2.finish import AVERAGED_DIR, is_finished
from t5g2.pretrained import Pretrained, load
from t5g2.scoring import Scorer
from t5g2.task_evaluation import TaskEvaluator

EVAL_DIR = "eval"
_SPLIT = "validation"
# Seconds between two looks at a run that is followed.
_LOOKS_EVERY_SECONDS = 10.0


class Candidate(NamedTuple):
    """A checkpoint to evaluate, and what its weights are called: a step's, or "averaged"."""

    path: Path
    weights: str


def evaluate_tasks(args: argparse.Namespace) -> int:
    """Evaluates what the arguments name; prints a line for each checkpoint and Task.

    Raises:
        UserError: anything that the user can mend.
    """
    if args.examples is not None and args.examples < 1:
        raise UserError(f"--examples must be at least 1, not {args.examples}")
    out = _results_directory(args)
    evaluators: dict[str, TaskEvaluator] = {}
    for candidate in _candidates(args):
        with in_use([candidate.path]):
            wanted = {
                named: asked
                for named in args.task
                if not _is_done(out, asked := _asked(args, named, candidate), args)
            }
            if not wanted:
                print(f"{candidate.weights}: done before")
                continue
            model = _loaded(candidate.path, args)
            if model is None:
                continue
        scorer = Scorer(model)
        for named, asked in wanted.items():
            if named not in evaluators:
                evaluators[named] = _evaluator(named, model, args)
            begin = time.monotonic()
            evaluator = evaluators[named]
            for task, metrics in evaluator(scorer).items():
                record = {
                    **asked,
                    "subtask": task,
                    "step": model.meta.get("step"),
                    "checkpoint": str(candidate.path),
                    "count": evaluator.examples[task],
                    "seconds": round(time.monotonic() - begin, 3),
                    "time": time.time(),
                    "metrics": metrics,
                }
                if out is not None:
                    _append(_file(out, asked), record)
                shown = ", ".join(
                    f"{name} {value:.4f}"
                    for name, value in metrics.items()
                    if not isinstance(value, str)
                )
                print(f"{candidate.weights}: {task}: {shown}", flush=True)
    return 0


def newest_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint of a run, temporary or not.

    Raises:
        UserError: it is no run, or has none yet.
    """
    settings.run_settings(run_dir)
    saved = saved_checkpoints(run_dir / CHECKPOINTS_DIR)
    if not saved:
        raise UserError(f"{run_dir} has no checkpoint yet")
    return saved[-1].path


def _results_directory(args: argparse.Namespace) -> Path | None:
    if args.out is not None:
        return to_path(args.out)
    return None if args.run_dir is None else to_path(args.run_dir) / EVAL_DIR


def _candidates(args: argparse.Namespace) -> Iterator[Candidate]:
    """The checkpoints to evaluate, each once; of a run that is followed, as they come."""
    if args.run_dir is None:
        path = to_path(args.checkpoint)
        yield Candidate(path, path.name)
        return
    run_dir = to_path(args.run_dir)
    if not args.all and not args.follow:
        path = newest_checkpoint(run_dir)
        yield Candidate(path, path.name)
        return
    settings.run_settings(run_dir)  # refuses what is no run
    seen: set[Path] = set()
    while True:
        finished = is_finished(run_dir)
        found = [
            Candidate(saved.path, str(saved.step))
            for saved in saved_checkpoints(run_dir / CHECKPOINTS_DIR)
            if not saved.temporary
        ]
        if finished:
            found.append(Candidate(run_dir / AVERAGED_DIR, "averaged"))
        for candidate in found:
            if candidate.path not in seen:
                seen.add(candidate.path)
                yield candidate
        if finished or not args.follow:
            return
        time.sleep(_LOOKS_EVERY_SECONDS)


def _loaded(path: Path, args: argparse.Namespace) -> Pretrained | None:
    """The model; None if its run has pruned it since it was listed."""
    try:
        return load(path)
    except (UserError, OSError):
        if args.follow and not path.exists():
            print(f"{path.name}: pruned by its run before it could be read")
            return None
        raise


def _evaluator(named: str, model: Pretrained, args: argparse.Namespace) -> TaskEvaluator:
    lengths = {"inputs": args.inputs_length, "targets": args.targets_length}
    bos_on_inputs = True
    if "settings" in model.meta:
        data = settings.from_json(model.meta["settings"]).data
        bos_on_inputs = data.bos_on_inputs
        own = {"inputs": data.inputs_length, "targets": data.targets_length}
        lengths = {side: length or own[side] for side, length in lengths.items()}
    for side, length in lengths.items():
        if length is None:
            raise UserError(f"this checkpoint is of no run: say --{side}_length")
        if length < 1:
            raise UserError(f"--{side}_length must be at least 1, not {length}")
    return TaskEvaluator(
        named,
        model,
        {side: int(length) for side, length in lengths.items()},
        split=args.split or _SPLIT,
        examples=args.examples,
        bos_on_inputs=bos_on_inputs,
    )


def _asked(args: argparse.Namespace, named: str, candidate: Candidate) -> dict[str, Any]:
    """What a result is of; two results of which this is the same are the same."""
    return {
        "task": named.partition(":")[2],
        "split": args.split or _SPLIT,
        "examples": args.examples,
        "inputs_length": args.inputs_length,
        "targets_length": args.targets_length,
        "weights": candidate.weights,
    }


def _is_done(out: Path | None, asked: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether a result is there already; one that was asked for alone is made again."""
    if out is None or not (args.all or args.follow):
        return False
    return any(asked.items() <= record.items() for record in read_results(_file(out, asked)))


def _file(out: Path, asked: dict[str, Any]) -> Path:
    return out / f"{asked['task']}.jsonl"


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results in a file, as far as lines are whole; none if there is no such file."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # its process was killed while writing it
            continue
    return records


def _append(path: Path, record: dict[str, Any]) -> None:
    # JSON has no NaN.
    metrics = {
        name: value if isinstance(value, str) or math.isfinite(value) else str(value)
        for name, value in record["metrics"].items()
    }
    append(path, json.dumps({**record, "metrics": metrics}, allow_nan=False) + "\n")
