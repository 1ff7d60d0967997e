"""What training carries from step to step, and where each array of it lies."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from t5g2.kernels.layout import Layout
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
    config: ModelConfig, optimizer: optax.GradientTransformation, layout: Layout
) -> tuple[TrainState, Any]:
    """Shapes and shardings of the train state; moments lie where their parameters lie.

    Factored moments, which lack one of a parameter's axes, are split like the axes that they have.

    Returns:
        Two `TrainState`s: of shape structs, and of NamedShardings.
    """
    shapes = jax.eval_shape(lambda: initial_state(config, optimizer, 0))
    params = parameter_shardings(layout, logical_axes(config), shapes.params)
    opt_state = _beside_parameters(
        shapes.opt_state, split_frozen(shapes.params)[0], split_frozen(params)[0], layout
    )
    step: Any = replicated(layout.mesh)
    return shapes, TrainState(step, params, opt_state)


def _beside_parameters(opt_state: Any, shapes: Any, shardings: Any, layout: Layout) -> Any:
    """Shardings of an optimizer's arrays, which are those of the parameters they are named after.

    Args:
        opt_state: shape structs; what belongs to a parameter stands under its path.
        shapes: of the parameters.
        shardings: of the parameters.
        layout: the mesh and its rules.
    """
    parameters = {
        _names(path): (shape.shape, sharding.spec)
        for (path, shape), sharding in zip(
            jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: Any, array: Any) -> NamedSharding:
        names = _names(path)
        owners = [names[i:] for i in range(len(names)) if names[i:] in parameters]
        shape, axes = parameters[owners[0]] if owners else ((), ())
        for gone in (None, *range(len(shape))):
            left = [i for i in range(len(shape)) if i != gone]
            if array.shape and array.shape == tuple(shape[i] for i in left):
                return NamedSharding(layout.mesh, PartitionSpec(*(axes[i] for i in left)))
        return replicated(layout.mesh)  # counters, and moments that are not kept

    return jax.tree_util.tree_map_with_path(place, opt_state)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


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
