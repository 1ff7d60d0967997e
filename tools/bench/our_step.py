"""The train step that `t5g2 train` compiles, by itself: for benchmarks."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import optax

from t5g2.data.batch import Batch, empty_batch
from t5g2.kernels.layout import Layout
from t5g2.models.config import ModelConfig
from t5g2.parallel.mesh import MeshConfig, configure_devices, make_mesh
from t5g2.parallel.rules import batch_shardings, make_layout
from t5g2.training.optimizer import make_optimizer
from t5g2.training.schedule import make_schedule
from t5g2.training.state import TrainState, make_initial_state, make_state_from, state_shardings
from t5g2.training.step import StepMetrics, compile_train_step

if TYPE_CHECKING:  # It brings much that a step does not need.
    from t5g2.settings import Settings


class OurStep(NamedTuple):
    """A compiled step and what it starts from.

    Attributes:
        step: of state, which is consumed, and batch.
        state: at step 0.
        layout: where arrays lie.
    """

    step: Callable[..., tuple[TrainState, StepMetrics]]
    state: TrainState
    layout: Layout

    def place(self, batch: Batch) -> dict[str, jax.Array]:
        """A batch on the devices."""
        return jax.device_put(batch, batch_shardings(self.layout, batch))


def prepare_recipe(settings: "Settings", params: Any | None = None) -> OurStep:
    """Compiles the step of a recipe; `params` are numpy arrays, without them initial ones."""
    configure_devices(settings.mesh)
    mesh = make_mesh(settings.mesh)
    schedule = make_schedule(settings.schedule, settings.train.total_steps)
    return prepare(
        settings.model,
        make_optimizer(settings.optimizer, schedule),
        rows=settings.rows,
        room=(settings.data.inputs_length, settings.data.targets_length),
        num_tasks=len(settings.data.made_denoisers()),
        mesh=settings.mesh,
        accumulation=settings.batch_parts(mesh).accumulation,
        params=params,
    )


def prepare(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    rows: int,
    room: tuple[int, int],
    num_tasks: int,
    mesh: MeshConfig | None = None,
    accumulation: int = 1,
    params: Any | None = None,
) -> OurStep:
    """As `prepare_recipe`, of what a recipe says; `mesh` None: as without one in a recipe."""
    wanted = mesh or MeshConfig()
    layout = make_layout(make_mesh(wanted), wanted.rules)
    shapes, shardings = state_shardings(config, optimizer, layout)
    step = compile_train_step(
        layout,
        shapes,
        shardings,
        rows=rows,
        room=room,
        config=config,
        optimizer=optimizer,
        num_tasks=num_tasks,
        accumulation=accumulation,
    )
    if params is None:
        state = make_initial_state(config, optimizer, shardings, 0)
    else:
        state = make_state_from(params, optimizer, shardings)
    return OurStep(step, state, layout)


def full_batch(rows: int, inputs: int, targets: int, vocab_size: int, seed: int = 0) -> Batch:
    """Rows of one example of random tokens each, without padding; bos is 2."""
    rng = np.random.default_rng(seed)
    batch = empty_batch(rows, inputs, targets)
    for name, array in batch.items():
        if name in ("encoder_input_tokens", "decoder_target_tokens"):
            array[:] = rng.integers(3, vocab_size, array.shape)
        elif name.endswith(("segment_ids", "weights")):
            array[:] = 1
        elif name.endswith("positions"):
            array[:] = np.arange(array.shape[1])
    batch["decoder_input_tokens"][:, 0] = 2
    batch["decoder_input_tokens"][:, 1:] = batch["decoder_target_tokens"][:, :-1]
    return batch
