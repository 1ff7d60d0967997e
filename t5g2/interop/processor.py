"""Writes what makes transformers' AutoProcessor read an exported directory as a Gemma3Processor."""

import json
import os
from pathlib import Path

from t5g2.data.tokenizer import Tokenizer

# Pillow's number of the bilinear filter.
BILINEAR = 2


def image_pieces(
    tokenizer: Tokenizer, *, boi_id: int, image_id: int, eoi_id: int
) -> dict[str, str]:
    """The image tokens for `export_tokenizer`, whatever the tokenizer calls them.

    The id decides: Gemma 3's tokenizer has `<unused99>` where T5Gemma 2's has the image token, and
    its own image token beyond T5Gemma 2's vocabulary.

    Raises:
        IndexError: an id that the tokenizer does not have.
    """
    ids = {"boi_token": boi_id, "eoi_token": eoi_id, "image_token": image_id}
    return {name: tokenizer.id_to_piece(token) for name, token in ids.items()}


def write_processor(
    out_dir: str | os.PathLike[str], *, image_size: int, tokens_per_image: int
) -> None:
    """Writes `processor_config.json`, as transformers 5.23 saves a Gemma3Processor.

    The tokenizer beside it must have image tokens: `export_tokenizer(..., image_pieces(...))`.

    Args:
        out_dir: an existing directory.
        image_size: height and width of the images that the vision tower reads, in pixels.
        tokens_per_image: tokens that an image takes in the encoder's input.
    """
    config = {
        "image_processor": {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Gemma3ImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "resample": BILINEAR,
            "rescale_factor": 1 / 255,
            "size": {"height": image_size, "width": image_size},
        },
        "image_seq_length": tokens_per_image,
        "processor_class": "Gemma3Processor",
    }
    text = json.dumps(config, indent=2) + "\n"
    (Path(out_dir) / "processor_config.json").write_text(text)
