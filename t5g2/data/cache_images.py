"""Images with text in a cache: what is stored, and reading it.

A document holds the numbers of its images among those of its source. These are stored once each:
as the files they came from, or as the visual tokens that a frozen tower makes of them.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from t5g2 import config
from t5g2.data.cache import CachedRecords
from t5g2.data.cache_format import Plan, body_of, sealed
from t5g2.data.image_examples import ImageExample, ImageSlot, Tokens
from t5g2.data.images import image_tokens, open_image, preprocess
from t5g2.data.sources.records import BadRecord, BadRecords
from t5g2.errors import UserError
from t5g2.models.config import ModelConfig

# Prefix, number of images, and the numbers of the images stand before the token ids.
_HEAD = np.dtype("<u4")


def to_image_record(example: ImageExample, numbers: Sequence[int], dtype: np.dtype) -> bytes:
    """An example, and the numbers of its images, as a record."""
    head = np.array([example.prefix, len(numbers), *numbers], _HEAD)
    return sealed(head.tobytes() + example.ids.astype(dtype).tobytes())


def from_image_record(record: bytes, dtype: np.dtype) -> tuple[ImageExample, list[int]]:
    """What `to_image_record` was given.

    Raises:
        ValueError: the checksum does not match.
    """
    body = body_of(record)
    prefix, images = np.frombuffer(body, _HEAD, 2).tolist()
    numbers = np.frombuffer(body, _HEAD, images, 2 * _HEAD.itemsize).tolist()
    ids = np.frombuffer(body, dtype, offset=(2 + images) * _HEAD.itemsize).astype(np.int32)
    return ImageExample(ids, prefix, images), numbers


class CachedImageTexts:
    """Images with text in one split of a cache; `ImageExamples`.

    Attributes:
        slot: pixels, or a tower's visual tokens.
        bad: the bad records of all sources: those that are refused.
    """

    def __init__(
        self,
        source: str,
        documents: CachedRecords,
        images: CachedRecords,
        dtype: np.dtype,
        slot: ImageSlot,
        bad: BadRecords,
    ) -> None:
        """Takes the two parts of a source.

        Args:
            source: the source's name.
            documents: examples.
            images: those of all splits.
            dtype: of the stored token ids.
            slot: the form of the images.
            bad: see above.
        """
        self.source = source
        self.slot = slot
        self.bad = bad
        self._documents = documents
        self._images = images
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Tokens:
        return self.example(index).ids

    def __iter__(self) -> Iterator[Tokens]:
        return (self[i] for i in range(len(self)))

    def example(self, index: int) -> ImageExample:
        """See `ImageExamples`.

        Raises:
            UserError: a damaged shard.
        """
        return self._read(index)[0]

    def images(self, index: int) -> np.ndarray:
        """See `ImageExamples`.

        Raises:
            UserError: a damaged shard.
        """
        return np.stack([self._images.read(n, self._image) for n in self._read(index)[1]])

    def refuse(self, index: int, problem: str) -> None:
        """See `ImageExamples`."""
        place = f"source {self.source}, document {index}"
        self.bad.add(self.source, index, BadRecord(f"{place}: {problem}"))

    def _read(self, index: int) -> tuple[ImageExample, list[int]]:
        return self._documents.read(index, lambda record: from_image_record(record, self._dtype))

    def _image(self, record: bytes) -> Int[np.ndarray, "..."]:
        body = body_of(record)
        if self.slot.name == "image_features":
            return np.frombuffer(body, self.slot.dtype).reshape(self.slot.shape)
        return preprocess(open_image(bytes(body)), self.slot.shape[0])


def images_plan(model: ModelConfig, tower: str | None) -> dict[str, dict[str, Any]]:
    """What the images of a cache depend on, as sections of its plan.

    Args:
        model: reads the images.
        tower: fingerprint of the tower whose visual tokens are stored; None: pixels are.
    """
    plan = {"images": dataclasses.asdict(image_tokens(model))}
    if tower is not None:
        assert model.vision is not None
        tokens = {"boi_id", "image_id"}
        settings = dataclasses.asdict(model.vision)
        vision = {name: value for name, value in settings.items() if name not in tokens}
        plan["vision"] = {**vision, "tower": tower}
    return plan


def check_images_plan(directory: Path, plan: Plan, model: ModelConfig) -> str | None:
    """Refuses a model that reads images otherwise than the one that a cache was made for.

    Args:
        directory: the cache.
        plan: of its manifest.
        model: to be trained from it.

    Returns:
        The fingerprint of the tower whose visual tokens are stored; None: images are.

    Raises:
        UserError: naming what differs.
    """
    made: Plan = {name: plan[name] for name in ("images", "vision") if name in plan}
    tower = made.get("vision", {}).get("tower")
    changed = config.differences(made, images_plan(model, tower))
    if changed:
        raise UserError(
            f"corpus.cache: {directory} was made for a model that reads images otherwise: "
            f"{'; '.join(changed)}: make another cache, or set model.vision as it was"
        )
    return tower
