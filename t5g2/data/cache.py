"""Reading a cache of tokenised documents: at random, checked, without seqio or TensorFlow."""

import bisect
import concurrent.futures
import functools
import hashlib
import itertools
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int32, Int64

from t5g2.data.cache_format import (
    TOKEN_COUNTS,
    TOKENIZER_DIR,
    Manifest,
    Shard,
    from_record,
    read_manifest,
)
from t5g2.data.tokenizer import Tokenizer, load_tokenizer
from t5g2.errors import UserError

# Shards open at a time in a process: what it may open, less room for everything else. With more
# shards than that, `ulimit -n` is worth raising: to open one again costs as much as many reads.
_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
MOST_OPEN = 4096 if _FILES == resource.RLIM_INFINITY else min(4096, max(_FILES * 3 // 4, 1))
# Random access reads one record at a time: no read-ahead, and a small buffer for each open shard.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 32 * 1024

Decoded = TypeVar("Decoded")


def open_shard(path: Path) -> Any:
    """An ArrayRecord reader for random access.

    Raises:
        UserError: no such file, or one that is damaged.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(
            str(path), options=_READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cached shard {path} cannot be opened: {_first_line(error)}") from None
    if not reader.ok():
        raise damaged(path, "its index cannot be read")
    return reader


class CachedRecords:
    """The records of one source in one split of a cache.

    Shards are opened when first read. Pickled, it carries only where they are, so that worker
    processes open their own; threads may share one.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard]) -> None:
        """Checks that every shard is there in full length.

        Args:
            directory: the cache.
            shards: the source's, in the order of its documents.

        Raises:
            UserError: a shard is missing or has another size than the manifest says.
        """
        for shard in shards:
            check_size(directory, shard)
        self._shards = [(str(directory / shard.file), shard.sha256) for shard in shards]
        # Number of the first document of each shard, and of one past the last.
        self._starts = [0, *itertools.accumulate(shard.documents for shard in shards)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int, decode: Callable[[bytes], Decoded]) -> Decoded:
        """A record, decoded.

        Raises:
            IndexError: there is no such record.
            UserError: a damaged shard; `decode` says so by a ValueError.
        """
        if not 0 <= index < self._starts[-1]:
            raise IndexError(f"document {index} of {self._starts[-1]}")
        number = bisect.bisect_right(self._starts, index) - 1
        place = index - self._starts[number]
        reader = _reader(*self._shards[number])
        try:
            # A range of one: several times as fast as a list of one.
            (record,) = reader.read(place, place + 1)
            return decode(record)
        except (RuntimeError, ValueError) as error:
            path = Path(self._shards[number][0])
            raise damaged(path, f"document {place} in it: {_first_line(error)}") from None


class CachedDocuments(CachedRecords):
    """The documents of one source in one split of a cache; a `TokenSource`."""

    def __init__(self, directory: Path, shards: Sequence[Shard], dtype: np.dtype) -> None:
        """Takes the dtype of the stored token ids; see `CachedRecords`."""
        super().__init__(directory, shards)
        self._decode = functools.partial(from_record, dtype=dtype)

    def __getitem__(self, index: int) -> Int32[np.ndarray, " n"]:
        return self.read(index, self._decode)

    def __iter__(self) -> Iterator[Int32[np.ndarray, " n"]]:
        return (self[i] for i in range(len(self)))


@functools.lru_cache(maxsize=MOST_OPEN)
def _reader(path: str, sha256: str) -> Any:
    """The one open reader of a shard; the checksum tells it from an older file of that name."""
    return open_shard(Path(path))


def cache_tokenizer(directory: Path, facts: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a cache.

    Args:
        directory: the cache.
        facts: what its manifest says of the tokenizer.

    Raises:
        UserError: it cannot be read, or is another one.
    """
    tokenizer = load_tokenizer(directory / TOKENIZER_DIR)
    if tokenizer.fingerprint != facts["fingerprint"]:
        raise UserError(
            f"{tokenizer.path} (fingerprint {tokenizer.fingerprint}) is not what the cache was "
            f"tokenised with ({facts['fingerprint']}): restore it"
        )
    return tokenizer


def read_token_counts(directory: Path, manifest: Manifest) -> dict[str, Int64[np.ndarray, " ids"]]:
    """How often each token occurs in the training documents of each source.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = directory / TOKEN_COUNTS
    fault = file_fault(path, None, manifest.token_counts)
    if fault:
        raise UserError(f"{path}: {fault}: make the cache anew")
    with np.load(path) as counts:
        return dict(zip(manifest.shards["train"], counts.values(), strict=True))


def verify_cache(directory: Path, threads: int) -> int:
    """Reads every byte of a cache and compares it with the manifest.

    Args:
        directory: the cache.
        threads: how many shards are read at once.

    Returns:
        The number of shards.

    Raises:
        UserError: naming all that is missing or damaged.
    """
    manifest = read_manifest(directory)
    cache_tokenizer(directory, manifest.tokenizer)
    read_token_counts(directory, manifest)
    shards = list(manifest.all_shards())
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        faults = list(pool.map(functools.partial(_fault, directory), shards))
    bad = [f"{shard.file} ({fault})" for shard, fault in zip(shards, faults, strict=True) if fault]
    if bad:
        raise UserError(
            f"{directory}: {len(bad)} of {len(shards)} shards are bad: {', '.join(bad)}; delete "
            "them and run the same t5g2 cache again, which makes them anew"
        )
    return len(shards)


def check_size(directory: Path, shard: Shard) -> None:
    """Compares a shard's size with the manifest's.

    Raises:
        UserError: it is missing or has another size.
    """
    path = directory / shard.file
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"cached shard {path} is missing: run the same t5g2 cache again, which makes it anew"
        ) from None
    except OSError as error:
        raise UserError(f"cached shard {path} cannot be read: {error.strerror}") from None
    if size != shard.bytes:
        raise damaged(path, f"{size:,} bytes instead of {shard.bytes:,}")


def sha256_of(path: Path) -> str:
    """A file's SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(path: Path, fault: str) -> UserError:
    """The error that names a damaged shard."""
    return UserError(
        f"cached shard {path} is damaged ({fault}): delete it and run the same t5g2 cache again"
    )


def file_fault(path: Path, size: int | None, sha256: str) -> str:
    """What is wrong with a file of that size and checksum; nothing if it is good."""
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            return f"{found:,} bytes instead of {size:,}"
        return "" if sha256_of(path) == sha256 else "checksum mismatch"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _fault(directory: Path, shard: Shard) -> str:
    return file_fault(directory / shard.file, shard.bytes, shard.sha256)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(";")[0]
