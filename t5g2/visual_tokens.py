"""A checkpoint's frozen vision tower: its visual tokens of images, and which tower it is."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, BFloat16, UInt8, UInt32

from t5g2 import config
from t5g2.data.corpus import Corpus
from t5g2.errors import UserError
from t5g2.models.config import ModelConfig
from t5g2.models.vision import VisionTower
from t5g2.pretrained import describe, read_params


class Tower:
    """The tower of a checkpoint; pickled, it is the checkpoint's path.

    Attributes:
        path: of the checkpoint.
        model: of a run; its tower has the same shape.
    """

    def __init__(self, path: Path, model: ModelConfig) -> None:
        """Compares the checkpoint with the run's model.

        Args:
            path: t5g2 checkpoint or Hugging Face directory.
            model: to be trained; computes in its dtype.

        Raises:
            UserError: no checkpoint, or one with another tower than the model's or with none.
        """
        theirs = describe(path).config.vision
        if theirs is None:
            raise UserError(f"--vision: {path} has no vision tower")
        assert model.vision is not None
        sides = ({"model.vision": dataclasses.asdict(v)} for v in (theirs, model.vision))
        changed = config.differences(*sides)
        if changed:
            raise UserError(
                f"--vision: {path} has another vision tower than the model: {'; '.join(changed)}"
            )
        self.path = path
        self.model = model

    @functools.cached_property
    def _params(self) -> Any:
        params = read_params(self.path, describe(self.path).config)["vision"]
        return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32)), params)

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `tower_fingerprint`."""
        return tower_fingerprint(self._params)

    def __call__(self, images: UInt8[np.ndarray, "M size size 3"]) -> BFloat16[np.ndarray, "M N W"]:
        """Visual tokens of images, before the projector, as training makes them."""
        return np.asarray(_visual_tokens(self.model, self._params, images))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tower, (self.path, self.model)


@functools.partial(jax.jit, static_argnums=0)
def _visual_tokens(
    model: ModelConfig, params: Any, images: UInt8[Array, "M size size 3"]
) -> BFloat16[Array, "M N W"]:
    tower = nnx.eval_shape(lambda: VisionTower(model, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(tower)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(images).astype(jnp.bfloat16)


def tower_fingerprint(params: Any) -> str:
    """16 hexadecimal digits that change with any value of a tower's parameters (float32).

    Args:
        params: `parameter_tree(model)["vision"]`, on any devices, split in any way.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = jax.device_get(_checksums([leaf for _, leaf in leaves]))
    lines = sorted(
        f"{jax.tree_util.keystr(path)} {leaf.shape} {pair.tolist()}"
        for (path, leaf), pair in zip(leaves, sums, strict=True)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@jax.jit
def _checksums(leaves: list[Array]) -> list[UInt32[Array, "2"]]:
    """Two sums over the bits of each array, modulo 2**32: the order of summing cannot matter."""

    def sums(array: Array) -> UInt32[Array, "2"]:
        bits = jax.lax.bitcast_convert_type(array.astype(jnp.float32), jnp.uint32)
        place = jnp.zeros(array.shape, jnp.uint32)
        for axis, size in enumerate(array.shape):
            place = place * size + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        first = bits * (place * np.uint32(0x9E3779B1) + 1)
        second = (bits ^ (bits >> 15)) * (place * np.uint32(0x85EBCA77) + 1)
        return jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in (first, second)])

    return [sums(leaf) for leaf in leaves]


def check_tower(corpus: Corpus, params: Any) -> None:
    """Refuses visual tokens of another tower than the model's.

    Args:
        corpus: with images, or with visual tokens that stand in for them.
        params: of the model, whose tower they stand in for.

    Raises:
        UserError: naming both.
    """
    if corpus.tower is None:
        return
    found = tower_fingerprint(params["vision"])
    if found != corpus.tower:
        raise UserError(
            "corpus.cache: its visual tokens were made by another vision tower (fingerprint "
            f"{corpus.tower}) than the model's ({found}): start the run from the checkpoint that "
            "t5g2 cache --vision was given (train.init_from), or make a cache with this tower"
        )
