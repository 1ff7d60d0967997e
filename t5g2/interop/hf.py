"""Export to, and load from, a Hugging Face directory of T5Gemma 2."""

import concurrent.futures
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Float

from t5g2.errors import UserError
from t5g2.files import new_directory, to_path
from t5g2.interop.hf_config import (
    WeightDtype,
    from_hf_config,
    generation_config,
    to_hf_config,
)
from t5g2.interop.hf_vision import minimal_vision_shapes
from t5g2.interop.names import TIED, VISION_PREFIXES, Name, canonical, names_of
from t5g2.interop.weights import open_weights, write_weights
from t5g2.lazy_array import LazyArray
from t5g2.models.config import ModelConfig
from t5g2.models.t5gemma2 import abstract_model, parameter_tree

MAX_SHARD_BYTES = 5_000_000_000
_LISTED = 20
_THREADS = 2  # that read and transpose layers; each has one in memory
_READABLE = ("float32", "bfloat16", "float16")

logger = logging.getLogger(__name__)


def export_hf(
    params: Mapping[str, Any],
    config: ModelConfig,
    out_dir: Path,
    *,
    dtype: WeightDtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Makes a directory that transformers' `T5Gemma2ForConditionalGeneration` loads.

    It is complete or absent, also when interrupted. One parameter at a time is in memory.
    transformers always builds a vision tower: a model without one is given the least
    (`MINIMAL_VISION`).

    Args:
        params: the parameters, structured as by `parameter_tree`; numpy, jax or lazy arrays.
        config: the model they belong to.
        out_dir: where to; must not exist, or be empty.
        dtype: dtype of the weights on disk (rounds to nearest even); None: each as it is.
        max_shard_bytes: above this, several files and an index are written.

    Raises:
        UserError: `out_dir` is taken, the parameters are not this model's, or transformers could
            not build it.
    """
    with new_directory(to_path(out_dir)) as partial:
        write_hf(params, config, partial, dtype=dtype, max_shard_bytes=max_shard_bytes)


def write_hf(
    params: Mapping[str, Any],
    config: ModelConfig,
    directory: Path,
    *,
    dtype: WeightDtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """As `export_hf`, into a directory that exists and that is the caller's to remove."""
    arrays = traverse_util.flatten_dict(params, sep="/")
    shapes = _shapes(config)
    wrong = [p for p in shapes | arrays if shapes.get(p) != getattr(arrays.get(p), "shape", None)]
    if wrong:
        raise UserError(f"the parameters do not fit the model's configuration: {_listed(wrong)}")
    hf_config = to_hf_config(config, dtype or arrays["embedder/table"].dtype.name)
    stack = _Latest(arrays)
    tensors = {
        key: LazyArray(
            name.disk_shape(_one(shapes[name.path], layer)),
            jnp.dtype(dtype or arrays[name.path].dtype),
            functools.partial(_to_disk, name, stack, layer),
        )
        for name in names_of(config)
        for layer, key in name.keys(config)
    }
    if config.vision is None:
        for key, shape in minimal_vision_shapes(config.hidden_size).items():
            zeros = functools.partial(np.zeros, shape)
            tensors[key] = LazyArray(shape, jnp.dtype(hf_config["dtype"]), zeros)
    for file, content in (
        ("config.json", hf_config),
        ("generation_config.json", generation_config(config)),
    ):
        (directory / file).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    write_weights(directory, tensors, max_shard_bytes)


def open_hf(path: Path, *, text_only: bool = False) -> tuple[ModelConfig, dict[str, Any]]:
    """Opens a T5Gemma 2 directory: released, or exported from here.

    Single file or shards; float32, bfloat16 or float16; names as on disk or as in torch's memory.

    Args:
        path: the directory.
        text_only: leave out the vision tower; a logged line says how many tensors it has.

    Returns:
        The configuration, and the parameters structured as by `parameter_tree`: lazy arrays of
        the dtypes on disk.

    Raises:
        UserError: no such directory, a configuration that t5g2 does not have, a damaged file, or
            tensors that are missing, unknown or of another shape (all of them named).
    """
    path = to_path(path)
    config = from_hf_config(read_hf_config(path), text_only=text_only)
    return config, _open_params(path, config)


def load_hf(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """What `open_hf` opens, as numpy arrays."""
    config, params = open_hf(path)
    return config, jax.tree.map(np.asarray, params)


def load_hf_params(path: Path, config: ModelConfig) -> dict[str, Any]:
    """The parameters of `load_hf`, of a directory whose configuration is known already."""
    return jax.tree.map(np.asarray, _open_params(path, config))


def _open_params(path: Path, config: ModelConfig) -> dict[str, Any]:
    stored = {canonical(key): tensor for key, tensor in open_weights(path).items()}
    if config.vision is None:
        placeholders = minimal_vision_shapes(config.hidden_size)
        stored = without_vision(path, stored, VISION_PREFIXES, placeholders)
    params = open_parameters(path, config, names_of(config), stored, TIED)
    return traverse_util.unflatten_dict(params, sep="/")


def without_vision(
    path: Path,
    stored: Mapping[str, LazyArray],
    prefixes: tuple[str, ...],
    placeholders: Mapping[str, tuple[int, ...]],
) -> dict[str, LazyArray]:
    """The tensors whose names have none of `prefixes`; the log says how many more there are.

    Args:
        path: the directory, for the log.
        stored: the tensors.
        prefixes: names of the image side's start so.
        placeholders: names and shapes of those that are not worth a line.
    """
    text = {key: tensor for key, tensor in stored.items() if not key.startswith(prefixes)}
    left_out = [
        key for key in stored if key not in text and stored[key].shape != placeholders.get(key)
    ]
    if left_out:
        logger.warning("%s: %d tensors of the image side are left out", path, len(left_out))
    return text


def open_parameters(
    path: Path,
    config: ModelConfig,
    names: Sequence[Name],
    stored: Mapping[str, LazyArray],
    tied: Mapping[str, str],
) -> dict[str, LazyArray]:
    """The parameters that `names` says where to find; several may be of one tensor.

    Args:
        path: the directory, for messages.
        config: the model.
        names: the parameters and their tensors.
        stored: the tensors that there are.
        tied: of those, the ones that need not be there, and the tensors they must equal.

    Returns:
        Parameter path to array, of the dtype on disk.

    Raises:
        UserError: naming every tensor that is missing, unknown or of another shape or kind.
    """
    shapes = _shapes(config)
    expected = {
        key: name.disk_shape(_one(shapes[name.path], layer))
        for name in names
        for layer, key in name.keys(config)
    }
    _check(path, expected, stored, tied)
    params = {}
    for name in names:
        tensors = {layer: stored[key] for layer, key in name.keys(config)}
        dtypes = [tensor.dtype for tensor in tensors.values()]
        dtype = functools.reduce(jnp.promote_types, dtypes)
        shape = shapes[name.path]
        read = functools.partial(_from_disk, name, tensors, shape, dtype)
        params[name.path] = LazyArray(shape, dtype, read)
    return params


def read_hf_config(path: Path) -> dict[str, Any]:
    """The content of a Hugging Face directory's `config.json`.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    file = path / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is not a Hugging Face model: it has no config.json") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object")
    return content


def _check(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, LazyArray],
    ties: Mapping[str, str],
) -> None:
    """Raises one UserError that names everything wrong with the tensors in a directory."""
    present = {key: tensor for key, tensor in stored.items() if key in expected}
    tied = {key: ties[key] for key in stored if key in ties}
    faults = {
        "missing": [key for key in expected if key not in present],
        "unexpected": [key for key in stored if key not in expected and key not in tied],
        "wrong shape": [
            f"{key} {list(tensor.shape)} instead of {list(expected[key])}"
            for key, tensor in present.items()
            if tensor.shape != expected[key]
        ],
        f"not {', '.join(_READABLE)}": [
            f"{key} {tensor.dtype.name}"
            for key, tensor in present.items()
            if tensor.dtype.name not in _READABLE
        ],
        "not equal to the tensor it is tied to": [
            key
            for key, source in tied.items()
            if source in present and not np.array_equal(stored[key].read(), present[source].read())
        ],
    }
    found = [f"{fault}: {_listed(keys)}" for fault, keys in faults.items() if keys]
    if found:
        raise UserError(f"{path} does not hold the weights of its config.json; {'; '.join(found)}")


def _listed(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    tree = traverse_util.flatten_dict(parameter_tree(abstract_model(config)), sep="/")
    return {path: leaf.shape for path, leaf in tree.items()}


def _one(shape: tuple[int, ...], layer: int | None) -> tuple[int, ...]:
    """Shape of one layer's tensor, given that of the parameter."""
    return shape if layer is None else shape[1:]


class _Latest:
    """Arrays by name, of which the one last read is kept: the layers of one are read in a row."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = arrays
        self._name, self._array = "", np.empty(0)

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        if name != self._name:
            self._array = np.empty(0)  # let go before the next one comes
            self._name, self._array = name, np.asarray(self._arrays[name])
        return self._array


def _to_disk(name: Name, stack: "_Latest", layer: int | None) -> Float[np.ndarray, "..."]:
    array = stack.read(name.path)
    return name.to_disk(array if layer is None else array[layer])


def _from_disk(
    name: Name,
    tensors: Mapping[int | None, LazyArray],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> Float[np.ndarray, "..."]:
    array = np.empty(shape, dtype)

    def fill(layer: int | None) -> None:
        name.from_disk(tensors[layer].read(), array if layer is None else array[layer])

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(fill, tensors):
            pass
    return array
