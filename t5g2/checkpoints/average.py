"""The mean of several checkpoints' parameters (arXiv:2512.14856, section 3: the last five)."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5g2.checkpoints.store import read_arrays, read_meta, write_parameters
from t5g2.errors import UserError
from t5g2.files import new_directory
from t5g2.models.t5gemma2 import split_frozen


def average(checkpoints: Sequence[Path]) -> tuple[Any, dict[str, Any]]:
    """Mean of the parameters, summed in float32, and the metadata of the result.

    Args:
        checkpoints: directories of checkpoints of one run.

    Returns:
        Parameters as numpy arrays; metadata of the last checkpoint with `averaged_steps`.

    Raises:
        UserError: no checkpoint, or checkpoints of different configurations.
    """
    if not checkpoints:
        raise UserError("no checkpoints to average")
    metas = [read_meta(path) for path in checkpoints]
    for path, meta in zip(checkpoints, metas, strict=True):
        if meta["model"] != metas[0]["model"]:
            raise UserError(f"{path} and {checkpoints[0]} hold different models: cannot average")
    total: Any = None
    # In the order of steps, whichever order they are named in: float sums depend on it.
    order = sorted(range(len(metas)), key=lambda i: metas[i]["step"])
    for i in order:
        params = read_arrays(checkpoints[i] / "params")
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
        total = params if total is None else jax.tree.map(np.add, total, params)
    # What is frozen is the same in all; its mean would be rounded.
    _, frozen = split_frozen(params)
    mean = {**jax.tree.map(lambda x: x / np.float32(len(metas)), total), **frozen}
    steps = [metas[i]["step"] for i in order]
    return mean, {**metas[order[-1]], "averaged_steps": steps}


def write_average(checkpoints: Sequence[Path], out: Path) -> Any:
    """Writes the average as a checkpoint that stands alone, tokenizer included.

    Returns:
        The averaged parameters, numpy arrays.

    Raises:
        UserError: `out` is taken, or the checkpoints do not go together.
    """
    with new_directory(out) as partial:
        params, meta = average(checkpoints)
        write_parameters(partial, params, {**meta, "tokenizer": "tokenizer"})
        shutil.copytree(checkpoints[-1] / meta["tokenizer"], partial / "tokenizer")
    return params
