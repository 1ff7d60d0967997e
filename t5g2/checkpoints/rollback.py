"""Going back to an earlier checkpoint, remembered in the run directory before it is done.

`rollbacks.json` lists what a run went back from. Batches that it names are never trained on again,
from whichever checkpoint the run goes on; a checkpoint that a rollback passed over is no longer one
of the run. So whatever kills a run amid a rollback, the same command completes it.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5g2.checkpoints.keeping import CheckpointStore
from t5g2.checkpoints.manifest import DamagedError
from t5g2.checkpoints.store import read_meta
from t5g2.files import write_atomically
from t5g2.parallel import hosts

ROLLBACKS_FILE = "rollbacks.json"


class Rollback(NamedTuple):
    """A return to a checkpoint.

    Attributes:
        back_to: its step; 0: the beginning of the run.
        first: number of the first batch that is left out from then on.
        last: and of the last.
    """

    back_to: int
    first: int
    last: int


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """The rollbacks of a run, in their order."""
    path = run_dir / ROLLBACKS_FILE
    return [Rollback(**entry) for entry in json.loads(path.read_text())] if path.exists() else []


def left_out(rollbacks: Sequence[Rollback]) -> list[tuple[int, int]]:
    """First and last numbers of the batches that are never trained on."""
    return [(rollback.first, rollback.last) for rollback in rollbacks]


def roll_back(
    run_dir: Path,
    store: CheckpointStore,
    first: int,
    last: int,
    *,
    bad_step: int,
    checkpoints: int,
    most: int,
) -> Rollback | None:
    """Decides, in all processes alike, which checkpoint a run goes back to, and remembers it.

    Args:
        run_dir: of the run.
        store: its checkpoints; what is being saved is waited for.
        first: number of the first batch to leave out.
        last: and of the last.
        bad_step: the first step that went wrong.
        checkpoints: how many checkpoints to go back; the oldest one if there are fewer.
        most: how many rollbacks in a row may go to the same checkpoint.

    Returns:
        The rollback; None, and nothing is done, if there were too many.
    """
    store.wait()
    steps = [checkpoint.step for checkpoint in store.saved() if checkpoint.step < bad_step]
    back_to = steps[-checkpoints:][0] if steps else 0
    if jax.process_count() > 1:
        back_to = int(multihost_utils.broadcast_one_to_all(np.int32(back_to)))
    before = read_rollbacks(run_dir)
    same = itertools.takewhile(lambda rollback: rollback.back_to == back_to, reversed(before))
    if sum(1 for _ in same) >= most:
        return None
    rollback = Rollback(back_to, first, last)
    hosts.barrier("rollbacks read")
    if hosts.is_first():
        text = json.dumps([entry._asdict() for entry in [*before, rollback]], indent=1)
        write_atomically(run_dir / ROLLBACKS_FILE, text)
    hosts.barrier("rollback remembered")
    return rollback


def remove_abandoned(store: CheckpointStore, rollbacks: Sequence[Rollback]) -> None:
    """Removes the checkpoints of a run that a rollback passed over."""
    if hosts.is_first() and rollbacks:
        for checkpoint in reversed(store.saved()):
            try:
                known = read_meta(checkpoint.path).get("rollbacks", 0)
            except DamagedError:
                continue  # It will be set aside.
            if any(rollback.back_to < checkpoint.step for rollback in rollbacks[known:]):
                store.remove(checkpoint)
    hosts.barrier("abandoned checkpoints removed")
