"""What a new run starts from: random parameters, or those that `train.init_from` names."""

import dataclasses
from pathlib import Path
from typing import Any

import optax

from t5g2 import config
from t5g2.data.corpus import TokenizerConfig
from t5g2.errors import UserError
from t5g2.models.config import EXECUTION_FIELDS
from t5g2.pretrained import describe, read_params
from t5g2.settings import Settings, model_to_json
from t5g2.training.state import TrainState, make_initial_state, make_state_from


def starting_tokenizer(settings: Settings) -> TokenizerConfig:
    """The settings' tokenizer, or that of `train.init_from` where they name none.

    Raises:
        UserError: `train.init_from` is no checkpoint, or holds another model.
    """
    if settings.train.init_from is None:
        return settings.tokenizer
    source = describe(Path(settings.train.init_from))
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
    params = read_params(Path(settings.train.init_from), settings.model)
    return make_state_from(params, optimizer, shardings)
