"""Checkpoints on disk: Orbax writes the arrays, a JSON file says what they are.

A checkpoint is a directory with `params/` and `meta/`; those that training can resume from also
hold `optimizer/` and `data/`.
"""

import dataclasses
import importlib.metadata
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Int

from t5g2.errors import UserError
from t5g2.training.state import TrainState

FORMAT = 1
CHECKPOINTS_DIR = "checkpoints"  # in a run directory


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept.

    Attributes:
        every: steps between two checkpoints.
        keep: the newest so many are kept.
    """

    every: int = 1000
    keep: int = 10

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError("every and keep must be at least 1")


class CheckpointStore:
    """The checkpoints of a run, by step; writes in the background.

    A context manager: leaving it waits for the last write.
    """

    def __init__(self, directory: Path, keep: int | None = None) -> None:
        """Opens `directory`, a checkpoint per step below it; `keep` None prunes nothing."""
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_names=("params", "optimizer", "data", "meta"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=keep is not None, enable_async_checkpointing=True
            ),
        )

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> Path:
        """Directory of a step's checkpoint."""
        return self.directory / str(step)

    def save(
        self,
        state: TrainState,
        cursors: Int[jax.Array, "rows cursor"],
        meta: Mapping[str, Any],
    ) -> None:
        """Saves the state of a step; returns once the arrays have left the devices."""
        step = int(jax.device_get(state.step))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(_optimizer_item(state)),
                data=ocp.args.StandardSave({"cursors": cursors}),
                meta=ocp.args.JsonSave({"format": FORMAT, "step": step, **meta}),
            ),
        )

    def wait(self) -> None:
        """Waits until what was saved is on disk."""
        self._manager.wait_until_finished()

    def restore(
        self, step: int, shapes: TrainState, shardings: TrainState
    ) -> tuple[TrainState, Int[np.ndarray, "rows cursor"]]:
        """State and data cursors of a step, the state laid out as `shardings` say."""
        target = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(target.params),
                optimizer=ocp.args.StandardRestore(_optimizer_item(target)),
            ),
        )
        optimizer = restored.optimizer
        state = TrainState(optimizer["step"], restored.params, optimizer["opt_state"])
        return state, np.asarray(read_arrays(self.path(step) / "data")["cursors"], np.int32)


def has_checkpoint(directory: Path) -> bool:
    """Whether a run's directory of checkpoints holds a finished one; nothing is opened."""
    return directory.is_dir() and any(path.name.isdigit() for path in directory.iterdir())


def package_versions() -> dict[str, str]:
    """The versions, for a checkpoint's metadata, of the packages that wrote it."""
    names = ("t5g2", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state}


def read_arrays(item: Path) -> Any:
    """The arrays below one item of a checkpoint (`.../params`), as a tree of numpy arrays."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        structure = checkpointer.metadata(item.absolute()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
        return checkpointer.restore(
            item.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy)
        )


def array_shapes(item: Path) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, shape and number of elements of each array of an item, none of which is read."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(item.absolute()).item_metadata.tree
    return [
        (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            array.shape,
            math.prod(array.shape),
        )
        for path, array in jax.tree_util.tree_leaves_with_path(tree)
    ]


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Every checkpoint has `format`, `step`, `model` (`t5g2.settings.model_of` reads it), `tokenizer`
    (where it is, from the checkpoint), `versions` and the run's `Totals`; one that a run made also
    `settings` and `config_hash`, an imported one `imported_from`, an average `averaged_steps`.

    Raises:
        UserError: it is no checkpoint, or one of a newer format.
    """
    path = checkpoint / "meta" / "metadata"
    if not path.is_file() or not (checkpoint / "params").is_dir():
        runs_own = checkpoint / CHECKPOINTS_DIR
        hint = f": it is a run; its checkpoints are in {runs_own}" if runs_own.is_dir() else ""
        raise UserError(f"{checkpoint} is not a t5g2 checkpoint{hint}")
    meta = json.loads(path.read_text())
    if meta["format"] > FORMAT:
        raise UserError(
            f"{checkpoint} has checkpoint format {meta['format']}; this t5g2 reads up to {FORMAT}"
        )
    if "model" not in meta:  # Written before checkpoints could come from anything but a run.
        meta["model"] = meta["settings"]["model"]
    return meta


def write_parameters(checkpoint: Path, params: Any, meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint of parameters alone into an empty directory."""
    checkpoint.rmdir()  # Orbax insists on making it.
    handler = ocp.CompositeCheckpointHandler("params", "meta")
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            checkpoint.absolute(),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                meta=ocp.args.JsonSave({"format": FORMAT, **meta}),
            ),
        )
