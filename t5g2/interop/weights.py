"""Named tensors in safetensors files, one file or several with an index; read and written in turn.

The format: eight bytes of header length (little endian), a JSON header that gives each tensor's
dtype, shape and byte range, then the tensors' bytes.
"""

import concurrent.futures
import functools
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from t5g2.errors import UserError
from t5g2.files import local_copy
from t5g2.lazy_array import LazyArray, read_in_turn

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The format's spelling of a dtype, and numpy's. Weights are of the first three.
_DTYPES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BOOL": "bool",
    **{
        f"{kind}{bits}": f"{name}{bits}"
        for kind, name in (("I", "int"), ("U", "uint"))
        for bits in (8, 16, 32, 64)
    },
}
# Written before the disk is asked to keep them.
_SYNC_BYTES = 64 << 20
_CODES = {jnp.dtype(name): code for code, name in _DTYPES.items()}


def write_weights(directory: Path, tensors: Mapping[str, LazyArray], max_shard_bytes: int) -> None:
    """Writes `tensors` to `model.safetensors`, or to shards and their index if they are larger.

    Args:
        directory: where to.
        tensors: by name; each is read once and let go.
        max_shard_bytes: size that no file's tensors exceed, unless one tensor alone does.
    """
    sizes = {name: _bytes(tensor) for name, tensor in tensors.items()}
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
        _write_file(directory / file, {name: tensors[name] for name in names})


def _write_file(path: Path, tensors: Mapping[str, LazyArray]) -> None:
    # Readers for PyTorch want to be told that the tensors are its kind.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _bytes(tensor)
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the tensors start aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        # The disk works while tensors are made, not after them.
        with concurrent.futures.ThreadPoolExecutor(1) as disk:
            synced, unsynced = disk.submit(lambda: None), 0
            for array in read_in_turn([_contiguous(tensor) for tensor in tensors.values()]):
                file.write(array.reshape(-1).view(np.uint8).data)
                unsynced += array.nbytes
                if unsynced >= _SYNC_BYTES:
                    file.flush()
                    synced.result()
                    synced, unsynced = disk.submit(os.fdatasync, file.fileno()), 0
            synced.result()
        file.flush()
        os.fsync(file.fileno())


def _contiguous(tensor: LazyArray) -> LazyArray:
    """The same, read as it is written."""
    return LazyArray(
        tensor.shape,
        tensor.dtype,
        lambda: np.ascontiguousarray(tensor.read(), dtype=tensor.dtype),
    )


def _bytes(tensor: LazyArray) -> int:
    return tensor.dtype.itemsize * math.prod(tensor.shape)


def open_weights(directory: Path) -> dict[str, LazyArray]:
    """The tensors of a directory's safetensors file or shards, by name; none is read yet.

    Raises:
        UserError: no such file, a shard is missing, or a file is damaged.
    """
    tensors: dict[str, LazyArray] = {}
    for path in _files(local_copy(directory)):
        try:
            with safe_open(path, "numpy"):
                pass  # It checks that header and file agree.
            tensors |= _tensors(path)
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: copy the whole directory again") from error
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): copy it again") from error
    return tensors


def _tensors(path: Path) -> dict[str, LazyArray]:
    """The tensors of a file whose header is known to be sound."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            # A dtype of a later version of the format reads as void, which nothing accepts.
            dtype = jnp.dtype(_DTYPES.get(entry["dtype"], "V1"))
            shape, offset = tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            read = functools.partial(_read, path, offset, shape, dtype)
            tensors[name] = LazyArray(shape, dtype, read)
    return tensors


def _read(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Shaped[np.ndarray, "..."]:
    # Not by mapping the file, whose pages would stay in memory for as long as there is room.
    return np.fromfile(path, dtype, math.prod(shape), offset=offset).reshape(shape)


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
