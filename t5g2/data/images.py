"""Images and the places in a text where they stand, as transformers' Gemma3Processor has them.

Pixels stay bytes here: `t5g2.models.vision.normalised` turns them into floats on the device.
"""

import dataclasses
import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, ImageOps

from t5g2.data.sentencepiece_trainer import (
    END_OF_IMAGE,
    FIRST_SENTINEL,
    IMAGE_PIECES,
    IMAGE_TOKEN,
    START_OF_IMAGE,
)
from t5g2.data.tokenizer import Tokenizer
from t5g2.errors import UserError
from t5g2.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTokens:
    """The ids that stand for an image; the defaults are those of T5Gemma 2.

    Attributes:
        boi_id: before an image.
        image_id: at the place of each visual token.
        eoi_id: after an image.
        per_image: visual tokens of an image.
    """

    boi_id: int = 255_999
    image_id: int = 256_001
    eoi_id: int = 256_000
    per_image: int = 256

    def ids(self) -> Int32[np.ndarray, " per_image+2"]:
        """The ids of one image."""
        return np.array([self.boi_id, *[self.image_id] * self.per_image, self.eoi_id], np.int32)


def image_tokens(model: ModelConfig) -> ImageTokens:
    """The image tokens of a model that reads images."""
    assert model.vision is not None
    return ImageTokens(
        boi_id=model.vision.boi_id,
        image_id=model.vision.image_id,
        eoi_id=model.eoi_id,
        per_image=model.vision.tokens_per_image,
    )


def check_image_pieces(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Makes sure that the model's image tokens are those of a tokenizer, or reserved in it.

    Raises:
        UserError: naming the setting that is not, and what it should be.
    """
    tokens = image_tokens(model)
    for name, token, piece in (
        ("model.vision: boi_id", tokens.boi_id, START_OF_IMAGE),
        ("model.eoi_id", tokens.eoi_id, END_OF_IMAGE),
        ("model.vision: image_id", tokens.image_id, IMAGE_TOKEN),
    ):
        found = tokenizer.id_to_piece(token) if token < tokenizer.vocab_size else None
        # Gemma 3's tokenizer has a reserved piece where T5Gemma 2's has the image token.
        if found == piece or (found is not None and re.fullmatch(r"<unused\d+>", found)):
            continue
        pieces = map(tokenizer.id_to_piece, range(tokenizer.vocab_size))
        right = next((i for i, other in enumerate(pieces) if other == piece), None)
        advice = "use a tokenizer with image tokens" if right is None else f"set it to {right}"
        was = "beyond its vocabulary" if found is None else f"the piece {found!r}"
        raise UserError(
            f"{name} = {token} is {was} in the tokenizer {tokenizer.path}, not {piece}: {advice}"
        )


def check_trained_ids(model: ModelConfig, sentinels: int) -> None:
    """Makes sure that the model's image tokens are where a tokenizer that a run trains has them.

    Raises:
        UserError: naming the settings and what they should be.
    """
    tokens = image_tokens(model)
    boi_id, eoi_id, image_id = trained_ids(sentinels)
    if (tokens.boi_id, tokens.eoi_id, tokens.image_id) != (boi_id, eoi_id, image_id):
        raise UserError(
            f"the tokenizer that the run trains has its image tokens behind the sentinels: set "
            f"'boi_id': {boi_id} and 'image_id': {image_id} in model.vision, not {tokens.boi_id} "
            f"and {tokens.image_id}, and model.eoi_id = {eoi_id}, not {tokens.eoi_id}; or give "
            "tokenizer.path"
        )


def trained_ids(sentinels: int) -> range:
    """Where a tokenizer that a run trains has `IMAGE_PIECES`: behind its sentinels."""
    first = FIRST_SENTINEL + sentinels
    return range(first, first + len(IMAGE_PIECES))


def shortened(text: str) -> str:
    """Text in which the places of an image's tokens are a number: `<image_soft_token>×256`."""
    return re.sub(
        r"(<[^<>\s]+>)\1+", lambda found: f"{found[1]}×{len(found[0]) // len(found[1])}", text
    )


def open_image(source: str | os.PathLike[str] | bytes | Image.Image) -> Image.Image:
    """Reads an image as RGB, the way Gemma3Processor reads what it is given.

    That way differs by kind: a file is turned upright by its EXIF orientation and loses its alpha
    channel; an image of Pillow's stays as it lies and is laid on white. In both, a single colour
    marked transparent becomes white, samples of more than 8 bits are not scaled but capped at 255,
    and of an animation the first frame is taken.

    Args:
        source: a file, the bytes of one, or an image of Pillow's.

    Raises:
        UserError: no such file; a broken one; no image or an empty one; one of more pixels than
            Pillow puts up with (`2 * PIL.Image.MAX_IMAGE_PIXELS`).
    """
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or "the image given"
    elif isinstance(source, bytes):
        name = f"the {len(source):,} bytes given as an image"
    else:
        name = os.fspath(source)
        try:
            source = Path(source).read_bytes()
        except OSError as error:
            raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    try:
        if isinstance(source, bytes):
            with Image.open(io.BytesIO(source)) as file:
                source = ImageOps.exif_transpose(file).convert("RGB")
        image = _on_white(source)
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: no image of a kind that Pillow reads") from None
    # Broken files make Pillow raise nearly anything: SyntaxError, struct.error, IndexError...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: cannot be decoded as an image: {reason}") from None
    if 0 in image.size:
        raise UserError(f"{name}: an image of {image.width} by {image.height} pixels")
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def preprocess(image: Image.Image, size: int = 896) -> UInt8[np.ndarray, "size size 3"]:
    """Resizes to a square, bilinearly and whatever the aspect ratio, as Gemma3Processor does.

    Args:
        image: RGB.
        size: height and width of what the vision tower reads, in pixels.
    """
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def pan_and_scan(
    image: Image.Image,
    *,
    min_crop_size: int = 256,
    max_crops: int = 4,
    min_ratio: float = 1.2,
) -> list[Image.Image]:
    """Cuts a long image into crops side by side, for the model to see besides the whole.

    Pan and scan is for inference (arXiv:2503.19786, section 2.2).

    Args:
        image: RGB.
        min_crop_size: no crops where one would have a side of fewer pixels.
        max_crops: at most so many crops.
        min_ratio: no crops where the longer side is less than so many times the shorter.

    Returns:
        No crop, or 2 to `max_crops` along the longer side; the last may be a little shorter.
    """
    width, height = image.size
    longer, shorter = max(width, height), min(width, height)
    if longer / shorter < min_ratio:
        return []
    count = min(math.floor(longer / shorter + 0.5), longer // min_crop_size)
    count = min(max(count, 2), max_crops)
    step = math.ceil(longer / count)
    if min(step, shorter) < min_crop_size:
        return []
    bounds = [(start, min(start + step, longer)) for start in range(0, step * count, step)]
    if width >= height:
        return [image.crop((start, 0, end, height)) for start, end in bounds]
    return [image.crop((0, start, width, end)) for start, end in bounds]


def expand_image_placeholders(
    text: str, crops_per_image: Sequence[int], tokens_per_image: int = 256
) -> str:
    """Spells out the tokens of every image of a text.

    Args:
        text: with one `<start_of_image>` for each image.
        crops_per_image: for each image the number of its crops (`pan_and_scan`), which stand
            behind it; 0: the image alone.
        tokens_per_image: visual tokens of an image or crop.

    Raises:
        UserError: there are not as many `<start_of_image>` as images.
    """
    expanded = START_OF_IMAGE + IMAGE_TOKEN * tokens_per_image + END_OF_IMAGE
    return _with_crops(text, crops_per_image).replace(START_OF_IMAGE, expanded)


def encode_with_images(
    tokenizer: Tokenizer, text: str, crops_per_image: Sequence[int], tokens: ImageTokens
) -> Int32[np.ndarray, " n"]:
    """The ids of `expand_image_placeholders(text, crops_per_image)`, bos not among them.

    The text between two images is encoded as a whole, because the blank lines around an image may
    make one piece with newlines beside them.

    Raises:
        UserError: there are not as many `<start_of_image>` as images.
    """
    image = tokens.ids()
    parts: list[np.ndarray] = []
    for segment in _with_crops(text, crops_per_image).split(START_OF_IMAGE):
        parts += [image, tokenizer.encode(segment)]
    return np.concatenate(parts[1:])


def check_image_count(text: str, images: int) -> None:
    """Makes sure that a text has one `<start_of_image>` for each image.

    Raises:
        UserError: it has not.
    """
    markers = text.count(START_OF_IMAGE)
    if markers != images:
        raise UserError(
            f"the text has {markers} {START_OF_IMAGE} for {images} "
            f"image{'' if images == 1 else 's'}: write one where each image belongs"
        )


def _with_crops(text: str, crops_per_image: Sequence[int]) -> str:
    """The text with a marker for every crop too, and with the words and blank lines around them."""
    check_image_count(text, len(crops_per_image))
    parts = text.split(START_OF_IMAGE)
    marker = f"\n\n{START_OF_IMAGE}\n\n"
    out = [parts[0]]
    for crops, following in zip(crops_per_image, parts[1:], strict=True):
        if crops:
            out += [f"Here is the original image {marker} and here are some crops "]
            out += ["to help you see better ", " ".join([marker] * crops)]
        else:
            out.append(marker)
        out.append(following)
    return "".join(out)
