"""Examples with images that a test can tell apart, in a module that other processes import."""

import numpy as np
from reconstruction import SPECIAL, numbered_documents

from t5g2.data.image_examples import ImageExample, ImagePrefix, ImageSlot
from t5g2.data.mixture import Mixture, Source
from t5g2.data.sources.records import BadRecord, BadRecords

BOI, EOI, IMAGE = 5, 6, 7
PER_IMAGE = 4


class Pictures:
    """Captions of `images[i]` images, every token and pixel of which is of one example alone."""

    slot = ImageSlot("images", (2, 2, 3), np.dtype(np.uint8))

    def __init__(self, images: list[int], captions: list[int], max_bad: int = 0) -> None:
        self.counts, self.captions = images, captions
        self.tokens = numbered_documents([2 * n for n in captions])
        self.bad = BadRecords(max_bad)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.example(index).ids

    def example(self, index: int) -> ImageExample:
        before, after = np.split(self.tokens[index], 2)
        image = [BOI, *[IMAGE] * PER_IMAGE, EOI]
        prefix = [*before.tolist(), *image * self.counts[index]]
        ids = np.array([*prefix, *after.tolist()], np.int32)
        return ImageExample(ids, len(prefix), self.counts[index])

    def images(self, index: int) -> np.ndarray:
        first = sum(self.counts[:index])
        numbers = np.arange(first, first + self.counts[index]) + 1
        pixels = np.stack([numbers % 251, numbers // 251, numbers * 0 + 9], axis=1)
        return np.broadcast_to(pixels[:, None, None], (len(numbers), 2, 2, 3)).astype(np.uint8)

    def refuse(self, index: int, problem: str) -> None:
        self.bad.add("pictures", index, BadRecord(f"picture {index}: {problem}"))


def pictures_and_text(count: int = 40, **more) -> Mixture:
    """As many pictures as documents of text, of which some fill many rows."""
    rng = np.random.default_rng(0)
    images, captions = rng.integers(1, 4, count).tolist(), rng.integers(1, 30, count).tolist()
    text = numbered_documents(rng.integers(1, 900, count).tolist())
    pictures = Source(
        name="pictures", documents=Pictures(images, captions, **more), denoisers=(ImagePrefix(),)
    )
    return Mixture(sources=(pictures, Source(name="text", documents=text)), special=SPECIAL)
