"""The batch of a step of a run, made again."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from t5g2.checkpoints.directory import saved_checkpoints
from t5g2.checkpoints.manifest import DamagedError
from t5g2.checkpoints.rollback import left_out, read_rollbacks
from t5g2.checkpoints.store import CHECKPOINTS_DIR, read_arrays, read_meta
from t5g2.data.batch import empty_batch, fill_rows
from t5g2.data.feed import is_left_out, number_of
from t5g2.data.packing import RowStream
from t5g2.data.resume import continued
from t5g2.errors import UserError
from t5g2.reporting.metrics_log import FILE_NAME, read_metrics

Cursors = Int[np.ndarray, "rows cursor"]


class MadeAgain(NamedTuple):
    """A batch of a run.

    Attributes:
        number: of the batch.
        cursors: of all rows before it.
        said: what there is to say of it, the examples of each row included.
    """

    number: int
    cursors: Cursors
    said: str


def make_again(run_dir: Path, rows: RowStream, *, step: int | None, batch: int | None) -> MadeAgain:
    """Makes the batch of a step, or the one of a number, again.

    Args:
        run_dir: of the run.
        rows: the run's rows of training data.
        step: the step; the batch is the one that it has after all rollbacks.
        batch: the number of the batch.

    Raises:
        UserError: it is none from 1 on, or the data is no longer what a bad step was fed.
    """
    gone = left_out(read_rollbacks(run_dir))
    what, number = ("--step", step) if batch is None else ("--batch", batch)
    if number is None or number < 1:
        raise UserError(f"{what} must be at least 1, not {number}")
    if batch is None:
        number = number_of(number, gone)
    at, cursors = _newest_before(run_dir, rows, number)
    for _ in range(at + 1, number):
        _, cursors = rows.cut_rows(0, cursors)
    made = empty_batch(rows.rows, *rows.room, rows.images)
    fill_rows(made, rows, 0, cursors)
    digest = f"{int(made['row_digest'].sum(dtype=np.uint32)):08x}"
    head = f"batch {number}, digest {digest}"
    if is_left_out(number, gone):
        head += "; left out of the run since a rollback"
    if (recorded := _recorded_digest(run_dir, number)) not in (None, digest):
        raise UserError(
            f"batch {number} cannot be made again: its digest is {digest}, but the run recorded "
            f"{recorded}; the documents, or how they are read, have changed since"
        )
    if recorded is not None:
        head += "; as the run recorded it"
    return MadeAgain(number, cursors, "\n".join([head, *_examples(rows, cursors)]))


def _newest_before(run_dir: Path, rows: RowStream, number: int) -> tuple[int, Cursors]:
    """A batch before the wanted one, and the cursors after it."""
    for checkpoint in reversed(saved_checkpoints(run_dir / CHECKPOINTS_DIR)):
        try:
            meta = read_meta(checkpoint.path)
            at = meta.get("batch", checkpoint.step)
            if at < number:
                cursors = np.asarray(read_arrays(checkpoint.path / "data")["cursors"], np.int32)
                return at, continued(cursors, meta.get("data"), rows).copy()
        except DamagedError:
            continue
    return 0, rows.start()


def _recorded_digest(run_dir: Path, number: int) -> str | None:
    """What the digest of a batch was when a bad step was fed it."""
    if not (run_dir / FILE_NAME).exists():
        return None
    events = read_metrics(run_dir).events
    digests = [event.get("batch_digest") for event in events if event.get("batch") == number]
    return digests[-1] if digests else None


def _examples(rows: RowStream, cursors: Cursors) -> list[str]:
    """A line for each row: source, document and tokens of each example in it."""
    cuts, _ = rows.cut_rows(0, cursors)
    lines = []
    for row in range(rows.rows):
        own = cuts.of_rows(row, row + 1)
        tasks = [rows.tasks[number] for number in own.task.tolist()]
        stops = (own.start + own.length).tolist()
        examples = [
            f"{rows.mixture.sources[task.source].name} {document} [{start}:{stop}] "
            f"{task.denoiser.name}"
            for task, document, start, stop in zip(
                tasks, own.document.tolist(), own.start.tolist(), stops, strict=True
            )
        ]
        lines.append(f"row {row}: {'; '.join(examples)}")
    return lines
