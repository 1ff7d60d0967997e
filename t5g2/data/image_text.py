"""Images with text about them, as examples of prefix language modelling."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from t5g2.data.images import (
    START_OF_IMAGE,
    ImageTokens,
    check_image_count,
    encode_with_images,
    open_image,
    preprocess,
)
from t5g2.data.sources.jsonl import JsonLines, is_compressed, text_of_json
from t5g2.data.sources.records import BadRecord, BadRecords
from t5g2.data.tokenizer import Tokenizer
from t5g2.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ImageExample:
    """One record: the encoder reads `ids[:prefix]` and the images, the decoder learns the rest.

    Attributes:
        ids: token ids without bos and eos.
        prefix: tokens up to the end of the last image and the blank line behind it. They are what
            the encoder gets at inference for a prompt that ends there.
        images: bytes, in the order of the text; a record that is passed over has none.
    """

    ids: Int32[np.ndarray, " n"]
    prefix: int
    images: UInt8[np.ndarray, "M size size 3"]


class ImageTexts(Sequence[ImageExample]):
    """The records of JSON Lines files, read and decoded when asked for.

    A line is `{"text": "... <start_of_image> ... a caption", "images": ["a.png", ...]}`: as many
    images as markers, named relative to the file of the line, and text after the last one.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer: Tokenizer,
        *,
        tokens: ImageTokens,
        image_size: int,
        bad: BadRecords,
        name: str = "image-text",
    ) -> None:
        """Finds the lines.

        Args:
            path: a `*.jsonl` file, or a directory with such files directly in it.
            tokenizer: of the model.
            tokens: of the model's images.
            image_size: height and width that images are resized to, in pixels.
            bad: told of the records that cannot be used, and so says how many may be passed over.
            name: what `bad` calls the source.

        Raises:
            UserError: no such files, or one that cannot be read.
        """
        path = Path(path)
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{path}: no *.jsonl file in this directory")
        if is_compressed(path.name):
            raise UserError(f"{path}: lines are read in any order: decompress it first")
        self._lines = JsonLines(files[0].parent, [file.name for file in files], "text")
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._image_size = image_size
        self._bad = bad
        self.name = name

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> ImageExample:  # type: ignore[override]  # no slices
        """A record; an empty one in place of a bad one that may be passed over.

        Raises:
            IndexError: no such record.
            UserError: a bad record too many; it names the file and the line.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"no record {index}: there are {len(self)}")
        try:
            return self._read(index)
        except BadRecord as problem:
            self._bad.add(self.name, index, problem)
        return self._example(np.empty(0, np.int32), 0, [])

    def __iter__(self) -> Iterator[ImageExample]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self) -> str:
        """Changes when a `*.jsonl` file comes, goes or changes its size; blind to the images."""
        return self._lines.fingerprint()

    def _read(self, index: int) -> ImageExample:
        content, place = self._lines.line(index)
        text = text_of_json(content, "text", place)
        names = _image_names(json.loads(content.decode("utf-8-sig")), place)
        before, marker, target = text.rpartition(START_OF_IMAGE)
        try:
            check_image_count(text, len(names))
            images = [open_image(self._lines.root / name) for name in names]
        except UserError as error:
            raise BadRecord(f"{place}: {error}") from None
        if not target.strip():
            raise BadRecord(f"{place}: no text after the last {START_OF_IMAGE}, nothing to learn")
        prefix = encode_with_images(
            self._tokenizer, before + marker, [0] * len(names), self._tokens
        )
        # Apart, so that no piece of text belongs to both sides.
        ids = np.concatenate([prefix, self._tokenizer.encode(target)])
        return self._example(ids, len(prefix), [preprocess(i, self._image_size) for i in images])

    def _example(
        self,
        ids: Int32[np.ndarray, " n"],
        prefix: int,
        images: list[UInt8[np.ndarray, "size size 3"]],
    ) -> ImageExample:
        shape = (len(images), self._image_size, self._image_size, 3)
        pixels = np.array(images, np.uint8).reshape(shape)
        return ImageExample(ids=ids, prefix=prefix, images=pixels)


def _image_names(record: dict[str, Any], place: str) -> list[str]:
    names = record.get("images")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadRecord(f"{place}: field 'images' is not a list of file names")
    if not names:
        raise BadRecord(f"{place}: no images; text alone belongs in a source of text")
    return names
