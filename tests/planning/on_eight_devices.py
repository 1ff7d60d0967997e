"""What a plan of `cpu:8` says, and what training, the arrays and XLA say there.

    python on_eight_devices.py RECIPE RUN_DIR

prints JSON. A program of its own, as tests have one device.
"""

import contextlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5g2.parallel.rules import make_layout
from t5g2.planning.collectives import collectives
from t5g2.planning.compile import trace_step
from t5g2.planning.devices import planning_devices
from t5g2.planning.executed import executed
from t5g2.planning.plan import make_plan
from t5g2.planning.products import device_products
from t5g2.planning.topologies import find_topology
from t5g2.settings import read_settings
from t5g2.training import step as step_module
from t5g2.training.optimizer import make_optimizer
from t5g2.training.schedule import make_schedule
from t5g2.training.state import make_initial_state, state_shardings

TURNS = 5


class CompiledError(Exception):
    """Ends a run once its step is compiled."""


def step_of_training(settings, run_dir):
    """The step that `t5g2 train` compiles: its text, and what XLA says of its memory."""
    from t5g2.train import train

    seen = []
    trace = step_module.trace_train_step

    def watch(*args, **kwargs):
        lowered = trace(*args, **kwargs).lower()
        seen.extend([lowered.as_text(), lowered.compile().memory_analysis()])
        raise CompiledError

    step_module.trace_train_step = watch
    with contextlib.suppress(CompiledError):
        train(settings, run_dir)
    step_module.trace_train_step = trace
    return seen


def bytes_on_first_device(tree):
    """Of arrays that exist."""
    return sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(tree))


def gathers_in_a_loop(mesh):
    """Collectives of a loop in which each turn gathers a matrix along one axis of the mesh."""
    split = NamedSharding(mesh, PartitionSpec("fsdp", None))
    whole = NamedSharding(mesh, PartitionSpec())

    def turn(x, _):
        gathered = jax.lax.with_sharding_constraint(x * 1.5, whole)
        return jax.lax.with_sharding_constraint(jax.numpy.cos(gathered @ gathered), split), None

    def loop(x):
        return jax.lax.scan(turn, x, None, length=TURNS)[0]

    x = jax.ShapeDtypeStruct((64, 64), np.float32)
    compiled = jax.jit(loop, in_shardings=split, out_shardings=split).lower(x).compile()
    return [c._asdict() for c in collectives(compiled.as_text(), dict(mesh.shape))]


def repeated_product(mesh):
    """FLOPs of a loop of products that no device shares: as traced, and as compiled for each."""

    def loop(x):
        return jax.lax.scan(lambda x, _: (x @ jax.numpy.cos(x.T) @ x, None), x, None, length=TURNS)[
            0
        ]

    x = jax.ShapeDtypeStruct((64, 32), np.float32)
    traced = jax.jit(loop, in_shardings=NamedSharding(mesh, PartitionSpec())).trace(x)
    return executed(traced.jaxpr).flops, device_products(traced.lower().compile().as_text()).flops


def main(recipe, run_dir):
    topology = find_topology("cpu:8")
    settings = read_settings([recipe])
    devices = planning_devices(topology, settings)
    planned = trace_step(settings, devices)
    text, sizes = step_of_training(settings, Path(run_dir))
    plan = make_plan(settings, topology, lambda _: contextlib.nullcontext())
    schedule = make_schedule(settings.schedule, settings.train.total_steps)
    optimizer = make_optimizer(settings.optimizer, schedule)
    _, shardings = state_shardings(settings.model, optimizer, make_layout(planned.mesh))
    state = make_initial_state(settings.model, optimizer, shardings, 0)
    print(
        json.dumps(
            {
                "devices": len(devices),
                "same_program": planned.traced.lower().as_text() == text,
                "plan": plan.to_json(),
                "arguments": sizes.argument_size_in_bytes,
                "temporaries": sizes.temp_size_in_bytes,
                "parameters": bytes_on_first_device(state.params),
                "optimizer": bytes_on_first_device(state.opt_state),
                "loop": gathers_in_a_loop(planned.mesh),
                "repeated": repeated_product(planned.mesh),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
