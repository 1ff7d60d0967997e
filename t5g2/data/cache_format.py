"""What a cache of tokenised documents is on disk: its shards, their records, and the manifest.

- `DIR/<split>/<source>-00000-of-00004.array_record`: a range of the source's documents.
- `DIR/images/<source>-00000-of-00004.array_record`: images that its documents name by number.
- `DIR/tokenizer/`: what they were tokenised with.
- `DIR/token_counts.npz`: how often each token occurs in the training documents of each source.
- `DIR/manifest.json`: written last; without it there is no cache.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from jaxtyping import Int, Int32

from t5g2.data.tokenizer import Tokenizer
from t5g2.errors import UserError

FORMAT = 1
# What stands in a manifest beside the splits: a source's images, each once.
IMAGES = "images"
MANIFEST = "manifest.json"
TOKENIZER_DIR = "tokenizer"
TOKEN_COUNTS = "token_counts.npz"
# What an unfinished cache keeps of its finished shards, and its temporary files.
PARTIAL_DIR = ".partial"

# Shards are for parallel work and for going on after a kill; each costs a reader a file handle.
DOCUMENTS_PER_SHARD = 256
MOST_SHARDS = 256

_CRC_BYTES = 4


Plan = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A file with a contiguous range of a source's documents.

    Attributes:
        file: its path in the cache.
        documents: how many it holds.
        characters: of their text.
        tokens: of all of them.
        bad_records: those that had no text and stand in it as empty documents.
        bytes: its size.
        sha256: its checksum, hexadecimal.
    """

    file: str
    documents: int
    characters: int
    tokens: int
    bad_records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a complete cache holds.

    Attributes:
        plan: the settings and fingerprints that it was made from, as sections of JSON values.
            Whatever is made from the same plan is the same bytes.
        tokenizer: fingerprint, vocabulary and special ids of the tokenizer; `dtype` is that of the
            stored ids.
        shards: of each split, of each source, in the order of the documents.
        token_counts: checksum of the file that says how often each token occurs in the training
            documents of each source.
    """

    plan: Plan
    tokenizer: dict[str, Any]
    shards: dict[str, dict[str, list[Shard]]]
    token_counts: str

    def all_shards(self) -> Iterator[Shard]:
        """Every shard, split by split and source by source."""
        for sources in self.shards.values():
            for shards in sources.values():
                yield from shards

    def fingerprint(self, source: str) -> str:
        """Changes with any document of a source: 16 hexadecimal digits."""
        sums = [
            shard.sha256 for sources in self.shards.values() for shard in sources.get(source, ())
        ]
        return hashlib.sha256("".join(sums).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """As text; `read_manifest` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=1)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a complete cache.

    Raises:
        UserError: no cache, an unfinished one, or one in a format that this version cannot read.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        if (directory / PARTIAL_DIR).is_dir():
            raise UserError(
                f"the cache {directory} is unfinished: run the same t5g2 cache again, which goes on"
            ) from None
        raise UserError(f"{directory} is no cache: it has no {MANIFEST}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged: make the cache anew") from None
    found = content.get("plan", {}).get("cache", {}).get("format")
    if found != FORMAT:
        raise UserError(f"{path}: format {found}, this t5g2 reads {FORMAT}: make the cache anew")
    shards = {
        split: {name: [Shard(**shard) for shard in found] for name, found in sources.items()}
        for split, sources in content["shards"].items()
    }
    return Manifest(**{**content, "shards": shards})


def shard_count(documents: int) -> int:
    """How many shards a source has: a function of its number of documents alone."""
    return max(1, min(MOST_SHARDS, -(-documents // DOCUMENTS_PER_SHARD)))


def shard_range(documents: int, number: int) -> range:
    """The documents in shard `number` of a source with so many."""
    count = shard_count(documents)
    return range(number * documents // count, (number + 1) * documents // count)


def shard_file(split: str, source: str, number: int, count: int) -> str:
    """The path of a shard in its cache."""
    return f"{split}/{source}-{number:05}-of-{count:05}.array_record"


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a manifest says of a tokenizer."""
    return {
        "fingerprint": tokenizer.fingerprint,
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id,
        "first_sentinel_id": tokenizer.sentinel_ids.start,
        "sentinels": len(tokenizer.sentinel_ids),
    }


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type, little-endian, that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def to_record(tokens: Int[np.ndarray, " n"], dtype: np.dtype) -> bytes:
    """A document as a record: its token ids, little-endian."""
    return sealed(tokens.astype(dtype).tobytes())


def from_record(record: bytes, dtype: np.dtype) -> Int32[np.ndarray, " n"]:
    """The token ids in a record; of 32 bits they are the record's own memory.

    Raises:
        ValueError: the checksum does not match.
    """
    tokens = np.frombuffer(body_of(record), dtype)
    return tokens.view("<i4") if dtype.itemsize == 4 else tokens.astype(np.int32)


def sealed(body: bytes) -> bytes:
    """A record: CRC-32 of what it holds, little-endian, then that."""
    return crc32(body).to_bytes(_CRC_BYTES, "little") + body


def body_of(record: bytes) -> memoryview:
    """What a record holds.

    Raises:
        ValueError: the checksum does not match.
    """
    body = memoryview(record)[_CRC_BYTES:]
    # Nothing at all would be right: the checksum of nothing is 0.
    if not record or crc32(body) != int.from_bytes(record[:_CRC_BYTES], "little"):
        raise ValueError("checksum mismatch")
    return body
