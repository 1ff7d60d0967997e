"""A vision tower for a model that has none, from a directory that has one."""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from t5g2.errors import UserError
from t5g2.lazy_array import LazyArray
from t5g2.models.config import ModelConfig

# Of a projector that no directory has: the same one at every import.
PROJECTOR_SEED = 0

logger = logging.getLogger(__name__)


def with_tower(
    model: tuple[ModelConfig, dict[str, Any]], donor: tuple[ModelConfig, dict[str, Any]], path: Path
) -> tuple[ModelConfig, dict[str, Any]]:
    """The model with the donor's tower and image tokens; its end-of-image token stays its own.

    The donor's projector is taken if it projects to the model's width. If not, a new one is drawn
    from N(0, initializer_range²), and a logged line says so: `docs/decisions/0006`.

    Args:
        model: configuration and parameters of a model without tower.
        donor: of one with a tower.
        path: the donor's directory, for messages.

    Raises:
        UserError: the donor has no tower, the model has one, or its vocabulary lacks the image
            tokens.
    """
    (config, params), (theirs, towers) = model, donor
    if config.vision is not None:
        raise UserError("the model has a vision tower of its own: leave out --vision_from")
    if theirs.vision is None:
        raise UserError(f"{path} has no vision tower: name a directory with one in --vision_from")
    try:
        config = dataclasses.replace(config, vision=theirs.vision)
    except ValueError as error:
        raise UserError(f"{path} does not go with the model: {error}") from error
    projector = towers["projector"]
    if theirs.hidden_size != config.hidden_size:
        logger.warning(
            "%s: its projector is for a model of width %d, not %d: a new one is drawn, "
            "N(0, %g^2), seed %d",
            path,
            theirs.hidden_size,
            config.hidden_size,
            config.initializer_range,
            PROJECTOR_SEED,
        )
        projector = _new_projector(config, params["embedder"]["table"].dtype)
    return config, {**params, "vision": towers["vision"], "projector": projector}


def _new_projector(config: ModelConfig, dtype: np.dtype[Any]) -> dict[str, Any]:
    assert config.vision is not None
    width = config.vision.hidden_size
    shape = (width, config.hidden_size)

    def weight() -> Float[np.ndarray, "W D"]:
        rng = np.random.default_rng(PROJECTOR_SEED)
        return rng.normal(0, config.initializer_range, shape).astype(dtype)

    scale = functools.partial(np.zeros, width, dtype)
    return {
        "norm": {"scale": LazyArray((width,), dtype, scale)},
        "weight": LazyArray(shape, dtype, weight),
    }
