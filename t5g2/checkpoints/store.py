"""Checkpoints on disk: Orbax writes the arrays, a JSON file says what they are.

A checkpoint is a directory with `params/` and `meta/`; those that training can resume from also
hold `optimizer/` and `data/`.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jaxtyping import Int, Shaped

from t5g2.errors import UserError
from t5g2.lazy_array import LazyArray
from t5g2.training.state import TrainState

FORMAT = 1
CHECKPOINTS_DIR = "checkpoints"  # in a run directory

# What is compressed and written at a time of a checkpoint of parameters alone; Orbax's default is
# 2 GB.
_CHUNK_BYTES = 64 << 20


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


def _by_one_process() -> ocp.options.MultiprocessingOptions:
    """Orbax's option for what a process reads or writes without the others of its run."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )


def _tree_checkpointer() -> ocp.Checkpointer:
    alone = _by_one_process()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def read_arrays(item: Path) -> Any:
    """The arrays below one item of a checkpoint (`.../params`), as a tree of numpy arrays."""
    with _tree_checkpointer() as checkpointer:
        structure = checkpointer.metadata(item.absolute()).item_metadata.tree
        return checkpointer.restore(
            item.absolute(), args=ocp.args.PyTreeRestore(restore_args=_as_numpy(structure))
        )


def open_arrays(item: Path) -> Any:
    """As `read_arrays`, but as lazy arrays, each of which is read when it is asked for."""
    with _tree_checkpointer() as checkpointer:
        structure = checkpointer.metadata(item.absolute()).item_metadata.tree

    def lazy(path: Any, array: Any) -> LazyArray:
        read = functools.partial(_read_one, item.absolute(), [entry.key for entry in path])
        return LazyArray(array.shape, np.dtype(array.dtype), read)

    return jax.tree_util.tree_map_with_path(lazy, structure)


def _read_one(item: Path, keys: list[str]) -> Shaped[np.ndarray, "..."]:
    wanted: Any = 0
    for key in reversed(keys):
        wanted = {key: wanted}
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=_as_numpy(wanted), partial_restore=True)
    with _tree_checkpointer() as checkpointer:
        (array,) = jax.tree.leaves(checkpointer.restore(item, args=args))
    return array


def _as_numpy(tree: Any) -> Any:
    return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)


def array_shapes(item: Path) -> list[tuple[str, tuple[int, ...], int]]:
    """Name, shape and number of elements of each array of an item, none of which is read."""
    with _tree_checkpointer() as checkpointer:
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
    """Writes a checkpoint of parameters alone into an empty directory.

    Args:
        checkpoint: the directory.
        params: numpy or lazy arrays; of lazy ones, one at a time is in memory.
        meta: what the checkpoint says of itself, see `read_meta`.

    Raises:
        OSError: no room, or another fault of the file system.
    """
    # Orbax insists on making its directory, and writes beside it first: within ours, of which
    # whoever made it disposes if this fails.
    saved = checkpoint / "saved"
    one_by_one = _OneByOne(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, one_by_one),
        (LazyArray, one_by_one),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # Orbax warns if it is missing.
    )
    alone = _by_one_process()
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
        params=ocp.PyTreeCheckpointHandler(
            type_handler_registry=registry, multiprocessing_options=alone
        ),
        meta=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    )
    items = ocp.args.Composite(
        params=ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=_CHUNK_BYTES),
        meta=ocp.args.JsonSave({"format": FORMAT, **meta}),
    )
    # In a thread, which an interrupt stops between two chunks and not amid Orbax.
    with (
        _silent_orbax(),
        ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer,
        concurrent.futures.ThreadPoolExecutor(1) as thread,
    ):
        saving = thread.submit(checkpointer.save, saved.absolute(), args=items)
        try:
            saving.result()
        except ValueError as error:  # TensorStore's, for all that goes wrong
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(checkpoint)) from error
        finally:
            one_by_one.stopped = True
    for part in saved.iterdir():
        part.rename(checkpoint / part.name)
    saved.rmdir()


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes arrays one after the other, and of each one chunk after the other.

    An array is read in its turn, and let go. Once writing has failed or was stopped, nothing goes
    on in the background: the directory can be removed.
    """

    stopped = False

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
        for value, info, arg in zip(values, infos, args, strict=True):
            (written,) = await super().serialize([np.asarray(value)], [info], [arg])
            written.result()
            del written  # it holds the array
        return []

    async def _open_and_write(self, value: Any, tspec: Any, ts_context: Any) -> None:
        store = await tensorstore.open(
            tensorstore.Spec(tspec), create=True, open=True, context=ts_context
        )
        chunks: Any = store.chunk_layout.write_chunk.shape
        sizes = list(zip(value.shape, chunks, strict=True))
        for start in itertools.product(*(range(0, size, chunk) for size, chunk in sizes)):
            if self.stopped:
                raise InterruptedError
            region = tuple(
                slice(i, min(i + chunk, size))
                for i, (size, chunk) in zip(start, sizes, strict=True)
            )
            await store[region].write(value[region])


@contextlib.contextmanager
def _silent_orbax() -> Iterator[None]:
    """Orbax logs the traceback of what it then raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
