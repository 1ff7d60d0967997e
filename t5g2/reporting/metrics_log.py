"""The record of a run: `metrics.jsonl`, one JSON object a line, and its scalars for TensorBoard.

The file is append-only and is the one source of `loss.png` and `report.html`. A run that was
killed and resumed writes its later steps twice; the file keeps both, and `read_metrics` decides
which of them count.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from t5g2.errors import UserError
from t5g2.files import to_path
from t5g2.reporting.appending import has_appended, open_appended, read_appended
from t5g2.reporting.tensorboard import ScalarsFile
from t5g2.reporting.thinning import thinned

if TYPE_CHECKING:
    from t5g2.reporting.wandb_log import WandbLog

FILE_NAME = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"

Scalar = float | int | str | bool | None
Value = Scalar | Mapping[str, Scalar] | Sequence[Scalar]
Kind = Literal["train", "eval", "event", "end", "summary"]
Row = dict[str, Any]

# JSON has no such numbers. As strings they stay readable by every JSON parser, where Python's
# bare NaN would not, and unlike null they tell "not a number" from "not measured".
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """Appends the records of one process of a run to its run directory.

    A context manager; one process of a run holds one. Each record is on its way to the disk (one
    `os.write`) when the call returns, so a kill loses nothing and never leaves half a line in
    front of a whole one. What finds no room on a full disk is written once there is some.

    A float that JSON cannot express is written as the string "NaN", "Infinity" or "-Infinity".
    """

    def __init__(self, run_dir: str | os.PathLike[str], wandb: WandbLog | None = None) -> None:
        """Opens `<run_dir>/metrics.jsonl` for appending; makes the directory if it is missing.

        Args:
            run_dir: the run's directory.
            wandb: is given the same scalars as TensorBoard, and closed with the log.
        """
        self._run_dir = to_path(run_dir)
        self._wandb = wandb
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._file = open_appended(self._run_dir / FILE_NAME)
        self._file.end_line()
        self._tensorboard: ScalarsFile | None = None

    def start(self, step: int, **facts: Value) -> None:
        """Records that a process begins (step 0) or resumes (step N, the last one it restored).

        Args:
            step: The step that the process starts from. What an earlier process recorded for
                later steps is superseded from here on, here and in TensorBoard.
            **facts: What is known then: total_steps, parameters, devices, config_hash, versions.
        """
        self._append({"kind": "start", "step": step, "time": time.time(), **facts})
        if self._wandb is not None:
            self._wandb.start(step, facts)
        self._close_tensorboard()
        self._tensorboard = ScalarsFile(self._run_dir / TENSORBOARD_DIRECTORY, step + 1)

    def rewind(self, step: int, **facts: Value) -> None:
        """Records that the process goes back to a step; later steps are superseded, as by `start`.

        Args:
            step: The step.
            **facts: What else there is to say.
        """
        self._append({"kind": "rollback", "step": step, "time": time.time(), **facts})
        self._close_tensorboard()
        self._tensorboard = ScalarsFile(self._run_dir / TENSORBOARD_DIRECTORY, step + 1)

    def write(self, kind: Kind, step: int, **values: Value) -> None:
        """Records values of one step.

        Args:
            kind: "train" (a step), "eval" (with `split` and `weights`), "event" (with `message`
                and `level`), "end" (of a process) or "summary" (the facts at the end of a run).
            step: The step they belong to, counted from 1; 0 is the state before training.
            **values: Numbers, strings, None, or one level of mappings or sequences of these.

        Raises:
            TypeError: For a value that is none of these, such as an array.
        """
        now = time.time()
        self._append({"kind": kind, "step": step, "time": now, **values})
        if self._tensorboard is None:
            self._tensorboard = ScalarsFile(self._run_dir / TENSORBOARD_DIRECTORY, None)
        prefix = f"{values.get('split')}_{values.get('weights')}" if kind == "eval" else kind
        scalars = [(f"{prefix}/{name}", value) for name, value in _scalars(values)]
        if not scalars:
            return
        self._tensorboard.add(step, now, scalars)
        if self._wandb is not None:
            self._wandb.write(step, scalars)

    def flush(self) -> None:
        """Waits until what was recorded is kept, or keeping it has failed."""
        self._file.flush()

    def close(self) -> None:
        """Closes all of them; a second call does nothing.

        Raises:
            UserError: The last records found no room.
        """
        if self._wandb is not None:
            self._wandb.close()
        try:
            self._close_tensorboard()
        finally:
            self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(UserError) if error else contextlib.nullcontext():
            self.close()  # Of two failures the first is the one to tell.

    def _append(self, record: Mapping[str, Value]) -> None:
        text = json.dumps(_encode(record, depth=0), ensure_ascii=False, allow_nan=False)
        # A lone surrogate (from an undecodable file name, say) has no UTF-8; keep it visible.
        self._file.append((text + "\n").encode("utf-8", errors="backslashreplace"))

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


class NoLog(contextlib.nullcontext[None]):
    """In place of a `MetricsLog` in processes that write none."""

    def flush(self) -> None:
        """Does nothing."""

    def start(self, step: int, **facts: Value) -> None:
        """Does nothing."""

    def rewind(self, step: int, **facts: Value) -> None:
        """Does nothing."""

    def write(self, kind: Kind, step: int, **values: Value) -> None:
        """Does nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """What one process of a run did, from its start record to its last record.

    Attributes:
        start: The start record.
        last_step: The last training step it recorded; its first step if it recorded none.
        seconds: From its start record to its last record.
        marks: Those of its records, in the order they were written, that say how it spent its time
            so far (`seconds`): of each only `kind`, `step`, `time` and `seconds`.
    """

    start: Row
    last_step: int
    seconds: float
    marks: tuple[Row, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunHistory:
    """A run as it counts: every step once, whatever was killed and repeated.

    Attributes:
        train: The train records, by step.
        eval: The eval records, by step; one for each step, split and weights.
        events: All event records in the order they happened, superseded steps included.
        segments: One for each process that worked on the run.
        summary: The last summary record since the last start; None while there is none.
        superseded: How many train and eval records a resume or a repetition replaced.
        unreadable_lines: Numbers (from 1) of the lines of the file that hold no record.
    """

    train: list[Row] = dataclasses.field(default_factory=list)
    eval: list[Row] = dataclasses.field(default_factory=list)
    events: list[Row] = dataclasses.field(default_factory=list)
    segments: list[Segment] = dataclasses.field(default_factory=list)
    summary: Row | None = None
    superseded: int = 0
    unreadable_lines: list[int] = dataclasses.field(default_factory=list)

    @property
    def starts(self) -> list[Row]:
        """The start records."""
        return [segment.start for segment in self.segments]

    @property
    def last_step(self) -> int:
        """The last training step that counts; 0 if there is none."""
        return self.train[-1]["step"] if self.train else 0

    def fact(self, name: str) -> Any:
        """The latest value of a fact of the summary or else of a start record, or None."""
        for record in [self.summary or {}, *reversed(self.starts)]:
            if record.get(name) is not None:
                return record[name]
        return None


def read_metrics(path: str | os.PathLike[str], most: int | None = None) -> RunHistory:
    """Reads a `metrics.jsonl`.

    Where a process started at step N, the train and eval records of later steps from before that
    start are superseded and left out. Lines that are no record (one torn by a power cut) are
    skipped and counted in `unreadable_lines`.

    Args:
        path: The file, or the run directory that holds it.
        most: About how many train records to read, spread evenly, the last ones all; None: every
            one. The other records are read whole.

    Raises:
        UserError: If there is no such file.
    """
    path = to_path(path)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        content = read_appended(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no metrics there; give the directory of a run") from error

    train: dict[int, Row] = {}
    evals: dict[tuple[Any, ...], Row] = {}
    events: list[Row] = []
    segments: list[Segment] = []
    marks: list[list[Row]] = []
    summary: Row | None = None
    superseded = 0
    unreadable = []
    for number, line in thinned(content.split(b"\n"), most):
        if not line.strip():
            continue
        row = _parse(line)
        if row is None:
            unreadable.append(number)
            continue
        step, kind = row["step"], row["kind"]
        if kind in ("start", "rollback"):
            before = len(train) + len(evals)
            train = {key: old for key, old in train.items() if key <= step}
            evals = {key: old for key, old in evals.items() if key[0] <= step}
            superseded += before - len(train) - len(evals)
            summary = None
        if kind == "start":
            segments.append(Segment(start=row, last_step=step, seconds=0.0))
            marks.append([])
        if segments:
            segment = segments[-1]
            if isinstance(row.get("seconds"), dict):
                marks[-1].append({key: row[key] for key in ("kind", "step", "time", "seconds")})
            segments[-1] = Segment(
                start=segment.start,
                last_step=max(segment.last_step, step) if kind == "train" else segment.last_step,
                seconds=max(segment.seconds, row["time"] - segment.start["time"]),
            )
        if kind == "train":
            superseded += step in train
            train[step] = row
        elif kind == "eval":
            key = (step, str(row.get("split")), str(row.get("weights")))
            superseded += key in evals
            evals[key] = row
        elif kind == "event":
            events.append(row)
        elif kind == "summary":
            summary = row
    return RunHistory(
        train=[train[step] for step in sorted(train)],
        eval=[evals[key] for key in sorted(evals)],
        events=events,
        segments=[
            dataclasses.replace(segment, marks=tuple(own))
            for segment, own in zip(segments, marks, strict=True)
        ],
        summary=summary,
        superseded=superseded,
        unreadable_lines=unreadable,
    )


def has_metrics(run_dir: Path) -> bool:
    """Whether a process of a run has recorded anything."""
    return has_appended(run_dir / FILE_NAME)


def placed_by_tokens(history: RunHistory) -> list[Row]:
    """The eval records, their `tokens` those of training at their step, not their own."""
    steps = [row["step"] for row in history.train if "tokens" in row]
    tokens = [row["tokens"] for row in history.train if "tokens" in row]
    placed = []
    for row in history.eval:
        # Only some steps are recorded: the last one before it is close enough.
        place = bisect.bisect(steps, row["step"])
        placed.append({**row, "tokens": tokens[place - 1] if place else 0})
    return placed


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:  # also what is no UTF-8
        return None
    if not isinstance(row, dict) or row.get("kind") not in (
        "start",
        "train",
        "eval",
        "event",
        "rollback",
        "end",
        "summary",
    ):
        return None
    if not isinstance(row.get("step"), int) or not isinstance(row.get("time"), int | float):
        return None
    # A message is text whatever it says; everywhere else the three words stand for numbers.
    return {name: value if name == "message" else _decode(value) for name, value in row.items()}


def _decode(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {name: _decode(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value


def _encode(value: Any, depth: int) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if depth < 2 and isinstance(value, Mapping):
        return {str(name): _encode(item, depth + 1) for name, item in value.items()}
    if depth == 1 and isinstance(value, Sequence):
        return [_encode(item, depth + 1) for item in value]
    raise TypeError(
        f"a metrics record holds numbers, strings and one level of mappings or lists of these, "
        f"not {type(value).__name__}"
    )


def _scalars(values: Mapping[str, Value]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += [(f"{name}/{inner}", number) for inner, number in _scalars(value)]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((name, value))
    return found
