"""Images with text about them: lines of JSON that name image files."""

import json
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from t5g2.data.image_examples import NOTHING, ImageExample, Tokens, pixel_slot
from t5g2.data.images import (
    START_OF_IMAGE,
    check_image_count,
    check_image_pieces,
    encode_with_images,
    image_tokens,
    open_image,
    preprocess,
)
from t5g2.data.sources.documents import Documents
from t5g2.data.sources.jsonl import JsonLines, text_of_json
from t5g2.data.sources.records import BadRecord, BadRecords, Recent, cannot_read
from t5g2.data.sources.splits import Numbers
from t5g2.data.tokenizer import Tokenizer
from t5g2.errors import UserError
from t5g2.models.config import ModelConfig

# Bytes of decoded images that are kept: records of one image often follow one another.
KEPT_BYTES = 64 << 20


class ImageRecords(JsonLines):
    """The lines of JSON Lines files, each with images.

    A line is `{"text": "... <start_of_image> ... a caption", "images": ["a.png", ...]}`: as many
    images as markers, named relative to the file of the line, and text after the last one.

    Attributes:
        images: the image files that lines name, each once, relative to `root`; in the order in
            which they are named first.
    """

    def __init__(self, root: Path, names: list[str], field: str) -> None:
        """Reads every file twice, to find its lines and which images they name.

        Raises:
            UserError: a file cannot be read.
        """
        super().__init__(root, names, field)
        self._numbers: dict[str, int] = {}
        # Of each line a hash of the images that it names.
        self._hashes = array("I")
        for path in self.paths:
            for line in _lines(path):
                found = _names(line)
                for name in found:
                    self._numbers.setdefault(self._relative(path, name), len(self._numbers))
                key = "\0".join(found) if found else str(len(self._hashes))
                self._hashes.append(zlib.crc32(key.encode(errors="surrogateescape")))
        self.images = list(self._numbers)
        self._decoded: Recent[str, Image.Image] = Recent(KEPT_BYTES)

    def heldout(self, share: float) -> Int64[np.ndarray, " heldout"]:
        """Numbers of the lines that are held out: the images' names decide.

        So that what is said of an image, in whichever language, is all in the same split.
        """
        hashes = np.frombuffer(self._hashes, np.uint32)
        return np.flatnonzero(hashes < share * 2**32)

    def text(self, number: int) -> str:
        """The text of a line without its markers; raises `BadRecord` if there is none."""
        return super().text(number).replace(START_OF_IMAGE, "")

    def read(self, number: int) -> tuple[str, list[str]]:
        """The text of a line with its markers, and its images, which can be decoded.

        Raises:
            BadRecord: something is missing or wrong.
        """
        content, place = self.line(number)
        text = text_of_json(content, self.field, place)
        named = _image_names(json.loads(content.decode("utf-8-sig")), place)
        names = [self._relative(self.file(number), name) for name in named]
        try:
            check_image_count(text, len(names))
            for name in names:
                self.image(name)
        except UserError as error:
            raise BadRecord(f"{place}: {error}") from None
        if not text.rpartition(START_OF_IMAGE)[2].strip():
            raise BadRecord(f"{place}: no text after the last {START_OF_IMAGE}, nothing to learn")
        return text, names

    def image(self, name: str) -> Image.Image:
        """One of `images`, decoded.

        Raises:
            UserError: it cannot be read.
        """

        def decoded() -> tuple[Image.Image, int]:
            image = open_image(self.root / name)
            return image, 3 * image.width * image.height

        return self._decoded.get(name, decoded)

    def image_number(self, name: str) -> int:
        """Where one of `images` stands among them."""
        return self._numbers[name]

    def _relative(self, manifest: Path, name: str) -> str:
        """The name of an image, relative to `root`, that a line of `manifest` gives."""
        return (manifest.parent.relative_to(self.root) / name).as_posix()


class ImageDocuments(Documents):
    """The lines of one split, whose text is that without markers.

    Attributes:
        model: reads them.
    """

    records: ImageRecords

    def __init__(
        self,
        source: str,
        records: ImageRecords,
        numbers: Numbers,
        bad: BadRecords,
        model: ModelConfig,
    ) -> None:
        """Says which lines; see `Documents`. They are never split."""
        super().__init__(source, records, numbers, None, bad)
        assert model.vision is not None
        self.model = model

    def example(self, index: int, tokenizer: Tokenizer) -> ImageExample:
        """An example; one of nothing if it is passed over.

        Raises:
            UserError: a bad record too many; it names the file and the line.
        """
        number = self.numbers[index]
        try:
            text, names = self.records.read(number)
        except BadRecord as problem:
            self.bad.add(self.source, number, problem)
            return NOTHING
        before, marker, target = text.rpartition(START_OF_IMAGE)
        tokens = image_tokens(self.model)
        prefix = encode_with_images(tokenizer, before + marker, [0] * len(names), tokens)
        # Apart, so that no piece of text belongs to both sides.
        ids = np.concatenate([prefix, tokenizer.encode(target)])
        return ImageExample(ids, len(prefix), len(names))

    def image_names(self, index: int) -> list[str]:
        """Which of `records.images` an example has, in order."""
        return self.records.read(self.numbers[index])[1]


class ImageTexts:
    """The lines of one split as examples, read and decoded when asked for; `ImageExamples`.

    Attributes:
        slot: pixels.
    """

    def __init__(self, documents: ImageDocuments, tokenizer: Tokenizer) -> None:
        """Takes the lines and what their text is tokenised with.

        Raises:
            UserError: a tokenizer without the model's image tokens.
        """
        check_image_pieces(tokenizer, documents.model)
        self.documents = documents
        self.tokenizer = tokenizer
        self.slot = pixel_slot(documents.model)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Tokens:
        return self.example(index).ids

    def __iter__(self) -> Iterator[Tokens]:
        return (self[i] for i in range(len(self)))

    def example(self, index: int) -> ImageExample:
        """See `ImageExamples`.

        Raises:
            UserError: a bad record too many; it names the file and the line.
        """
        return self.documents.example(index, self.tokenizer)

    def images(self, index: int) -> UInt8[np.ndarray, "M size size 3"]:
        """See `ImageExamples`."""
        images = map(self.documents.records.image, self.documents.image_names(index))
        return np.stack([preprocess(image, self.slot.shape[0]) for image in images])

    def refuse(self, index: int, problem: str) -> None:
        """See `ImageExamples`."""
        documents, number = self.documents, self.documents.numbers[index]
        _, place = documents.records.line(number)
        documents.bad.add(documents.source, number, BadRecord(f"{place}: {problem}"))


def _lines(path: Path) -> Iterator[bytes]:
    """The lines that are records, as `JsonLines` counts them."""
    try:
        with path.open("rb") as file:
            yield from (line for line in file if line not in (b"\n", b"\r\n"))
    except OSError as error:
        raise cannot_read(path, error) from None


def _names(line: bytes) -> list[str]:
    """The images that a line names; none of a bad line, of which reading it tells."""
    try:
        return _image_names(json.loads(line.decode("utf-8-sig")), "")
    except (ValueError, RecursionError, AttributeError, BadRecord):
        return []


def _image_names(record: dict[str, Any], place: str) -> list[str]:
    names = record.get("images")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadRecord(f"{place}: field 'images' is not a list of file names")
    if not names:
        raise BadRecord(f"{place}: no images; text alone belongs in a source of text")
    return names
