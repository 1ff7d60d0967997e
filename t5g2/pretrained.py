"""A trained model with its tokenizer, from a t5g2 checkpoint or a Hugging Face directory."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from t5g2 import settings
from t5g2.checkpoints.store import read_arrays, read_meta
from t5g2.data.images import (
    START_OF_IMAGE,
    check_image_count,
    encode_with_images,
    image_tokens,
    open_image,
    pan_and_scan,
    preprocess,
)
from t5g2.data.tokenizer import Tokenizer, load_tokenizer
from t5g2.errors import UserError
from t5g2.files import marked_partial, to_path
from t5g2.interop.hf import load_hf_params, read_hf_config
from t5g2.interop.hf_config import from_hf_config
from t5g2.models import generation
from t5g2.models.config import ModelConfig
from t5g2.models.t5gemma2 import from_parameters
from t5g2.models.vision import images_by_row


class Prompt(NamedTuple):
    """What the encoder is given: token ids, and images (bytes) in the order of their places."""

    ids: Int[np.ndarray, " n"]
    images: UInt8[np.ndarray, "M size size 3"] | None = None


class Pretrained:
    """A model ready to use.

    Attributes:
        config: its hyperparameters.
        params: its parameters, numpy arrays structured as by `parameter_tree`.
        model: the module that computes with them.
        tokenizer: its tokenizer.
        meta: what its checkpoint says of itself; empty for a Hugging Face directory.
    """

    def __init__(
        self, config: ModelConfig, params: Any, tokenizer: Tokenizer, meta: dict[str, Any]
    ) -> None:
        self.config = config
        self.params = params
        self.tokenizer = tokenizer
        self.meta = meta
        self.model = from_parameters(config, jax.tree.map(jnp.asarray, params))

    def logits(
        self,
        input_ids: Int[Array, "B S"],
        decoder_input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B S"] | None = None,
        pixel_values: Float[Array, "images 3 height width"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits, float32 [B, T, V], of encoder tokens and (shifted) decoder tokens.

        Args:
            input_ids: encoder tokens; an image has its `tokens_per_image` places among them.
            decoder_input_ids: decoder tokens, which start with bos.
            attention_mask: 1 for real encoder tokens, 0 for padding; None: all are real.
            pixel_values: images in [-1, 1] in the order of their places, as transformers'
                processor gives them.

        Raises:
            UserError: images for a model without vision tower, of another size, or for other
                places than `input_ids` has.
        """
        images = None
        if pixel_values is not None:
            pixels = np.asarray(pixel_values)
            channels_last = np.moveaxis(pixels, 1, -1) if pixels.ndim == 4 else pixels
            images = images_by_row(self.config, np.asarray(input_ids), channels_last)
        return _logits(self.model, input_ids, decoder_input_ids, attention_mask, images)

    def encode(
        self, text: str, images: Sequence[str | Path] = (), *, pan_and_scan: bool = False
    ) -> Prompt:
        """What the encoder reads of a prompt: bos, text, sentinels and images.

        `<sentinel_0>`, `<sentinel_1>`, ... mark what is to be filled in. A text without one is
        to be continued: it ends with the first sentinel, as in prefix language modelling.

        Args:
            text: the prompt, with one `<start_of_image>` for each image; without any, the images
                stand before the text.
            images: image files.
            pan_and_scan: whether long images are also shown in crops (`t5g2.data.images`).

        Raises:
            UserError: the text names a sentinel that the tokenizer does not have, or another
                number of images than are given; an unreadable image; a model that reads none.
        """
        tokenizer, vision = self.tokenizer, self.config.vision
        if images and vision is None:
            raise UserError(
                "an image was given, but this model reads text alone: it has no vision tower"
            )
        pixels, crops = self._views(images, pan_and_scan)
        if images and START_OF_IMAGE not in text:
            text = START_OF_IMAGE * len(images) + text
        parts = re.split(r"<sentinel_(\d+)>", text)
        if len(parts) == 1:
            parts = [text, "0", ""]
        if vision is not None:
            check_image_count(text, len(images))
        ids = [np.array([tokenizer.bos_id])]
        for i, part in enumerate(parts):
            if i % 2 == 0 and vision is not None:
                count = part.count(START_OF_IMAGE)
                tokens = image_tokens(self.config)
                ids.append(encode_with_images(tokenizer, part, crops[:count], tokens))
                crops = crops[count:]
            elif i % 2 == 0:
                ids.append(tokenizer.encode(part))
            elif int(part) < len(tokenizer.sentinel_ids):
                ids.append(np.array([tokenizer.sentinel_ids[int(part)]]))
            else:
                raise UserError(
                    f"<sentinel_{part}>: the tokenizer has {len(tokenizer.sentinel_ids)} sentinels"
                )
        return Prompt(np.concatenate(ids).astype(np.int32), pixels)

    def _views(
        self, images: Sequence[str | Path], with_crops: bool
    ) -> tuple[UInt8[np.ndarray, "M size size 3"] | None, list[int]]:
        """Each image followed by its crops, ready for the tower; and the number of each's crops."""
        if not images or self.config.vision is None:
            return None, []
        size = self.config.vision.image_size
        views, crops = [], []
        for source in images:
            image = open_image(source)
            parts = pan_and_scan(image) if with_crops else []
            views += [preprocess(view, size) for view in (image, *parts)]
            crops.append(len(parts))
        return np.stack(views), crops

    def generate_ids(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: generation.Sampling = generation.GREEDY,
        *,
        streams: Int[np.ndarray, " B"] | None = None,
    ) -> list[Int[np.ndarray, " n"]]:
        """Generates from encoder tokens, one batch; ends each at eos, which is left out.

        Arguments are those of `generation.generate`.
        """
        ids, mask = right_padded([prompt.ids for prompt in prompts], self.tokenizer.pad_id)
        images = [prompt.images for prompt in prompts if prompt.images is not None]
        made = generation.generate(
            self.model,
            ids,
            mask,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_ids=(self.tokenizer.eos_id,),
            streams=streams,
            images=np.concatenate(images) if images else None,
        )
        ends = [np.flatnonzero(row == self.tokenizer.eos_id) for row in made]
        return [row[: end[0]] if len(end) else row for row, end in zip(made, ends, strict=True)]

    def generate(
        self,
        text: str,
        image: str | Path | Sequence[str | Path] | None = None,
        max_new_tokens: int = 64,
        sampling: generation.Sampling = generation.GREEDY,
        *,
        pan_and_scan: bool = False,
    ) -> str:
        """Continues a text, or fills in its sentinels, given images or not (see `encode`).

        Returns:
            The continuation; of a text with sentinels, each sentinel followed by what fills it.

        Raises:
            UserError: as `encode`.
        """
        prompt = self.encode(text, _listed(image), pan_and_scan=pan_and_scan)
        (ids,) = self.generate_ids([prompt], max_new_tokens, sampling)
        return self.decode(text, ids)

    def stream(
        self,
        text: str,
        image: str | Path | Sequence[str | Path] | None = None,
        max_new_tokens: int = 64,
        sampling: generation.Sampling = generation.GREEDY,
        *,
        pan_and_scan: bool = False,
    ) -> Iterator[str]:
        """As `generate`, piece by piece."""
        prompt = self.encode(text, _listed(image), pan_and_scan=pan_and_scan)
        ids: list[int] = []
        shown = ""
        for step in generation.stream(
            self.model,
            jnp.asarray(prompt.ids[None]),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_ids=(self.tokenizer.eos_id,),
            images=None if prompt.images is None else jnp.asarray(prompt.images),
        ):
            if int(step[0]) == self.tokenizer.eos_id:
                break
            ids.append(int(step[0]))
            now = self.decode(text, ids)
            # A character may take several tokens; it is shown once it is whole.
            if not now.endswith("\N{REPLACEMENT CHARACTER}"):
                yield now[len(shown) :]
                shown = now

    def decode(self, prompt: str, ids: Sequence[int] | np.ndarray) -> str:
        """Generated tokens as text; sentinels are shown if the prompt has some."""
        skip = re.search(r"<sentinel_\d+>", prompt) is None
        return self.tokenizer.decode(ids, skip_special=skip)


def _listed(image: str | Path | Sequence[str | Path] | None) -> Sequence[str | Path]:
    if image is None:
        return ()
    return (image,) if isinstance(image, str | Path) else image


_logits = nnx.jit(lambda model, *arguments: model(*arguments))


def right_padded(
    rows: Sequence[Int[np.ndarray, " n"]], pad_id: int, shortest: int | None = None
) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, "B S"]]:
    """Token ids of rows of unequal length, and a mask that is 1 where they are.

    Args:
        rows: token ids.
        pad_id: what follows them.
        shortest: pad to the power of two that holds the longest, at least this; None: no further
            than the longest.
    """
    length = max(map(len, rows))
    if shortest is not None:
        length = generation.bucket(length, shortest)
    ids = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


class Description(NamedTuple):
    """What a checkpoint or Hugging Face directory says of itself, without its parameters.

    Attributes:
        config: its hyperparameters; what it attended with in training is left open.
        tokenizer: the file or directory of its tokenizer.
        meta: a checkpoint's metadata; empty for a Hugging Face directory.
    """

    config: ModelConfig
    tokenizer: Path
    meta: dict[str, Any]


def describe(path: Path) -> Description:
    """Describes a t5g2 checkpoint or a Hugging Face directory of T5Gemma 2.

    Raises:
        UserError: it is neither.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a directory")
    if marked_partial(path):
        raise UserError(f"{path} is not whole: it is being written, or what wrote it was killed")
    if _is_hf(path):
        return Description(from_hf_config(read_hf_config(path)), path, {})
    meta = read_meta(path)
    config = dataclasses.replace(settings.model_of(meta), attention="auto")
    return Description(config, path / meta["tokenizer"], meta)


def read_params(path: Path, config: ModelConfig) -> Any:
    """The parameters, numpy arrays as by `parameter_tree`, of what `describe` describes.

    Raises:
        UserError: they are damaged.
    """
    return load_hf_params(path, config) if _is_hf(path) else read_arrays(path / "params")


def _is_hf(path: Path) -> bool:
    return (path / "config.json").is_file()


def load(path: str | Path, dtype: Literal["float32", "bfloat16"] | None = None) -> Pretrained:
    """Loads a t5g2 checkpoint or a Hugging Face directory of T5Gemma 2, tokenizer included.

    Args:
        path: the directory.
        dtype: what to compute in; None: float32 on a CPU, which is slower at bfloat16, and what
            the model was made for elsewhere.

    Raises:
        UserError: it is neither, or it is damaged.
    """
    path = to_path(path)
    config, tokenizer, meta = describe(path)
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else config.dtype
    config = dataclasses.replace(config, dtype=dtype)
    return Pretrained(config, read_params(path, config), load_tokenizer(tokenizer), meta)
