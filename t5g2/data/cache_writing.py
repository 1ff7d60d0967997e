"""Writing a cache of tokenised documents: shard by shard, on many processes, after any kill.

What a shard holds depends on the documents alone. A shard is written under a temporary name, read
back, and only then renamed; a note beside it keeps its counts until the manifest is written.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from t5g2 import config
from t5g2.data.cache import cache_tokenizer, check_size, open_shard, sha256_of
from t5g2.data.cache_format import (
    MANIFEST,
    PARTIAL_DIR,
    TOKEN_COUNTS,
    TOKENIZER_DIR,
    Manifest,
    Plan,
    Shard,
    read_manifest,
    shard_count,
    shard_file,
    shard_range,
    to_record,
    token_dtype,
    tokenizer_facts,
)
from t5g2.data.sources.documents import Documents, Numbered, SequentialDocuments, encode
from t5g2.data.sources.records import BadRecords
from t5g2.data.tokenizer import Tokenizer
from t5g2.errors import UserError
from t5g2.files import write_atomically

# A group a record: random access reads one. Token ids hardly compress, and reading is what counts.
_WRITER_OPTIONS = "group_size:1,uncompressed,max_parallelism:1"
_PLAN_FILE = "plan.json"
# Documents between two reports of a shard's progress, tokens between two counts of them.
_REPORT_EVERY = 32
_COUNT_EVERY = 2**20

Report = Callable[[int, int], None]
TokenCounts = Int[np.ndarray, " vocabulary"]


class Written(NamedTuple):
    """A document as a shard holds it.

    Attributes:
        record: its bytes.
        tokens: how many it has.
        characters: of its text.
        counted: those of its tokens that are text.
    """

    record: bytes
    tokens: int
    characters: int
    counted: Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One source in one split.

    Attributes:
        split: "train" or "heldout".
        source: its name; also part of the shards' file names.
        texts: the documents, in order, readable by number in any process it is pickled to.
    """

    split: str
    source: str
    texts: Numbered[Any]

    def written(self, documents: range, tokenizer: Tokenizer, bad: BadRecords) -> Iterator[Written]:
        """Some documents as shards hold them.

        Args:
            documents: their numbers.
            tokenizer: what they are tokenised with.
            bad: told of the records that have no text, whatever was found before.

        Raises:
            UserError: a document cannot be read or tokenised.
        """
        if isinstance(self.texts, Documents | SequentialDocuments):
            self.texts.bad = bad
        dtype = token_dtype(tokenizer.vocab_size)
        for index in documents:
            text = self.texts[index]
            ids = encode(text, tokenizer)
            yield Written(to_record(ids, dtype), len(ids), len(text), ids)


class Todo(NamedTuple):
    """A shard to be written: the number of its part, and its own number in the part."""

    part: int
    shard: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheWriter:
    """Writes the shards of one cache, in whichever process; picklable.

    Attributes:
        directory: the cache.
        parts: all that is to be in it.
        tokenizer: what the documents are tokenised with.
        max_bad_records: see `CorpusConfig`; of a shard here, of all together in `write_cache`.
    """

    directory: Path
    parts: tuple[Part, ...]
    tokenizer: Tokenizer
    max_bad_records: int = 0

    def todo(self) -> list[Todo]:
        """Every shard of the cache."""
        return [
            Todo(number, shard)
            for number, part in enumerate(self.parts)
            for shard in range(shard_count(len(part.texts)))
        ]

    def file(self, todo: Todo) -> str:
        """The path of a shard in the cache."""
        part = self.parts[todo.part]
        return shard_file(part.split, part.source, todo.shard, shard_count(len(part.texts)))

    def documents(self, todo: Todo) -> int:
        """How many documents a shard has."""
        return len(shard_range(len(self.parts[todo.part].texts), todo.shard))

    def write(self, todo: Todo, report: Report) -> None:
        """Writes one shard and the note of what it holds.

        Args:
            todo: which one.
            report: is told of documents and tokens as they are written.

        Raises:
            UserError: a document cannot be read or tokenised, or the shard cannot be written.
        """
        file = self.file(todo)
        temporary = self._partial / f"{uuid.uuid4().hex}.tmp"
        try:
            shard, counts = self._fill(temporary, file, todo, report)
            (self.directory / file).parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(self.directory / file)
            write_atomically(self._note(file), _note_bytes(shard, counts))
        except OSError as error:
            raise _cannot_write(self.directory / file, error) from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def note(self, todo: Todo) -> tuple[Shard, TokenCounts] | None:
        """What a finished shard holds and how often each token; None: it is not finished."""
        file = self.file(todo)
        try:
            with np.load(self._note(file)) as note:
                shard = Shard(**json.loads(str(note["shard"])))
                counts = np.zeros(self.tokenizer.vocab_size, np.int64)
                counts[note["ids"]] = note["counts"]
            check_size(self.directory, shard)
        except (FileNotFoundError, UserError):
            return None
        return shard, counts

    @property
    def _partial(self) -> Path:
        return self.directory / PARTIAL_DIR

    def _note(self, file: str) -> Path:
        return self._partial / f"{file}.npz"

    def _fill(
        self, temporary: Path, file: str, todo: Todo, report: Report
    ) -> tuple[Shard, TokenCounts]:
        """Writes the records of a shard and reads them back."""
        part = self.parts[todo.part]
        documents = shard_range(len(part.texts), todo.shard)
        bad = BadRecords(self.max_bad_records)
        counts = np.zeros(self.tokenizer.vocab_size, np.int64)
        uncounted = [np.zeros(0, np.int32)]
        characters = tokens = waiting = reported = checksum = 0
        with _new_shard(temporary) as add:
            written = part.written(documents, self.tokenizer, bad)
            for done, document in enumerate(written, start=1):
                add(document.record)
                checksum = zlib.crc32(document.record, checksum)
                characters += document.characters
                tokens += document.tokens
                uncounted.append(document.counted)
                waiting += len(document.counted)
                if waiting > _COUNT_EVERY or done == len(documents):
                    counts += np.bincount(np.concatenate(uncounted), minlength=len(counts))
                    uncounted, waiting = [], 0
                if done % _REPORT_EVERY == 0 or done == len(documents):
                    report((done - 1) % _REPORT_EVERY + 1, tokens - reported)
                    reported = tokens
        if _read_back(temporary, len(documents)) != checksum:
            raise OSError("it does not read as it was written")
        shard = Shard(
            file=file,
            documents=len(documents),
            characters=characters,
            tokens=tokens,
            bad_records=bad.count(part.source),
            bytes=temporary.stat().st_size,
            sha256=sha256_of(temporary),
        )
        return shard, counts


@contextlib.contextmanager
def _new_shard(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Gives a function that adds a record; afterwards the file is on the disk.

    Raises:
        OSError: the file cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    def attempt(action: Callable[..., object], *args: object) -> Any:
        try:
            return action(*args)
        except RuntimeError as error:  # the library's, with the system's reason in its message
            raise OSError(str(error).partition(";")[0]) from None

    writer = attempt(ArrayRecordWriter, str(path), _WRITER_OPTIONS)
    yield lambda record: attempt(writer.write, record)
    attempt(writer.close)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def cache_directory(directory: Path) -> Iterator[None]:
    """Opens a directory for writing a cache, new or begun, to this process alone.

    Raises:
        UserError: it holds something else, cannot be written, or another process writes there.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out {directory} is a file")
    names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if names and not names & {MANIFEST, PARTIAL_DIR}:
        raise UserError(f"--out {directory} is not empty and holds no cache: name another one")
    partial = directory / PARTIAL_DIR
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / "lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another t5g2 cache is writing {directory}: wait for it") from None
            for pattern in (f"{PARTIAL_DIR}/*.tmp", ".*.tmp", f"{TOKENIZER_DIR}/*.tmp"):
                for left_over in directory.glob(pattern):
                    left_over.unlink()
            yield
            if (directory / MANIFEST).exists():
                shutil.rmtree(partial)
    except OSError as error:
        raise _cannot_write(directory, error) from None


def begun_cache(directory: Path, plan: Plan) -> Tokenizer | None:
    """The tokenizer of a cache that stands, whole or in part, in `cache_directory`.

    Args:
        directory: the cache.
        plan: what it is to be made from; see `Manifest`.

    Returns:
        The tokenizer; None: no cache was begun there.

    Raises:
        UserError: a cache was made or begun from something else, or its tokenizer changed.
    """
    plan_path = directory / PARTIAL_DIR / _PLAN_FILE
    if (directory / MANIFEST).exists():
        manifest = read_manifest(directory)
        begun = {"plan": manifest.plan, "tokenizer": manifest.tokenizer}
    elif plan_path.exists():
        begun = json.loads(plan_path.read_bytes())
    else:
        return None
    changed = config.differences(begun["plan"], plan)
    if changed:
        raise UserError(
            f"{directory} holds the cache of other data or settings: {'; '.join(changed)}. Use "
            "another --out, or what it was made from"
        )
    return cache_tokenizer(directory, begun["tokenizer"])


def begin_cache(directory: Path, plan: Plan, tokenizer: Tokenizer) -> None:
    """Notes, for `begun_cache`, that the tokenizer stands and what the cache is made from."""
    content = {"plan": plan, "tokenizer": tokenizer_facts(tokenizer)}
    write_atomically(directory / PARTIAL_DIR / _PLAN_FILE, json.dumps(content))


def write_cache(writer: CacheWriter, plan: Plan, run: Callable[[list[Todo]], None]) -> Manifest:
    """Makes a cache whole, inside `cache_directory`: only what is missing is written.

    Args:
        writer: of the cache.
        plan: what it is made from; see `Manifest`.
        run: has shards written, by `writer.write`, in any order and in any processes.

    Raises:
        UserError: something cannot be read or written, or there are too many bad records.
    """
    directory = writer.directory
    if (directory / MANIFEST).exists():
        manifest = read_manifest(directory)
        _mend(writer, run, manifest)
        return manifest
    run([todo for todo in writer.todo() if writer.note(todo) is None])
    shards: dict[str, dict[str, list[Shard]]] = {}
    counts: list[TokenCounts] = []
    for number, part in enumerate(writer.parts):
        found, ids = _gathered(writer, number)
        shards.setdefault(part.split, {})[part.source] = found
        if part.split == "train":
            counts.append(ids)
    manifest = Manifest(
        plan=plan,
        tokenizer=tokenizer_facts(writer.tokenizer),
        shards=shards,
        token_counts=_write_counts(directory / TOKEN_COUNTS, counts),
    )
    bad = sum(shard.bad_records for shard in manifest.all_shards())
    if bad > writer.max_bad_records:
        raise UserError(
            f"{bad} records of all sources have no text, and corpus.max_bad_records is "
            f"{writer.max_bad_records}: raise it, or mend them and use another --out"
        )
    write_atomically(directory / MANIFEST, manifest.to_json())
    return manifest


def _mend(writer: CacheWriter, run: Callable[[list[Todo]], None], manifest: Manifest) -> None:
    """Writes the shards of a complete cache that are missing or too short."""
    known = {shard.file: shard for shard in manifest.all_shards()}
    files = {writer.file(todo): todo for todo in writer.todo()}
    run([todo for file, todo in files.items() if not _is_whole(writer.directory, known.get(file))])
    for file, todo in files.items():
        note = writer.note(todo)
        if note is not None and note[0] != known.get(file):
            raise UserError(
                f"{writer.directory / file}, made anew, is not what the manifest says: the "
                "documents changed; use another --out"
            )


def _gathered(writer: CacheWriter, part: int) -> tuple[list[Shard], TokenCounts]:
    """What the notes of all shards of a part say."""
    shards: list[Shard] = []
    counts = np.zeros(writer.tokenizer.vocab_size, np.int64)
    for todo in writer.todo():
        if todo.part != part:
            continue
        note = writer.note(todo)
        if note is None:
            raise UserError(
                f"{writer.directory / writer.file(todo)} was not written: is {writer.directory} "
                "the same directory on every machine of the runner?"
            )
        shards.append(note[0])
        counts += note[1]
    return shards, counts


def _write_counts(path: Path, counts: list[TokenCounts]) -> str:
    """Writes how often each token occurs, source by source; returns the file's checksum."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, *counts)
    write_atomically(path, buffer.getvalue())
    return sha256_of(path)


def _is_whole(directory: Path, shard: Shard | None) -> bool:
    if shard is None:
        return False
    try:
        check_size(directory, shard)
    except UserError:
        return False
    return True


def _note_bytes(shard: Shard, counts: TokenCounts) -> bytes:
    buffer = io.BytesIO()
    ids = np.flatnonzero(counts)
    text = json.dumps(dataclasses.asdict(shard))
    np.savez(buffer, shard=np.array(text), ids=ids, counts=counts[ids])
    return buffer.getvalue()


def _read_back(path: Path, documents: int) -> int:
    """The checksum of all records of a shard."""
    reader = open_shard(path)
    if reader.num_records() != documents:
        return -1
    checksum = 0
    for index in range(documents):
        checksum = zlib.crc32(reader.read(index, index + 1)[0], checksum)
    return checksum


def _cannot_write(path: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(f"cannot write {path}: {reason}; once mended, run the same command again")
