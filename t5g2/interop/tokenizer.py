"""Writes a tokenizer as Hugging Face's AutoTokenizer reads it, without transformers.

A SentencePiece BPE model becomes a `tokenizers` BPE with the same ids. SentencePiece keeps a score
per piece and merges the best-scored neighbours whose concatenation is a piece; `tokenizers` keeps
an ordered list of pairs. So every way to cut a piece into two pieces becomes a pair, in the order
of the scores of what they make.

Pieces are written with real spaces where SentencePiece has U+2581, and no normaliser then turns
one into the other. This is why the class is not transformers' GemmaTokenizer, which rebuilds that
normaliser whatever the file says: U+2581 in a text would come out as a space, and the ids would
differ from those in training.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5g2.data.tokenizer import SPACE_MARK, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from t5g2.errors import UserError


def export_tokenizer(
    tokenizer: Tokenizer,
    out_dir: str | os.PathLike[str],
    image_tokens: Mapping[str, str] | None = None,
) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, and the SentencePiece model if any.

    AutoTokenizer then gives bos followed by `tokenizer.encode(text)`. Like Gemma's own it reads
    special pieces spelled out in a text as special; `split_special_tokens=True` turns that off.

    Args:
        tokenizer: A BPE tokenizer of either kind. A `tokenizer.json` is copied as it is, along
            with a `tokenizer_config.json` beside it.
        out_dir: Created if missing; files of these names are overwritten.
        image_tokens: transformers' names (`boi_token`, `eoi_token`, `image_token`) to pieces.

    Raises:
        UserError: An image token that is no piece, or a SentencePiece model that has no equal
            among `tokenizers`: not BPE, with a normaliser, or with unused pieces.
    """
    out_dir = Path(out_dir)
    backend: dict[str, Any]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": tokenizer.id_to_piece(tokenizer.pad_id),
        "eos_token": tokenizer.id_to_piece(tokenizer.eos_id),
        "bos_token": tokenizer.id_to_piece(tokenizer.bos_id),
        "unk_token": tokenizer.id_to_piece(tokenizer.unk_id),
        # Padding on the left would shift the decoder's positions, which count padding.
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    files: dict[str, bytes] = {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        backend = _bpe_from_sentencepiece(tokenizer)
        files["tokenizer.json"] = json.dumps(backend, ensure_ascii=False, indent=1).encode()
        files["tokenizer.model"] = tokenizer.path.read_bytes()
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        files["tokenizer.json"] = tokenizer.path.read_bytes()
        backend = json.loads(files["tokenizer.json"])
        neighbour = tokenizer.path.with_name("tokenizer_config.json")
        if neighbour.is_file():
            config = json.loads(neighbour.read_bytes())
    else:
        raise TypeError(f"cannot export a {type(tokenizer).__name__}")
    pieces = {*backend["model"]["vocab"], *(token["content"] for token in backend["added_tokens"])}
    for name, piece in (image_tokens or {}).items():
        if piece not in pieces:
            raise UserError(f"{name}={piece!r} is no piece of {tokenizer.path}")
        config[name] = piece
        # Both releases' names for what overrides the settings above it.
        for group in ("extra_special_tokens", "model_specific_special_tokens"):
            if name in config.get(group, ()):
                config[group][name] = piece
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=1).encode()
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out_dir / name).write_bytes(content)


def _bpe_from_sentencepiece(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    proto = tokenizer.model_proto()
    _check_convertible(tokenizer.path, proto)
    kind = proto.SentencePiece
    vocab: dict[str, int] = {}
    added: list[dict[str, Any]] = []
    for i, piece in enumerate(proto.pieces):
        text = piece.piece
        if " " in text:
            raise UserError(
                f"{tokenizer.path} has the piece {text!r} with a real space, which SentencePiece "
                "never finds in a text: write the space as U+2581"
            )
        if piece.type in (kind.NORMAL, kind.USER_DEFINED):
            text = text.replace(SPACE_MARK, " ")
        vocab[text] = i
        # User-defined pieces are found in the text first, longest first, in both libraries.
        if piece.type in (kind.CONTROL, kind.UNKNOWN, kind.USER_DEFINED):
            added.append(_added_token(i, text, special=piece.type != kind.USER_DEFINED))
    normal = {
        piece.piece.replace(SPACE_MARK, " "): piece.score
        for piece in proto.pieces
        if piece.type == kind.NORMAL
    }
    bos = tokenizer.id_to_piece(tokenizer.bos_id)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(bos, 0), _sequence("A", 0)],
            "pair": [_special(bos, 0), _sequence("A", 0), _special(bos, 1), _sequence("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.id_to_piece(tokenizer.unk_id),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.type == kind.BYTE for piece in proto.pieces),
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(normal),
        },
    }


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, those that make the best-scored piece first.

    SentencePiece takes the leftmost of equal scores and `tokenizers` the earlier pair, so two
    overlapping pairs that make the same piece could part the two; merging never leads to any.
    """
    merges: list[tuple[str, str]] = []
    for piece in sorted(scores, key=lambda text: -scores[text]):
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                merges.append((piece[:cut], piece[cut:]))
    return merges


def _check_convertible(path: Path, proto: Any) -> None:
    normalizer = proto.normalizer_spec
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise UserError(f"{path} is no BPE model: only BPE models can be exported")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise UserError(
            f"{path} normalises text: only models with identity normalisation that keep "
            "whitespace can be exported"
        )
    if not normalizer.escape_whitespaces or proto.denormalizer_spec.precompiled_charsmap:
        raise UserError(f"{path} treats spaces or decoding in a way that cannot be exported")
    if any(piece.type == proto.SentencePiece.UNUSED for piece in proto.pieces):
        raise UserError(f"{path} has pieces marked unused: these cannot be exported")


def _added_token(token: int, text: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": text, **flags, "special": special}


def _special(piece: str, segment: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": piece, "type_id": segment}}


def _sequence(name: str, segment: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": segment}}
