"""Losses of training steps on the meshes that are asked for, for tests, which have one device.

    python on_meshes.py DEVICES CASES RESULTS [COORDINATOR COUNT INDEX]

DEVICES are this process's, one of COUNT. CASES is a JSON list of objects; writes a line of JSON,
what `trajectory` makes of it, for each, to the file RESULTS (standard output is gloo's, too).
"""

import dataclasses
import json
import sys

import jax
import numpy as np
import optax

from t5g2.data.batch import empty_batch
from t5g2.data.image_examples import ImageSlot
from t5g2.data.packing import ImageSlots
from t5g2.models.config import ModelConfig, VisionConfig
from t5g2.parallel.hosts import HostsConfig, own_rows, start, to_devices
from t5g2.parallel.mesh import MeshConfig, make_mesh
from t5g2.parallel.rules import batch_shardings, check_room, make_layout, row_sharding
from t5g2.planning.collectives import collectives
from t5g2.training.limits import NO_LIMITS, place
from t5g2.training.optimizer import OptimizerConfig, make_optimizer
from t5g2.training.state import make_initial_state, state_shardings
from t5g2.training.step import trace_train_step

CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    mlp_dim=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    sliding_window=16,
    global_every=2,
    query_pre_attn_scalar=8.0,
    initializer_range=0.1,
    eoi_id=300,
)
VISION = VisionConfig(
    hidden_size=32,
    mlp_dim=48,
    num_layers=2,
    num_heads=4,
    image_size=16,
    patch_size=2,
    tokens_per_image=16,
    boi_id=301,
    image_id=302,
)
ROWS, INPUTS, TARGETS, TASKS, IMAGES = 32, 96, 64, 3, 2


def packed_batch(step, slots):
    """Rows of examples of uneven number and length, some with images; nothing but noise."""
    rng = np.random.default_rng(step)
    batch = empty_batch(ROWS, INPUTS, TARGETS, slots)
    for row in range(ROWS):
        for side, length in (("encoder", INPUTS), ("decoder", TARGETS)):
            cuts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
            begin = 0
            for segment, end in enumerate(cuts, 1):
                batch[f"{side}_segment_ids"][row, begin:end] = segment
                batch[f"{side}_positions"][row, begin:end] = np.arange(end - begin)
                begin = end
        real = batch["encoder_segment_ids"][row] > 0
        batch["encoder_input_tokens"][row, real] = rng.integers(3, 290, real.sum())
        real = batch["decoder_segment_ids"][row] > 0
        for name in ("input", "target"):
            batch[f"decoder_{name}_tokens"][row, real] = rng.integers(3, 290, real.sum())
        batch["decoder_task_ids"][row, real] = rng.integers(0, TASKS)
        batch["decoder_loss_weights"][row, real] = 1
        count = row % (IMAGES + 1)
        if slots is not None and real.sum() and count:
            places = rng.choice(INPUTS, count * VISION.tokens_per_image, replace=False)
            batch["encoder_input_tokens"][row, np.sort(places)] = VISION.image_id
            images = rng.integers(0, 256, batch["images"][row, :count].shape)
            batch["images"][row, :count] = images
    return batch


def nudged(params, seed):
    """Parameters of which each is moved up, down or not at all, by its last bit."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    moved = []
    for leaf in map(np.asarray, leaves):
        to = rng.choice(np.array([-np.inf, np.inf], leaf.dtype), leaf.shape)
        moved.append(np.where(rng.integers(0, 3, leaf.shape) == 0, leaf, np.nextafter(leaf, to)))
    return jax.tree.unflatten(tree, map(jax.device_put, moved, [x.sharding for x in leaves]))


def trajectory(
    steps=20, accumulation=1, images=False, mesh=None, model=None, rate=1e-3, warmup=20, nudge=None
):
    """Losses, gradient norms and collectives of a training run on noise.

    The rate rises over `warmup` steps, as it does in any recipe. At the full rate from the first
    step on, Adam's first updates, which are as large where the gradient is nothing but rounding,
    make of an ulp (`nudge`) a difference of 2e-5 in twenty steps.
    """
    config = dataclasses.replace(CONFIG, **(model or {}), vision=VISION if images else None)
    chosen = MeshConfig(**(mesh or {}))
    layout = make_layout(make_mesh(chosen), chosen.rules)
    check_room(layout, config, (INPUTS, TARGETS))
    optimizer = make_optimizer(
        OptimizerConfig(), optax.linear_schedule(rate / warmup, rate, warmup - 1)
    )
    shapes, shardings = state_shardings(config, optimizer, layout)
    size = VISION.image_size
    slots = ImageSlots(IMAGES, ImageSlot("images", (size, size, 3), np.uint8)) if images else None
    compiled = (
        trace_train_step(
            layout,
            shapes,
            shardings,
            rows=ROWS,
            room=(INPUTS, TARGETS),
            images=slots,
            config=config,
            optimizer=optimizer,
            num_tasks=TASKS,
            accumulation=accumulation,
        )
        .lower()
        .compile()
    )
    state = make_initial_state(config, optimizer, shardings, 0)
    if nudge is not None:
        state = dataclasses.replace(state, params=nudged(state.params, nudge))
    limits = place(NO_LIMITS, layout.mesh)
    first, count = own_rows(row_sharding(layout), ROWS)
    losses, norms = [], []
    for step in range(steps):
        batch = packed_batch(step % 2, slots)
        own = {name: array[first : first + count] for name, array in batch.items()}
        placed = to_devices(batch_shardings(layout, batch), own, ROWS)
        state, metrics = compiled(state, placed, limits, None)
        losses.append(float(metrics.sums.nll.sum() / metrics.sums.targets.sum()))
        norms.append(float(metrics.grad_norm))
    sent = collectives(compiled.as_text(), dict(layout.mesh.shape))
    return {
        "losses": losses,
        "norms": norms,
        "collectives": [c._asdict() for c in sent],
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
    if len(sys.argv) > 4:
        coordinator, processes, index = sys.argv[4:]
        start(HostsConfig(coordinator=coordinator, count=int(processes), index=int(index)))
    with open(sys.argv[3], "w") as results:
        for case in json.loads(sys.argv[2]):
            print(json.dumps(trajectory(**case)), file=results, flush=True)
