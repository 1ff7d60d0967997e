"""A trained model with its tokenizer, from a t5g2 checkpoint or a Hugging Face directory."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from t5g2 import settings
from t5g2.checkpoints.store import read_arrays, read_meta
from t5g2.data.tokenizer import Tokenizer, load_tokenizer
from t5g2.errors import UserError
from t5g2.interop.hf import load_hf_params, read_hf_config
from t5g2.interop.hf_config import from_hf_config
from t5g2.models import generation
from t5g2.models.config import ModelConfig
from t5g2.models.t5gemma2 import from_parameters


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

        Raises:
            UserError: `pixel_values` are given; models here have no vision tower.
        """
        _refuse_images(pixel_values)
        return _logits(self.model, input_ids, decoder_input_ids, attention_mask)

    def encode(self, text: str) -> Int[np.ndarray, " n"]:
        """Encoder tokens of a prompt: bos, the text, and sentinels where it names them.

        `<sentinel_0>`, `<sentinel_1>`, ... mark what is to be filled in. A text without one is
        to be continued: it ends with the first sentinel, as in prefix language modelling.

        Raises:
            UserError: the text names a sentinel that the tokenizer does not have.
        """
        tokenizer = self.tokenizer
        parts = re.split(r"<sentinel_(\d+)>", text)
        if len(parts) == 1:
            parts = [text, "0", ""]
        ids = [np.array([tokenizer.bos_id])]
        for i, part in enumerate(parts):
            if i % 2 == 0:
                ids.append(tokenizer.encode(part))
            elif int(part) < len(tokenizer.sentinel_ids):
                ids.append(np.array([tokenizer.sentinel_ids[int(part)]]))
            else:
                raise UserError(
                    f"<sentinel_{part}>: the tokenizer has {len(tokenizer.sentinel_ids)} sentinels"
                )
        return np.concatenate(ids).astype(np.int32)

    def generate_ids(
        self,
        prompts: Sequence[Int[np.ndarray, " n"]],
        max_new_tokens: int,
        sampling: generation.Sampling = generation.GREEDY,
    ) -> list[Int[np.ndarray, " n"]]:
        """Generates from encoder tokens, one batch; ends each at eos, which is left out."""
        ids, mask = _right_padded(prompts, self.tokenizer.pad_id)
        made = generation.generate(
            self.model,
            jnp.asarray(ids),
            jnp.asarray(mask),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_ids=(self.tokenizer.eos_id,),
        )
        ends = [np.flatnonzero(row == self.tokenizer.eos_id) for row in made]
        return [row[: end[0]] if len(end) else row for row, end in zip(made, ends, strict=True)]

    def generate(
        self,
        text: str,
        image: str | Path | None = None,
        max_new_tokens: int = 64,
        sampling: generation.Sampling = generation.GREEDY,
    ) -> str:
        """Continues a text, or fills in its sentinels (see `encode`).

        Returns:
            The continuation; of a text with sentinels, each sentinel followed by what fills it.

        Raises:
            UserError: an image is given; models here have no vision tower.
        """
        _refuse_images(image)
        (ids,) = self.generate_ids([self.encode(text)], max_new_tokens, sampling)
        return self.decode(text, ids)

    def stream(
        self, text: str, max_new_tokens: int, sampling: generation.Sampling
    ) -> Iterator[str]:
        """As `generate`, piece by piece."""
        ids: list[int] = []
        shown = ""
        for step in generation.stream(
            self.model,
            jnp.asarray(self.encode(text)[None]),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            eos_ids=(self.tokenizer.eos_id,),
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


def _refuse_images(given: object) -> None:
    if given is not None:
        raise UserError(
            "an image was given, but this model reads text alone: it has no vision tower"
        )


_logits = nnx.jit(lambda model, *arguments: model(*arguments))


def _right_padded(
    rows: Sequence[Int[np.ndarray, " n"]], pad_id: int
) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, "B S"]]:
    ids = np.full((len(rows), max(map(len, rows))), pad_id, np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


class Description(NamedTuple):
    """What a checkpoint or Hugging Face directory says of itself, without its parameters.

    Attributes:
        config: its hyperparameters.
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
    if _is_hf(path):
        return Description(from_hf_config(read_hf_config(path)), path, {})
    meta = read_meta(path)
    return Description(settings.model_of(meta), path / meta["tokenizer"], meta)


def read_params(path: Path, config: ModelConfig) -> Any:
    """The parameters, numpy arrays as by `parameter_tree`, of what `describe` describes.

    Raises:
        UserError: they are damaged.
    """
    return load_hf_params(path, config) if _is_hf(path) else read_arrays(path / "params")


def _is_hf(path: Path) -> bool:
    return (path / "config.json").is_file()


def load(path: str | Path) -> Pretrained:
    """Loads a t5g2 checkpoint or a Hugging Face directory of T5Gemma 2, tokenizer included.

    Raises:
        UserError: it is neither, or it is damaged.
    """
    path = Path(path)
    config, tokenizer, meta = describe(path)
    return Pretrained(config, read_params(path, config), load_tokenizer(tokenizer), meta)
