"""Checkpoints on disk: Orbax writes the arrays, a JSON file says what they are.

A checkpoint is a directory with `params/`, `meta/` and a manifest; those that training can resume
from also hold `optimizer/` and `data/`. What is read is verified first, see `manifest`.
"""

import asyncio
import concurrent.futures
import contextlib
import errno
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
from jaxtyping import Shaped

from t5g2.checkpoints.manifest import FORMAT, MANIFEST, check_format, verify, write_manifest
from t5g2.errors import UserError
from t5g2.files import is_remote
from t5g2.lazy_array import LazyArray, read_in_turn

CHECKPOINTS_DIR = "checkpoints"  # in a run directory

# What is written at a time of a checkpoint of parameters alone, one file; Orbax's default is 2 GB.
# And how many of them: each waits until the disk has it, and the disk waits if they are few.
_CHUNK_BYTES = 32 << 20
_CHUNKS_AT_ONCE = 8


def package_versions() -> dict[str, str]:
    """The versions, for a checkpoint's metadata, of the packages that wrote it."""
    names = ("t5g2", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names}


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
    """The arrays below one item of a checkpoint (`.../params`), as a tree of numpy arrays.

    Raises:
        DamagedError: a file is not what was written.
    """
    verify(item.parent, item.name)
    with _tree_checkpointer() as checkpointer:
        structure = checkpointer.metadata(item.absolute()).item_metadata.tree
        return checkpointer.restore(
            item.absolute(), args=ocp.args.PyTreeRestore(restore_args=_as_numpy(structure))
        )


def open_arrays(item: Path) -> Any:
    """As `read_arrays`, but as lazy arrays, each of which is read when it is asked for.

    Raises:
        DamagedError: a file is not what was written.
    """
    verify(item.parent, item.name)
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
        DamagedError: a file of these facts is not what was written.
        UserError: it is no checkpoint, or one of a newer format.
    """
    path = checkpoint / "meta" / "metadata"
    if not (checkpoint / MANIFEST).is_file() and not path.is_file():
        runs_own = checkpoint / CHECKPOINTS_DIR
        hint = f": it is a run; its checkpoints are in {runs_own}" if runs_own.is_dir() else ""
        raise UserError(f"{checkpoint} is not a t5g2 checkpoint{hint}")
    verify(checkpoint, "meta")
    meta = json.loads(path.read_text())
    check_format(checkpoint, meta["format"])
    if "model" not in meta:  # Written before checkpoints could come from anything but a run.
        meta["model"] = meta["settings"]["model"]
    return meta


def write_parameters(checkpoint: Path, params: Any, meta: Mapping[str, Any]) -> None:
    """Writes a checkpoint of parameters alone into a directory, and the manifest of all it holds.

    Args:
        checkpoint: the directory, with the tokenizer if it is to have one.
        params: numpy or lazy arrays; lazy ones are read in turn (see `read_in_turn`).
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
        # Weights hardly get smaller (random bfloat16 by a fifth), and zstd is slower than a disk.
        params=ocp.PyTreeCheckpointHandler(
            type_handler_registry=registry, multiprocessing_options=alone, use_compression=False
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
        except ValueError as error:
            if (cause := as_os_error(error, checkpoint)) is None:
                raise
            raise cause from error
        finally:
            one_by_one.stopped = True
    for part in saved.iterdir():
        part.rename(checkpoint / part.name)
    saved.rmdir()
    write_manifest(checkpoint, manifest_facts(meta, {"params": params}))


def manifest_facts(meta: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says besides checksums.

    Args:
        meta: what the checkpoint says of itself.
        arrays: by item, trees of anything with a shape and a dtype.

    Returns:
        `step`, `config_hash`, `digest` (of the data) and `versions`; dtype and shape of each array.
    """
    facts = {name: meta.get(name) for name in ("step", "config_hash", "digest", "versions")}
    described = {
        jax.tree_util.keystr(path, simple=True, separator="/"): [str(x.dtype), list(x.shape)]
        for path, x in jax.tree_util.tree_leaves_with_path(dict(arrays))
    }
    return {**facts, "arrays": described}


def as_os_error(error: ValueError, path: Path) -> OSError | None:
    """What TensorStore, whose every error is a ValueError, reports of the system or a bucket."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code is None and is_remote(path):
        return OSError(errno.EIO, " ".join(str(error).split()), str(path))
    if code is None:
        return None
    return OSError(int(code[1]), os.strerror(int(code[1])), str(path))


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes arrays one after the other, and of each one a few chunks at a time.

    An array is read when its turn comes near, and let go. Once writing has failed or was stopped,
    nothing goes on in the background: the directory can be removed.
    """

    stopped = False

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
        with contextlib.closing(read_in_turn(values)) as arrays:
            for value, info, arg in zip(arrays, infos, args, strict=True):
                (written,) = await super().serialize([value], [info], [arg])
                written.result()
                del written, value  # they hold the array
        return []

    async def _open_and_write(self, value: Any, tspec: Any, ts_context: Any) -> None:
        store = await tensorstore.open(
            tensorstore.Spec(tspec), create=True, open=True, context=ts_context
        )
        chunks: Any = store.chunk_layout.write_chunk.shape
        sizes = list(zip(value.shape, chunks, strict=True))
        starts = itertools.product(*(range(0, size, chunk) for size, chunk in sizes))

        async def write() -> None:
            for start in starts:  # The others take theirs from it, too.
                if self.stopped:
                    raise InterruptedError
                region = tuple(
                    slice(i, min(i + chunk, size))
                    for i, (size, chunk) in zip(start, sizes, strict=True)
                )
                await store[region].write(value[region])

        ends = await asyncio.gather(
            *(write() for _ in range(_CHUNKS_AT_ONCE)), return_exceptions=True
        )
        for error in filter(None, ends):
            raise error


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
