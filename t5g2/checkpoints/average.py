"""The mean of several checkpoints' parameters (arXiv:2512.14856, section 3: the last five)."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Shaped

from t5g2 import settings
from t5g2.checkpoints.store import open_arrays, read_meta, write_parameters
from t5g2.config import differences
from t5g2.errors import UserError
from t5g2.files import local_copy, new_directory
from t5g2.lazy_array import LazyArray
from t5g2.models.t5gemma2 import split_frozen

SumDtype = Literal["float32", "float64"]

# A run may go on with other data, if it is told to; it stays that run.
_OF_THE_DATA = ("corpus.", "data.", "train.rows:")


def average(
    checkpoints: Sequence[Path], sum_dtype: SumDtype = "float32"
) -> tuple[Any, dict[str, Any]]:
    """Mean of the parameters, and the metadata of the result.

    Args:
        checkpoints: directories of checkpoints of one run.
        sum_dtype: what is summed in; the mean is float32.

    Returns:
        Parameters as lazy arrays: making one takes the memory of two, or three in float64.
        Metadata of the last checkpoint with `averaged_steps`.

    Raises:
        DamagedError: a checkpoint's files are not what was written.
        UserError: no checkpoint, or checkpoints of different configurations.
    """
    if not checkpoints:
        raise UserError("no checkpoints to average")
    metas = {path: read_meta(path) for path in checkpoints}
    # In the order of steps, whichever order they are named in: float sums depend on it.
    order = sorted(checkpoints, key=lambda path: metas[path]["step"])
    for path in order[1:]:
        _check_same(order[0], path, metas)
    trees = [open_arrays(path / "params") for path in order]
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in trees]
    for path, other in zip(order, shapes, strict=True):
        if other != shapes[0]:
            raise UserError(f"{path} and {order[0]} hold arrays of other shapes: cannot average")

    def mean(*arrays: LazyArray) -> LazyArray:
        def read() -> Shaped[np.ndarray, "..."]:
            total = np.array(arrays[0], sum_dtype)
            for array in arrays[1:]:
                total += np.asarray(array)
            total /= len(arrays)
            return total.astype(np.float32, copy=False)

        return LazyArray(arrays[0].shape, np.dtype(np.float32), read)

    trained = [split_frozen(tree)[0] for tree in trees]
    # What is frozen is the same in all; its mean would be rounded.
    _, frozen = split_frozen(trees[-1])
    steps = [metas[path]["step"] for path in order]
    return (
        {**jax.tree.map(mean, *trained), **frozen},
        {**metas[order[-1]], "averaged_steps": steps},
    )


def write_average(checkpoints: Sequence[Path], out: Path, sum_dtype: SumDtype = "float32") -> None:
    """Writes the average as a checkpoint that stands alone, tokenizer included.

    Array by array: the memory it takes is that of a few of the largest.

    Raises:
        DamagedError: a checkpoint's files are not what was written.
        UserError: `out` is taken, or the checkpoints do not go together.
    """
    with new_directory(out) as partial:
        params, meta = average(checkpoints, sum_dtype)
        shutil.copytree(local_copy(checkpoints[-1] / meta["tokenizer"]), partial / "tokenizer")
        write_parameters(partial, params, {**meta, "tokenizer": "tokenizer"})


def _check_same(one: Path, other: Path, metas: dict[Path, dict[str, Any]]) -> None:
    """Refuses checkpoints of two models or of two runs."""
    first, second = metas[one], metas[other]
    if second["model"] != first["model"]:
        raise UserError(f"{other} and {one} hold different models: cannot average")
    changed = differences(
        first.get("settings", {}), second.get("settings", {}), ignore=settings.MAY_CHANGE
    )
    changed = [change for change in changed if not change.startswith(_OF_THE_DATA)]
    if changed:
        raise UserError(
            f"{other} and {one} are of different runs ({'; '.join(changed)}): cannot average"
        )
