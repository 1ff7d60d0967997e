"""Where a run starts from: its newest sound checkpoint, or the beginning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Int

from t5g2.activity import Activity
from t5g2.checkpoints.directory import has_checkpoint
from t5g2.checkpoints.keeping import CheckpointStore
from t5g2.checkpoints.rollback import read_rollbacks, remove_abandoned
from t5g2.checkpoints.store import package_versions, read_meta
from t5g2.data.corpus import FACTS_FILE, TOKENIZER_DIR, Corpus
from t5g2.data.packing import RowStream
from t5g2.data.resume import continued, describe_cursors
from t5g2.errors import UserError
from t5g2.files import is_remote
from t5g2.initialization import make_first_state
from t5g2.reporting.progress import Progress
from t5g2.run_lock import LOCK_FILE
from t5g2.settings import CONFIG_FILE, Settings, model_to_json
from t5g2.training.metrics import Totals
from t5g2.training.schedule import warmup_steps
from t5g2.training.state import TrainState


class Position(NamedTuple):
    """Where a run stands.

    Attributes:
        step: steps done.
        state: after them.
        cursors: of the data's rows after them.
        totals: what was counted in them.
        batch: number of the last batch.
        guard: what `Guard.state` was, or None at the beginning.
    """

    step: int
    state: TrainState
    cursors: Int[np.ndarray, "rows cursor"]
    totals: Totals
    batch: int
    guard: Mapping[str, Any] | None


def start_or_restore(
    settings: Settings,
    run_dir: Path,
    store: CheckpointStore,
    rows: RowStream,
    optimizer: optax.GradientTransformation,
    shapes: TrainState,
    shardings: TrainState,
    progress: Progress,
    activity: Activity,
) -> Position:
    """Restores the newest checkpoint that verifies and was not rolled back, or begins at step 0."""
    remove_abandoned(store, read_rollbacks(run_dir))
    saved = None
    with activity.during("restore"):
        if has_checkpoint(store.directory):
            with progress.stage("verifying the newest checkpoint"):
                saved = store.newest_sound()
        if saved is not None:
            with progress.stage(f"restoring step {saved}"):
                state, cursors = store.restore(saved, shapes, shardings)
                meta = read_meta(store.path(saved))
            cursors = continued(cursors, meta.get("data"), rows)
            batch = meta.get("batch", saved)
            return Position(saved, state, cursors, Totals.of(meta), batch, meta.get("guard"))
    with progress.stage("initialising"):
        state = make_first_state(settings, optimizer, shardings)
    return Position(0, state, rows.start(), Totals(), 0, None)


def check_run_dir(run_dir: Path) -> None:
    """Refuses a directory that cannot be, or become, the run's.

    Raises:
        UserError: it cannot be read, is a file, or holds something else.
    """
    if not is_remote(run_dir) and run_dir.parts[:1] == ("gs:",):
        raise UserError(f"{run_dir}: pathlib took a slash of it; t5g2.files.to_path does not")
    try:
        if run_dir.exists() and not run_dir.is_dir():
            raise UserError(f"--run_dir {run_dir} is a file")
        names = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    except OSError as error:
        raise UserError(f"--run_dir {run_dir} cannot be read: {error.strerror}") from error
    if names and not names & {LOCK_FILE, CONFIG_FILE, FACTS_FILE, TOKENIZER_DIR}:
        raise UserError(f"--run_dir {run_dir} is not empty and holds no run: name another one")


def shorter_warmup(settings: Settings) -> str | None:
    """Says that the run's warm-up is shorter than its setting; None if it is not."""
    total, asked = settings.train.total_steps, settings.schedule.warmup_steps
    warmup = warmup_steps(settings.schedule, total)
    if warmup >= asked:
        return None
    return f"warm-up: {warmup} steps, a tenth of this run's {total}, instead of {asked}"


def run_facts(
    settings: Settings, corpus: Corpus, rows: RowStream, shapes: TrainState, mesh: Mesh
) -> dict[str, Any]:
    """What a start record says of a run."""
    shares = zip((task.name for task in rows.tasks), rows.mixture.rates.tolist(), strict=True)
    return {
        "total_steps": settings.train.total_steps,
        "parameters": sum(x.size for x in jax.tree.leaves(shapes.params)),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "mesh": dict(mesh.shape),
        "clip_norm": settings.optimizer.clip_norm,
        "config_hash": settings.hash(),
        "versions": package_versions(),
        "unigram_entropy": corpus.facts["unigram_entropy"],
        "corpus": corpus.counts(),
        **corpus.counts_by_source(),
        "data_shares": dict(shares),
    }


def checkpoint_meta(settings: Settings, rows: RowStream, totals: Totals) -> dict[str, Any]:
    """What a checkpoint of a run says of the run."""
    return {
        **totals._asdict(),
        "data": describe_cursors(rows),
        "model": model_to_json(settings.model),
        "settings": settings.to_json(),
        "config_hash": settings.hash(),
        "tokenizer": f"../../{TOKENIZER_DIR}",
        "versions": package_versions(),
    }


def check_sizes(settings: Settings, corpus: Corpus) -> None:
    """Refuses a model or a batch that does not suit the corpus.

    Raises:
        UserError: too small a vocabulary, or fewer tokens than a batch has.
    """
    vocab_size = corpus.tokenizer.vocab_size
    if vocab_size > settings.model.vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens but model.vocab_size is "
            f"{settings.model.vocab_size}: raise it, or lower tokenizer.vocab_size"
        )
    tokens = corpus.facts["train"]["tokens"]
    batch = settings.rows * (settings.data.inputs_length + settings.data.targets_length)
    if tokens < batch:
        raise UserError(
            f"corpus.path: {tokens:,} training tokens are less than one batch of {batch:,}: add "
            "text, or lower train.rows (train.tokens_per_batch) or the sequence lengths"
        )
