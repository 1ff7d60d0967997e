"""Text to token ids and back: SentencePiece models and `tokenizer.json` files behind one interface.

A tokenizer here only ever turns text into text tokens: it adds no bos or eos, and a special piece
that is spelled out in a document (`<eos>`, `<sentinel_0>`) is encoded as the characters it is
written with. The special ids are attributes, and the denoiser puts them where they belong.
"""

import abc
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from t5g2.data.sentencepiece_model import parse_model
from t5g2.data.sentencepiece_trainer import train_model
from t5g2.errors import UserError
from t5g2.files import to_path, write_atomically

TokenIds = Int32[np.ndarray, " tokens"]

# SentencePiece writes a space inside its pieces as this character (U+2581).
SPACE_MARK = "▁"
# Gemma 3 and T5Gemma 2 have reserved pieces `<unused100>`.. from this id to the vocabulary's end.
GEMMA_UNUSED_BLOCK = 256_002


class Tokenizer(abc.ABC):
    """Text to ids and back, with the special ids that pretraining needs.

    Attributes:
        path: The file that defines the tokenizer.
        fingerprint: First 16 hexadecimal digits of the file's SHA-256.
        vocab_size: Number of ids; every id is below it.
        pad_id: Padding (Gemma: 0).
        eos_id: End of a sequence (Gemma: 1).
        bos_id: Beginning of a sequence (Gemma: 2).
        unk_id: Unknown text (Gemma: 3); never produced by a tokenizer with byte fallback.
        sentinel_ids: Ascending, contiguous; sentinel k of an example is `sentinel_ids[k]`.
    """

    path: Path
    fingerprint: str
    vocab_size: int
    pad_id: int
    eos_id: int
    bos_id: int
    unk_id: int
    sentinel_ids: range
    # Ids without text of their own: shown as their piece, or dropped by `skip_special`.
    _special_ids: frozenset[int]

    @abc.abstractmethod
    def encode(self, text: str) -> TokenIds:
        """Encodes one text, adding neither bos nor eos.

        Raises:
            UserError: The text holds a lone surrogate, which has no UTF-8 form.
        """

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """Encodes many texts on all cores; element i equals `encode(texts[i])`."""

    @abc.abstractmethod
    def id_to_piece(self, token_id: int) -> str:
        """The piece of an id below `vocab_size`, as the tokenizer's file spells it."""

    @abc.abstractmethod
    def _decode_text(self, ids: list[int]) -> str:
        """Decodes ids none of which is special."""

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = False) -> str:
        """Decodes ids to text.

        Args:
            ids: One sequence of ids. Ids of `vocab_size` and above (rows that only pad a model's
                embedding table) read as unknown.
            skip_special: Drop sentinels, pad, bos, eos and the other special pieces instead of
                showing them as their pieces.

        Returns:
            The text; bytes that are no valid UTF-8 read as U+FFFD.

        Raises:
            ValueError: An id is negative or `ids` is not one sequence.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and array.min() < 0):
            raise ValueError(f"decode wants one sequence of ids >= 0, got shape {array.shape}")
        parts: list[str] = []
        run: list[int] = []
        for token in array.tolist():
            known = token if token < self.vocab_size else self.unk_id
            if known not in self._special_ids:
                run.append(known)
                continue
            parts.append(self._decode_text(run))
            run = []
            if not skip_special:
                parts.append(self.id_to_piece(known))
        parts.append(self._decode_text(run))
        return "".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as path, sentinels and fingerprint: worker processes read the file again."""
        block = (self.sentinel_ids.start, len(self.sentinel_ids))
        return _reload, (type(self), self.path, block, self.fingerprint)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.vocab_size} ids)"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `*.model` file.

    A model with byte fallback and identity normalisation (`train_sentencepiece` makes such ones)
    decodes to exactly the text that was encoded. That includes U+2581, SentencePiece's own mark
    for a space, which is encoded as its three bytes.
    """

    def __init__(
        self, path: str | os.PathLike[str], sentinels: tuple[int, int] | None = None
    ) -> None:
        """Reads the model.

        Args:
            path: The `*.model` file.
            sentinels: (first id, count) of the sentinel block; by default the pieces
                `<sentinel_0>`.., or Gemma 3's unused pieces from id 256002 on.

        Raises:
            UserError: No such file, no SentencePiece model, a model that lacks pad, eos, bos or
                unk or adds a dummy prefix, or no (or unusable) sentinels.
        """
        from sentencepiece import SentencePieceProcessor

        self.path = to_path(path)
        content = _read(self.path)
        self.fingerprint = _fingerprint(content)
        proto = parse_model(self.path, content)
        if proto.normalizer_spec.add_dummy_prefix:
            raise UserError(
                f"{self.path} adds a dummy prefix, so text does not survive decoding: "
                "train it with add_dummy_prefix=false, as Gemma's is"
            )
        kind = proto.SentencePiece
        self.vocab_size = len(proto.pieces)
        self.sentinel_ids = _sentinel_block(
            self.path, lambda i: proto.pieces[i].piece, self.vocab_size, sentinels
        )
        for i in self.sentinel_ids:
            if proto.pieces[i].type in (kind.NORMAL, kind.BYTE):
                raise _ordinary_sentinel(self.path, i, proto.pieces[i].piece)
            # Gemma's unused pieces are user-defined: matched in text, which a sentinel must not be.
            proto.pieces[i].type = kind.CONTROL
        try:
            self._processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
        except RuntimeError as error:
            raise UserError(f"{self.path} is not a SentencePiece model: {_line(error)}") from None
        self.pad_id, self.eos_id = self._processor.pad_id(), self._processor.eos_id()
        self.bos_id, self.unk_id = self._processor.bos_id(), self._processor.unk_id()
        if min(self.pad_id, self.eos_id, self.bos_id, self.unk_id) < 0:
            raise UserError(f"{self.path} lacks one of pad, eos, bos, unk")
        self._special_ids = frozenset(
            i for i, p in enumerate(proto.pieces) if p.type in (kind.CONTROL, kind.UNKNOWN)
        )
        by_name = {p.piece: i for i, p in enumerate(proto.pieces) if p.type == kind.BYTE}
        mark_bytes = [by_name.get(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._mark_ids = None if None in mark_bytes else np.array(mark_bytes, np.int32)

    def encode(self, text: str) -> TokenIds:
        """Encodes one text; see `Tokenizer.encode`."""
        if SPACE_MARK not in _checked_unicode(text) or self._mark_ids is None:
            return self._processor.encode(text, out_type="numpy")
        ids = [self._processor.encode(part, out_type="numpy") for part in text.split(SPACE_MARK)]
        for gap in range(len(ids) - 1, 0, -1):
            ids.insert(gap, self._mark_ids)
        return np.concatenate(ids)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """Encodes many texts on all cores; see `Tokenizer.encode_batch`."""
        checked = [_checked_unicode(text) for text in texts]
        ids = self._processor.encode(checked, out_type="numpy", num_threads=os.cpu_count() or 1)
        return [
            self.encode(text) if SPACE_MARK in text else row
            for text, row in zip(texts, ids, strict=True)
        ]

    def id_to_piece(self, token_id: int) -> str:
        """The piece of an id; see `Tokenizer.id_to_piece`."""
        return self._processor.id_to_piece(int(token_id))

    def model_proto(self) -> Any:
        """A copy of the model as SentencePiece's `ModelProto`, sentinels being control pieces."""
        return parse_model(self.path, self._processor.serialized_model_proto())

    def _decode_text(self, ids: list[int]) -> str:
        return self._processor.decode(ids) if ids else ""


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` file of the `tokenizers` library, such as Gemma 3's or T5Gemma 2's.

    Gemma's own file turns U+2581 into a space; everything else comes back from decoding as it was.
    """

    def __init__(
        self, path: str | os.PathLike[str], sentinels: tuple[int, int] | None = None
    ) -> None:
        """Reads the file.

        Args:
            path: The `tokenizer.json` file.
            sentinels: (first id, count) of the sentinel block; by default Gemma 3's unused
                pieces from id 256002 on, or the pieces `<sentinel_0>`...

        Raises:
            UserError: No such file, not a tokenizer, one that lacks `<pad>`, `<eos>`, `<bos>` or
                `<unk>`, or no (or unusable) sentinels.
        """
        import tokenizers

        self.path = to_path(path)
        content = _read(self.path)
        self.fingerprint = _fingerprint(content)
        try:
            spec = json.loads(content)
            backend = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{self.path} is not a tokenizer.json: {_line(error)}") from None
        self.vocab_size = backend.get_vocab_size()
        found = [backend.token_to_id(piece) for piece in ("<pad>", "<eos>", "<bos>", "<unk>")]
        ids = [token for token in found if token is not None]
        if len(ids) < len(found):
            raise UserError(f"{self.path} lacks one of <pad>, <eos>, <bos>, <unk>")
        self.pad_id, self.eos_id, self.bos_id, self.unk_id = ids
        self.sentinel_ids = _sentinel_block(
            self.path, backend.id_to_token, self.vocab_size, sentinels
        )
        added = {token["id"]: token for token in spec["added_tokens"]}
        for i in self.sentinel_ids:
            if i not in added:
                raise _ordinary_sentinel(self.path, i, backend.id_to_token(i))
        # Only special tokens can be left alone in text, and Gemma's unused pieces are not special.
        for i in (*ids, *self.sentinel_ids):
            if i in added:
                added[i]["special"] = True
        # A file may carry the truncation and padding of whoever saved it.
        spec["truncation"] = spec["padding"] = None
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._backend.encode_special_tokens = True
        special = {i for i, token in added.items() if token["special"]}
        self._special_ids = frozenset(special | set(ids))

    def encode(self, text: str) -> TokenIds:
        """Encodes one text; see `Tokenizer.encode`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """Encodes many texts on all cores; see `Tokenizer.encode_batch`."""
        checked = [_checked_unicode(text) for text in texts]
        rows = self._backend.encode_batch_fast(checked, add_special_tokens=False)
        return [np.array(row.ids, np.int32) for row in rows]

    def id_to_piece(self, token_id: int) -> str:
        """The piece of an id; see `Tokenizer.id_to_piece`."""
        piece = self._backend.id_to_token(int(token_id))
        if piece is None:
            raise IndexError(f"no piece has id {token_id}")
        return piece

    def _decode_text(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False) if ids else ""


def load_tokenizer(
    path: str | os.PathLike[str], sentinels: tuple[int, int] | None = None
) -> Tokenizer:
    """Reads a tokenizer of either kind.

    Args:
        path: A `*.model` file, a `tokenizer.json`, or a directory that holds one of them; of a
            directory with both, such as a Hugging Face one, `tokenizer.json` is read.
        sentinels: (first id, count) of the sentinel block, for a tokenizer that names none.

    Raises:
        UserError: Nothing there, or nothing that can be read as a tokenizer.
    """
    path = to_path(path)
    if path.is_dir():
        models = sorted(path.glob("*.model"))
        if (path / "tokenizer.json").is_file():
            path = path / "tokenizer.json"
        elif len(models) == 1:
            path = models[0]
        else:
            raise UserError(f"{path} holds {len(models)} *.model files and no tokenizer.json")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, sentinels)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, sentinels)
    if not path.exists():
        raise UserError(f"no tokenizer at {path}")
    raise UserError(f"{path} is neither a SentencePiece *.model nor a tokenizer.json")


def train_sentencepiece(
    documents: Iterable[str],
    out: str | os.PathLike[str],
    *,
    vocab_size: int,
    sentinels: int,
    max_bytes: int,
    seed: int = 0,
    images: bool = False,
) -> SentencePieceTokenizer:
    """Trains a lossless BPE model with Gemma's special ids, and writes it.

    Pieces: `<pad> <eos> <bos> <unk>` (0 to 3), `<sentinel_0>`.., with `images` those of
    `IMAGE_PIECES`, the 256 bytes, then what is learnt, runs of spaces and newlines included.
    `decode(encode(text)) == text` for every text.

    Args:
        documents: Whole texts; read once.
        out: The `*.model` file to write, at once or not at all.
        vocab_size: Number of ids, everything included.
        sentinels: Number of sentinels.
        max_bytes: Trains on a random sample of this many bytes where there are more.
        seed: Of the sample. Equal arguments make equal files.
        images: Whether there are the pieces of an image.

    Raises:
        UserError: Too little text for `vocab_size` or none at all, too small a `vocab_size`, a
            document with a lone surrogate, or an `out` that is no `*.model` file or not writable.
    """
    out = to_path(out)
    if out.suffix != ".model":
        raise UserError(f"name the tokenizer file *.model, not {out.name}")
    model = train_model(
        map(_checked_unicode, documents),
        vocab_size=vocab_size,
        sentinels=sentinels,
        max_bytes=max_bytes,
        seed=seed,
        images=images,
    )
    try:
        write_atomically(out, model)
    except OSError as error:
        raise UserError(f"cannot write tokenizer {out}: {error.strerror}") from None
    return SentencePieceTokenizer(out)


def _reload(
    kind: type[SentencePieceTokenizer] | type[HuggingFaceTokenizer],
    path: Path,
    sentinels: tuple[int, int],
    fingerprint: str,
) -> Tokenizer:
    if _fingerprint(_read(path)) != fingerprint:
        raise UserError(f"{path} changed while it was in use: restore it or start again")
    return kind(path, sentinels)


def _sentinel_block(
    path: Path,
    piece_of: Callable[[int], str | None],
    vocab_size: int,
    explicit: tuple[int, int] | None,
) -> range:
    """The explicit block, or the one whose names tell: Gemma's unused ones, `<sentinel_0>`.."""
    if explicit is not None:
        first, count = explicit
        if first < 0 or count < 1 or first + count > vocab_size:
            raise UserError(
                f"sentinels=({first}, {count}) do not fit the {vocab_size} ids of {path}"
            )
        return range(first, first + count)
    stop = GEMMA_UNUSED_BLOCK
    while stop < vocab_size and re.fullmatch(r"<unused\d+>", piece_of(stop) or ""):
        stop += 1
    if stop > GEMMA_UNUSED_BLOCK:
        return range(GEMMA_UNUSED_BLOCK, stop)
    first = next((i for i in range(vocab_size) if piece_of(i) == "<sentinel_0>"), vocab_size)
    stop = first
    while stop < vocab_size and piece_of(stop) == f"<sentinel_{stop - first}>":
        stop += 1
    if stop > first:
        return range(first, stop)
    raise UserError(f"{path} names no sentinels: give sentinels=(first id, count)")


def _ordinary_sentinel(path: Path, token: int, piece: str | None) -> UserError:
    return UserError(
        f"sentinel id {token} is the ordinary piece {piece!r} of {path}: choose reserved ids"
    )


def _checked_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text holds a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which UTF-8 cannot express: mend or drop the document"
        ) from None
    return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read tokenizer {path}: {error.strerror}") from None


def _fingerprint(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
