"""SentencePiece's model file as the protocol buffer that it is."""

import os
from pathlib import Path
from typing import Any

from t5g2.errors import UserError


def parse_model(path: Path, content: bytes) -> Any:
    """SentencePiece's `ModelProto`; the class exists only at run time, hence `Any`.

    Args:
        path: named in messages.
        content: of the `*.model` file.

    Raises:
        UserError: it is no model, or one without pieces.
    """
    from google.protobuf.message import DecodeError

    try:
        proto = messages().ModelProto.FromString(content)
    except DecodeError:
        raise UserError(f"{path} is not a SentencePiece model") from None
    if not proto.pieces:
        raise UserError(f"{path} is not a SentencePiece model: it has no pieces")
    return proto


def messages() -> Any:
    """The generated module, which seqio imports, too.

    It refuses a protobuf older than the one it was generated with, such as Apache Beam demands,
    though any version reads these messages: it is imported with that check off. Whoever imports it
    later finds it imported.
    """
    check = "TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK"
    before = os.environ.get(check)
    os.environ[check] = "true"
    try:
        from sentencepiece import sentencepiece_model_pb2
    finally:
        del os.environ[check]
        if before is not None:
            os.environ[check] = before
    return sentencepiece_model_pb2
