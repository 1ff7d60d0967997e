"""Named tensors in safetensors files, one file or several with an index; one at a time in memory.

The format: eight bytes of header length (little endian), a JSON header that gives each tensor's
dtype, shape and byte range, then the tensors' bytes.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from t5g2.errors import UserError
from t5g2.interop.hf_config import WeightDtype

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_CODES: Mapping[WeightDtype, str] = {"float32": "F32", "bfloat16": "BF16"}


class Tensor(NamedTuple):
    """A tensor that is made or read when it is asked for.

    Attributes:
        shape: its shape.
        read: returns it, as an array of floats.
        kind: its dtype in the file's spelling, for a tensor that is in a file.
    """

    shape: tuple[int, ...]
    read: Callable[[], Float[np.ndarray, "..."]]
    kind: str = ""


def write_weights(
    directory: Path, tensors: Mapping[str, Tensor], dtype: WeightDtype, max_shard_bytes: int
) -> None:
    """Writes `tensors` to `model.safetensors`, or to shards and their index if they are larger.

    Args:
        directory: where to.
        tensors: by name; each is read once and let go.
        dtype: dtype on disk.
        max_shard_bytes: size that no file's tensors exceed, unless one tensor alone does.
    """
    width = jnp.dtype(dtype).itemsize
    sizes = {name: width * math.prod(tensor.shape) for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        files = [SINGLE]
    else:
        files = [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {
                name: file for file, names in zip(files, shards, strict=True) for name in names
            },
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for file, names in zip(files, shards, strict=True):
        _write_file(directory / file, {name: tensors[name] for name in names}, dtype)


def _write_file(path: Path, tensors: Mapping[str, Tensor], dtype: WeightDtype) -> None:
    numpy_dtype = jnp.dtype(dtype)
    # Readers for PyTorch want to be told that the tensors are its kind.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + numpy_dtype.itemsize * math.prod(tensor.shape)
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the tensors start aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            array = np.ascontiguousarray(tensor.read(), dtype=numpy_dtype)
            file.write(array.view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def open_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of a directory's safetensors file or shards, by name; none is read yet.

    Raises:
        UserError: no such file, a shard is missing, or a file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(directory):
        try:
            file = safe_open(path, "numpy")
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                shape = tuple(part.get_shape())
                tensors[name] = Tensor(shape, _reader(file, name), part.get_dtype())
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: copy the whole directory again") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): copy it again") from error
    return tensors


def _reader(file: Any, name: str) -> Callable[[], np.ndarray]:
    return lambda: file.get_tensor(name)


def _files(directory: Path) -> Iterable[Path]:
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    index = directory / INDEX
    if not index.exists():
        raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}: no weights to read")
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({error!r}): copy it again") from error
    return [directory / name for name in sorted(names)]
