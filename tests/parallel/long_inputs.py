"""Evaluates one packed row of 128K input tokens, for test_long_inputs.py, which has one device.

    python long_inputs.py DEVICES OUT

The row lies on DEVICES devices. Writes losses, by position, to OUT (npz).
"""

import dataclasses
import sys

import jax
import numpy as np
import optax
from on_meshes import CONFIG, TASKS

from t5g2.data.batch import empty_batch
from t5g2.parallel.hosts import to_devices
from t5g2.parallel.mesh import MeshConfig, make_mesh
from t5g2.parallel.rules import batch_shardings, check_room, make_layout
from t5g2.training.state import make_initial_state, state_shardings
from t5g2.training.step import jit_eval_step

INPUTS, TARGETS = 128 * 1024, 64
# Two examples with their targets, and padding behind them.
ENDS = {"encoder": (100_000, 131_000), "decoder": (30, 60)}
MODEL = dataclasses.replace(
    CONFIG, num_layers=2, num_heads=1, num_kv_heads=1, sliding_window=1024, rope_factor_global=8.0
)


def long_row():
    """A row of noise."""
    rng = np.random.default_rng(0)
    batch = empty_batch(1, INPUTS, TARGETS)
    for side, ends in ENDS.items():
        begin = 0
        for segment, end in enumerate(ends, 1):
            batch[f"{side}_segment_ids"][0, begin:end] = segment
            batch[f"{side}_positions"][0, begin:end] = np.arange(end - begin)
            begin = end
        names = ("input",) if side == "encoder" else ("input", "target")
        for name in names:
            batch[f"{side}_{name}_tokens"][0, :end] = rng.integers(3, 290, end)
    batch["decoder_loss_weights"][0, : ENDS["decoder"][-1]] = 1
    return batch


def main(devices, out):
    layout = make_layout(make_mesh(MeshConfig(data=1, context=devices)))
    check_room(layout, MODEL, (INPUTS, TARGETS))
    optimizer = optax.sgd(0.0)
    _, shardings = state_shardings(MODEL, optimizer, layout)
    params = make_initial_state(MODEL, optimizer, shardings, 0).params
    batch = long_row()
    batch = to_devices(batch_shardings(layout, batch), batch, 1)
    evaluate = jit_eval_step(
        layout, shardings.params, config=MODEL, num_tasks=TASKS, accumulation=1
    )
    found = evaluate(params, batch)
    np.savez(out, nll=found.nll, targets=found.targets, inputs=found.sums.inputs)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
    main(int(sys.argv[1]), sys.argv[2])
