"""What a checkpoint's files must hold: written last, compared before anything is read.

`manifest.json` names every other file of the checkpoint with its size and CRC-32, and carries a
checksum of itself. The name of a checkpoint's directory is given to it once it has one.
"""

import concurrent.futures
import functools
import json
import logging
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from isal import isal_zlib

from t5g2.errors import UserError
from t5g2.files import write_atomically

FORMAT = 2  # of checkpoints; 1 had no manifest
MANIFEST = "manifest.json"

_META = "meta/metadata"
_BLOCK_BYTES = 1 << 20
_THREADS = min(8, os.cpu_count() or 1)
_NAMED = 3  # damaged files that a message names

logger = logging.getLogger(__name__)


class DamagedError(UserError):
    """A checkpoint's files are not what was written."""


class Verdict(NamedTuple):
    """What was compared with a checkpoint's manifest, and agrees.

    Attributes:
        files: number of files.
        size: their bytes.
    """

    files: int
    size: int


def write_manifest(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Writes the manifest of all that a directory holds, atomically.

    Args:
        checkpoint: the directory.
        facts: JSON values to keep with the checksums.

    Raises:
        OSError: of the file system.
    """
    names = sorted(
        path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()
    )
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        sums = list(threads.map(lambda name: _checksum(checkpoint / name), names))
    body = {"format": FORMAT, **facts, "files": dict(zip(names, sums, strict=True))}
    write_atomically(checkpoint / MANIFEST, _sealed(body))


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None for one of format 1, which has none.

    Raises:
        DamagedError: the manifest is damaged or missing.
        UserError: the checkpoint is of a newer format.
    """
    path = checkpoint / MANIFEST
    try:
        written = path.read_bytes()
    except FileNotFoundError:
        if _format_without_manifest(checkpoint) > 1:
            raise DamagedError(f"{path} is missing: the checkpoint is damaged") from None
        _warn_unverified(checkpoint)
        return None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from error
    try:
        body = json.loads(written)
        del body["checksum"]
        sound = _sealed(body) == written
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise DamagedError(f"{path} is damaged: its checksum differs")
    check_format(checkpoint, body["format"])
    return body


def verify(checkpoint: Path, item: str | None = None) -> Verdict | None:
    """Compares a checkpoint's files with its manifest.

    Args:
        checkpoint: its directory.
        item: compare only what lies below this directory of it (`params`); None: everything.

    Returns:
        What was compared; None if the checkpoint is of format 1, with nothing to compare.

    Raises:
        DamagedError: naming the files that are missing, or differ.
        UserError: the checkpoint is of a newer format.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return None
    files = {
        name: tuple(wanted)
        for name, wanted in manifest["files"].items()
        if item is None or name.startswith(f"{item}/")
    }
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda name: _difference(checkpoint / name, files[name]), files)
        problems = [problem for problem in found if problem]
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise DamagedError(f"{'; '.join(problems[:_NAMED])}{more}: the checkpoint is damaged")
    return Verdict(len(files), sum(size for size, _ in files.values()))


def check_format(checkpoint: Path, number: int) -> None:
    """Refuses checkpoints of a newer format.

    Raises:
        UserError: naming it.
    """
    if number > FORMAT:
        raise UserError(
            f"{checkpoint} has checkpoint format {number}; this t5g2 reads up to {FORMAT}"
        )


def _sealed(body: Mapping[str, Any]) -> bytes:
    """A manifest as bytes, with the checksum of the rest of it in front."""

    def text(values: Mapping[str, Any]) -> bytes:
        return (json.dumps(values, indent=1) + "\n").encode()

    return text({"checksum": f"{zlib.crc32(text(body)):08x}", **body})


def _checksum(path: Path) -> tuple[int, str]:
    """Size in bytes and CRC-32 of a file; lets other threads work."""
    crc, size = 0, 0
    buffer = bytearray(_BLOCK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = isal_zlib.crc32(view[:count], crc)
            size += count
    return size, f"{crc:08x}"


def _difference(path: Path, wanted: tuple[int, str]) -> str | None:
    """How a file is not what it should be."""
    try:
        size = path.stat().st_size
        if size != wanted[0]:
            return f"{path} has {size:,} bytes instead of {wanted[0]:,}"
        return None if _checksum(path) == wanted else f"{path}: its checksum differs"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"


def _format_without_manifest(checkpoint: Path) -> int:
    path = checkpoint / _META
    try:
        number = int(json.loads(path.read_bytes())["format"])
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: the checkpoint is damaged") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise DamagedError(f"{path} cannot be read: the checkpoint is damaged") from None
    check_format(checkpoint, number)
    return number


@functools.cache
def _warn_unverified(checkpoint: Path) -> None:
    logger.warning("%s was written before checkpoints had checksums: not verified", checkpoint)
