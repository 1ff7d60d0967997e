"""Examples with a prompt of their own as rows hold them: whole or not at all.

The prompt is what the encoder reads, images among it or not; the decoder learns what follows it.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np
from jaxtyping import Int

from t5g2.data.ul2 import Denoiser, Example, SpecialTokens
from t5g2.models.config import ModelConfig

Tokens = Int[np.ndarray, " n"]


class ImageExample(NamedTuple):
    """A record: the encoder reads `ids[:prefix]` and the images, the decoder learns the rest.

    Attributes:
        ids: token ids without bos and eos; none of a record that is passed over.
        prefix: tokens of the prompt; with images up to the end of the last one and the blank line
            behind it. They are what the encoder gets at inference for a prompt that ends there.
        images: how many images have their places in the prefix; 0 of prompted text.
    """

    ids: Tokens
    prefix: int
    images: int


NOTHING = ImageExample(np.empty(0, np.int32), 0, 0)


class ImageSlot(NamedTuple):
    """What a batch holds of one image.

    Attributes:
        name: the batch's key: "images" or "image_features".
        shape: [size, size, 3] of pixels, or [N, W] of a tower's visual tokens.
        dtype: uint8, or bfloat16.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


def pixel_slot(model: ModelConfig) -> ImageSlot:
    """What a batch holds of an image that the tower is yet to read."""
    assert model.vision is not None
    size = model.vision.image_size
    return ImageSlot("images", (size, size, 3), np.dtype(np.uint8))


def feature_slot(model: ModelConfig) -> ImageSlot:
    """What a batch holds of an image that the tower has read."""
    vision = model.vision
    assert vision is not None
    shape = (vision.tokens_per_image, vision.hidden_size)
    return ImageSlot("image_features", shape, np.dtype(ml_dtypes.bfloat16))


class ImageExamples(Protocol):
    """Examples by number, and the images of each; reading one twice gives the same.

    Attributes:
        slot: what a batch holds of an image; None: no example has images.
    """

    slot: ImageSlot | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tokens:
        """The ids of an example."""

    def example(self, index: int) -> ImageExample:
        """An example, without its images."""

    def images(self, index: int) -> np.ndarray:
        """Its images, each as `slot` says, in the order of their places."""

    def refuse(self, index: int, problem: str) -> None:
        """Says that an example cannot be used: it is a bad record.

        Raises:
            UserError: there are more of these than may be.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagePrefix:
    """The one task of examples with a prompt: the text after the prompt is the target.

    Examples look as those of a prefix-LM `Denoiser` do, but for where they are divided.

    Attributes:
        name: what it is called in metrics.
        weight: as a denoiser's; there is no other one in its source.
        mode: as a denoiser's.
        mode_ids: as a denoiser's.
    """

    name: str = "prefix"
    weight: float = 1.0
    mode: str | None = None
    mode_ids: tuple[int, ...] = ()

    def lengths(self, example: ImageExample, special: SpecialTokens) -> tuple[int, int]:
        """Lengths of inputs and targets that an example becomes."""
        head = special.bos_on_inputs + len(self.mode_ids)
        return head + example.prefix + 1, len(example.ids) - example.prefix + 2

    def __call__(self, example: ImageExample, special: SpecialTokens) -> Example:
        """Inputs: (bos,) (mode,) prefix, sentinel. Targets: the sentinel, the rest, eos."""
        ids, prefix, _ = example
        head = [*([special.bos_id] if special.bos_on_inputs else []), *self.mode_ids]
        sentinel = special.sentinel_ids[0]
        return Example(
            np.concatenate([head, ids[:prefix], [sentinel]]).astype(np.int32),
            np.concatenate([[sentinel], ids[prefix:], [special.eos_id]]).astype(np.int32),
        )


def image_prefix(denoisers: Sequence[Denoiser]) -> ImagePrefix:
    """The task of prompts beside denoisers: in the mode of their prefix language modelling."""
    for denoiser in denoisers:
        if denoiser.mean_span is None:
            return ImagePrefix(mode=denoiser.mode, mode_ids=denoiser.mode_ids)
    return ImagePrefix()
