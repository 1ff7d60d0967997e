"""Images with text, written to a cache; see `t5g2.data.cache_images` for what is stored."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import BFloat16, UInt8

from t5g2.data.cache_format import IMAGES, sealed, token_dtype
from t5g2.data.cache_images import to_image_record
from t5g2.data.cache_writing import Part, Written
from t5g2.data.images import image_tokens, open_image, preprocess
from t5g2.data.sources.image_text import ImageDocuments, ImageRecords
from t5g2.data.sources.records import BadRecords
from t5g2.data.tokenizer import Tokenizer
from t5g2.errors import UserError

# Images that a tower reads at a time.
TOWER_BATCH = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTextPart(Part):
    """Images with text in one split, `texts`."""

    texts: ImageDocuments

    def written(self, documents: range, tokenizer: Tokenizer, bad: BadRecords) -> Iterator[Written]:
        """See `Part`."""
        self.texts.bad = bad
        dtype = token_dtype(tokenizer.vocab_size)
        image_id = image_tokens(self.texts.model).image_id
        for index in documents:
            example = self.texts.example(index, tokenizer)
            names = self.texts.image_names(index) if example.images else []
            numbers = list(map(self.texts.records.image_number, names))
            record = to_image_record(example, numbers, dtype)
            counted = example.ids[example.ids != image_id]
            yield Written(record, len(example.ids), len(self.texts[index]), counted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePart(Part):
    """The images of a source, `texts` being their names, as the files hold them.

    Attributes:
        records: of the source.
    """

    split: str = IMAGES
    records: ImageRecords

    def written(self, documents: range, tokenizer: Tokenizer, bad: BadRecords) -> Iterator[Written]:
        """See `Part`; nothing of an image that cannot be read, whose records are bad."""
        for index in documents:
            content = _file(self.records, self.texts[index])
            yield _written(b"" if content is None else content)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturePart(ImagePart):
    """The images of a source as a tower's visual tokens.

    Attributes:
        tower: makes the tokens of `TOWER_BATCH` images.
        image_size: height and width that it reads, in pixels.
    """

    tower: Callable[[UInt8[np.ndarray, "M size size 3"]], BFloat16[np.ndarray, "M N W"]]
    image_size: int

    def written(self, documents: range, tokenizer: Tokenizer, bad: BadRecords) -> Iterator[Written]:
        """See `ImagePart`."""
        size = self.image_size
        for start in range(0, len(documents), TOWER_BATCH):
            pixels = np.zeros((TOWER_BATCH, size, size, 3), np.uint8)
            names = [self.texts[index] for index in documents[start : start + TOWER_BATCH]]
            files = [_file(self.records, name) for name in names]
            for place, file in enumerate(files):
                if file is not None:
                    pixels[place] = preprocess(open_image(file), size)
            for file, tokens in zip(files, self.tower(pixels), strict=False):
                yield _written(b"" if file is None else tokens.tobytes())


def _file(records: ImageRecords, name: str) -> bytes | None:
    """What an image file holds; None: no image, which the records that name it tell."""
    try:
        content = (records.root / name).read_bytes()
        open_image(content)
    except (OSError, UserError):
        return None
    return content


def _written(body: bytes) -> Written:
    return Written(sealed(body), 0, 0, np.zeros(0, np.int32))
