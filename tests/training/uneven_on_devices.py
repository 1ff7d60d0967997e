"""Steps on unevenly filled batches, on four devices and on one; prints JSON.

A program of its own, as tests have one device.
"""

import json

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 4)

from test_step import CONFIG, uneven_batch  # noqa: E402

from t5g2.parallel.batch import split_batch  # noqa: E402
from t5g2.parallel.mesh import MeshConfig, make_mesh  # noqa: E402
from t5g2.parallel.rules import make_layout  # noqa: E402
from t5g2.training.optimizer import OptimizerConfig, make_optimizer  # noqa: E402
from t5g2.training.schedule import ScheduleConfig, make_schedule  # noqa: E402
from t5g2.training.state import make_initial_state, state_shardings  # noqa: E402
from t5g2.training.step import compile_train_step  # noqa: E402

ROWS, LENGTH, STEPS = 16, 12, 3
# Real tokens of each row and side: rows without any, and a device that has almost all of them.
INPUTS = [12, 12, 12, 12, 0, 1, 0, 0, 3, 0, 0, 5, 0, 0, 0, 7]
TARGETS = [12, 12, 11, 12, 0, 0, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0]
OPTIMIZER = OptimizerConfig(clip_norm=0.05)


def trained(devices, rows_per_device, **axes):
    """Metrics of some steps, and the parameters after them."""
    mesh = make_mesh(MeshConfig(**axes), devices)
    layout = make_layout(mesh)
    parts = split_batch(mesh, ROWS, (LENGTH, LENGTH), rows_per_device=rows_per_device)
    optimizer = make_optimizer(OPTIMIZER, make_schedule(ScheduleConfig(), STEPS))
    shapes, shardings = state_shardings(CONFIG, optimizer, layout)
    state = make_initial_state(CONFIG, optimizer, shardings, 0)
    step = compile_train_step(
        layout,
        shapes,
        shardings,
        rows=ROWS,
        room=(LENGTH, LENGTH),
        config=CONFIG,
        optimizer=optimizer,
        num_tasks=3,
        accumulation=parts.accumulation,
    )
    seen = []
    for number in range(STEPS):
        state, metrics = step(state, uneven_batch(ROWS, LENGTH, INPUTS, TARGETS, seed=number))
        sums = jax.device_get(metrics.sums)
        seen.append(
            {
                "nll": sums.nll.tolist(),
                "inputs": int(sums.inputs),
                "targets": float(sums.targets.sum()),
                "grad_norm": float(metrics.grad_norm),
            }
        )
    params = np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(state.params))])
    return {"accumulation": parts.accumulation, "steps": seen, "params": params.tolist()}


if __name__ == "__main__":
    four, one = jax.devices(), jax.devices()[:1]
    print(
        json.dumps(
            {
                "whole": trained(one, None),
                "split": [
                    trained(four, 1, data=4),
                    trained(four, 2, data=2, fsdp=2),
                ],
            }
        )
    )
