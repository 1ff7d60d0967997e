"""What training carries from step to step, and where each array of it lies."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from t5g2.models.config import ModelConfig
from t5g2.models.t5gemma2 import T5Gemma2, logical_axes, parameter_tree, split_frozen
from t5g2.parallel.rules import parameter_shardings, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Parameters (float32), optimizer state of those that train, and the number of steps done."""

    step: Int[Array, ""]
    params: Any
    opt_state: Any


def initial_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """Step 0: random parameters (see `T5Gemma2`), fresh optimizer."""
    params = parameter_tree(T5Gemma2(config, rngs=nnx.Rngs(seed)))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(split_frozen(params)[0]))


def state_shardings(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, Any]:
    """Shapes and shardings of the train state; moments lie where their parameters lie.

    Returns:
        Two `TrainState`s: of shape structs, and of NamedShardings.
    """
    shapes = jax.eval_shape(lambda: initial_state(config, optimizer, 0))
    params = parameter_shardings(mesh, logical_axes(config), shapes.params)
    opt_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes.opt_state,
        split_frozen(params)[0],
        transform_non_params=lambda _: replicated(mesh),
    )
    step: Any = replicated(mesh)
    return shapes, TrainState(step, params, opt_state)


def make_state_from(
    params: Any, optimizer: optax.GradientTransformation, shardings: Any
) -> TrainState:
    """Step 0 with given parameters, fresh optimizer.

    Args:
        params: numpy arrays of any float dtype, structured as by `parameter_tree`.
        optimizer: whose state is made.
        shardings: where each array of the `TrainState` is to lie.
    """
    placed = jax.tree.map(
        lambda x, sharding: jax.device_put(np.asarray(x, np.float32), sharding),
        params,
        shardings.params,
    )
    trained, _ = split_frozen(placed)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trained)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return jax.block_until_ready(TrainState(step, placed, opt_state))


def make_initial_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, shardings: Any, seed: int
) -> TrainState:
    """`initial_state`, made in place on the devices."""
    make = jax.jit(lambda: initial_state(config, optimizer, seed), out_shardings=shardings)
    return jax.block_until_ready(make())
