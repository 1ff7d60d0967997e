"""What a run starts from: random parameters or given ones, and the teacher it may have."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from t5g2 import config
from t5g2.data.corpus import TokenizerConfig
from t5g2.data.tokenizer import Tokenizer, load_tokenizer
from t5g2.errors import UserError
from t5g2.files import to_path
from t5g2.kernels.layout import Layout
from t5g2.models.config import EXECUTION_FIELDS, ModelConfig
from t5g2.models.t5gemma2 import logical_axes
from t5g2.parallel.rules import parameter_shardings
from t5g2.pretrained import describe, read_params
from t5g2.settings import Settings, model_to_json
from t5g2.training.state import TrainState, make_initial_state, make_state_from
from t5g2.training.teacher import Teacher


def starting_tokenizer(settings: Settings) -> TokenizerConfig:
    """The settings' tokenizer, or that of `train.init_from` where they name none.

    Raises:
        UserError: `train.init_from` is no checkpoint, or holds another model.
    """
    if settings.train.init_from is None:
        return settings.tokenizer
    source = describe(to_path(settings.train.init_from))
    differing = config.differences(
        {"model": model_to_json(source.config)},
        {"model": model_to_json(settings.model)},
        ignore={f"model.{name}" for name in EXECUTION_FIELDS},
    )
    if differing:
        raise UserError(
            f"train.init_from: {settings.train.init_from} holds another model than the settings "
            f"name: {'; '.join(differing)}"
        )
    if settings.tokenizer.path is not None:
        return settings.tokenizer
    return dataclasses.replace(settings.tokenizer, path=str(source.tokenizer))


def make_first_state(
    settings: Settings, optimizer: optax.GradientTransformation, shardings: Any
) -> TrainState:
    """Step 0, on the devices: parameters from `train.init_from`, or random; fresh optimizer."""
    if settings.train.init_from is None:
        return make_initial_state(settings.model, optimizer, shardings, settings.train.seed)
    params = read_params(to_path(settings.train.init_from), settings.model)
    return make_state_from(params, optimizer, shardings)


def load_teacher(path: Path, student: ModelConfig, tokenizer: Tokenizer, layout: Layout) -> Teacher:
    """Reads a teacher onto the devices, its weights in the dtype that it computes in.

    Args:
        path: checkpoint, or Hugging Face directory of T5Gemma 2.
        student: the model that is trained.
        tokenizer: of the run.
        layout: the mesh and its rules.

    Raises:
        UserError: it is neither, or speaks other tokens or sees less than the student.
    """
    config, tokenizer_path, _ = describe(path)
    theirs = load_tokenizer(tokenizer_path)
    if config.vocab_size != student.vocab_size or _pieces(theirs) != _pieces(tokenizer):
        raise UserError(
            f"train.teacher: {path} has another vocabulary than the run: a teacher must speak the "
            "student's tokens"
        )
    if student.vision is not None and config.vision is None:
        raise UserError(
            f"train.teacher: {path} has no vision tower but the model has: set model.vision = None "
            "or name a teacher that reads images"
        )
    params = read_params(path, config)
    shardings = parameter_shardings(layout, logical_axes(config), params)

    def place(array: np.ndarray, sharding: Any) -> Array:
        return jax.device_put(np.asarray(array, jnp.dtype(config.dtype)), sharding)

    return Teacher(jax.tree.map(place, params, shardings), config, tokenizer.sentinel_ids)


def _pieces(tokenizer: Tokenizer) -> list[str]:
    # Files of the two kinds write a space differently.
    return [tokenizer.id_to_piece(token).replace("▁", " ") for token in range(tokenizer.vocab_size)]
