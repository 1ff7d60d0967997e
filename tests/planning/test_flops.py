"""Model FLOPs: as counted by hand, by the traced program, and by XLA."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from t5g2.data.batch import empty_batch
from t5g2.data.image_examples import pixel_slot
from t5g2.data.packing import ImageSlots
from t5g2.kernels.attention import KeyValues, Window, visibility
from t5g2.kernels.layout import Layout, on_shards
from t5g2.models.config import (
    T5GEMMA2_1B,
    T5GEMMA2_4B,
    T5GEMMA2_270M,
    ModelConfig,
    VisionConfig,
)
from t5g2.planning.executed import executed
from t5g2.planning.flops import Load, model_flops, tower_flops, visible_keys
from t5g2.planning.products import device_products
from t5g2.training.optimizer import OptimizerConfig, make_optimizer
from t5g2.training.state import initial_state
from t5g2.training.step import loss_sums, train_step

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    mlp_dim=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    sliding_window=16,
    global_every=3,
    scan_layers=False,
    remat="none",
)
LOAD = Load(rows=2, inputs=96, targets=64)
TASKS = 3
OPTIMIZER = make_optimizer(OptimizerConfig(), optax.constant_schedule(0.1))


def traced_step(model, load, accumulation=1):
    slots = ImageSlots(load.images, pixel_slot(model)) if load.images else None
    batch = jax.eval_shape(lambda: empty_batch(load.rows, load.inputs, load.targets, slots))
    state = jax.eval_shape(lambda: initial_state(model, OPTIMIZER, 0))

    def step(state, batch):
        return train_step(
            state,
            batch,
            config=model,
            optimizer=OPTIMIZER,
            num_tasks=TASKS,
            accumulation=accumulation,
        )

    return jax.jit(step).trace(state, batch)


def hidden_pairs(model, load):
    """FLOPs of attention to keys that masks hide, in a forward pass without blocks."""
    pair = 4 * model.num_heads * model.head_dim * load.rows
    hidden = 0
    for layer in range(model.num_layers):
        left, right = (model.sliding_window + 1) // 2 - 1, model.sliding_window // 2
        whole = model.is_global(layer)
        reach = Window(None, None) if whole else Window(left, right)
        hidden += load.inputs**2 - visible_keys(load.inputs, reach)
        reach = Window(None, 0) if whole else Window(model.sliding_window - 1, 0)
        hidden += load.targets**2 - visible_keys(load.targets, reach)
    return pair * hidden


def logging_products(load):
    """The step sums losses by task with a product: two of them."""
    return 2 * 2 * load.rows * load.targets * TASKS


@pytest.mark.parametrize("length", [1, 2, 7, 40])
@pytest.mark.parametrize(
    "window",
    [Window(None, None), Window(None, 0), Window(0, 0), Window(3, 0), Window(3, 4), Window(50, 2)],
)
def test_visible_keys_are_the_ones_in_the_mask(length, window):
    segments, positions = np.ones((1, length), np.int32), np.arange(length)[None]
    keys = KeyValues(None, None, segments, positions)
    assert visible_keys(length, window) == np.sum(visibility(segments, positions, keys, window))


def test_a_step_multiplies_the_model_flops_what_masks_hide_and_logits_of_attention_again():
    flops = model_flops(MODEL, LOAD)
    work = executed(traced_step(MODEL, LOAD).jaxpr).flops
    masked = hidden_pairs(MODEL, LOAD)
    attended = sum(amount for part, amount in flops.trained.items() if "attention" in part)
    again = (attended + masked) // 2
    known = flops.total + 3 * masked + again + logging_products(LOAD)
    assert work == known
    assert flops.trained["vocabulary head"] == LOAD.rows * LOAD.targets * 2 * 64 * 512
    assert flops.total == 3 * flops.forward


def test_full_remat_adds_a_forward_pass_of_the_layers():
    kept = executed(traced_step(MODEL, LOAD).jaxpr).flops
    again = executed(traced_step(dataclasses.replace(MODEL, remat="full"), LOAD).jaxpr).flops
    flops = model_flops(MODEL, LOAD)
    layers = flops.forward - flops.trained["vocabulary head"] + hidden_pairs(MODEL, LOAD)
    assert again - kept == layers


def test_attention_that_is_kept_is_not_made_again():
    # Long enough for the blockwise back end, on either side.
    model = dataclasses.replace(MODEL, num_layers=1)
    load = Load(rows=1, inputs=1152, targets=1024)
    steps = {
        remat: traced_step(dataclasses.replace(model, remat=remat), load)
        for remat in ("none", "dots", "attention", "full")
    }
    work = {remat: executed(step.jaxpr).flops for remat, step in steps.items()}
    flops = model_flops(model, load)
    attended = sum(amount for part, amount in flops.trained.items() if "attention" in part)
    layers = flops.forward - flops.trained["vocabulary head"]
    assert work["none"] == work["dots"]
    assert work["attention"] - work["none"] == layers - attended
    # With what masks hide of it.
    assert attended < work["full"] - work["attention"] < 2 * attended
    # In loops: of layers in a row XLA drops what keeps both passes apart, and finds the encoder's
    # keys and values, which the decoder makes again, in the forward pass.
    looped = dataclasses.replace(
        model, num_layers=2, global_every=1, scan_layers=True, remat="attention"
    )
    step = traced_step(looped, load)
    compiled = step.lower().compile().as_text()
    assert device_products(compiled).flops == executed(step.jaxpr).flops


@pytest.mark.parametrize("remat", ["none", "full"])
def test_xla_counts_the_same_products_in_a_forward_pass(remat):
    # Wider, so that what is no product (norms, softmax) weighs little.
    model = dataclasses.replace(
        MODEL, hidden_size=256, mlp_dim=1024, head_dim=64, vocab_size=2048, remat=remat
    )
    batch = jax.eval_shape(lambda: empty_batch(LOAD.rows, LOAD.inputs, LOAD.targets))
    params = jax.eval_shape(lambda: initial_state(model, OPTIMIZER, 0)).params
    traced = jax.jit(lambda p, b: loss_sums(model, p, b, TASKS)).trace(params, batch)
    ours = model_flops(model, LOAD).forward + hidden_pairs(model, LOAD)
    assert executed(traced.jaxpr).flops == ours + logging_products(LOAD)
    assert traced.lower().compile().cost_analysis()["flops"] == pytest.approx(ours, rel=0.03)


def test_xla_counts_the_same_products_in_a_step():
    model = dataclasses.replace(
        MODEL, hidden_size=256, mlp_dim=1024, head_dim=64, num_layers=2, global_every=2
    )
    traced = traced_step(model, LOAD)
    counted = traced.lower().compile().cost_analysis()["flops"]
    # XLA also counts the optimizer, about 20 operations a parameter, and other sums.
    assert counted == pytest.approx(executed(traced.jaxpr).flops, rel=0.06)


def test_loops_count_as_often_as_they_turn():
    model = dataclasses.replace(MODEL, num_layers=4, global_every=2)
    unrolled = executed(traced_step(model, LOAD).jaxpr)
    scanned = dataclasses.replace(model, scan_layers=True)
    assert executed(traced_step(scanned, LOAD).jaxpr).flops == unrolled.flops
    twice = executed(traced_step(model, dataclasses.replace(LOAD, rows=4), accumulation=2).jaxpr)
    # The count of targets by task is made in each microbatch, too.
    assert twice.flops == 2 * unrolled.flops


def test_images_cost_a_forward_pass_of_the_tower_and_train_the_projector():
    vision = VisionConfig(
        hidden_size=32,
        mlp_dim=48,
        num_layers=2,
        num_heads=2,
        image_size=28,
        patch_size=7,
        tokens_per_image=4,
        boi_id=500,
        image_id=501,
    )
    model = dataclasses.replace(MODEL, vision=vision)
    load = dataclasses.replace(LOAD, images=3)
    flops = model_flops(model, load)
    assert flops.frozen == {"vision tower": 2 * 3 * tower_flops(vision)}
    extra = (
        executed(traced_step(model, load).jaxpr).flops
        - executed(traced_step(MODEL, LOAD).jaxpr).flops
    )
    assert extra == flops.frozen["vision tower"] + 3 * flops.trained["vision projector"]
    stored = model_flops(model, dataclasses.replace(load, image_features=True))
    assert stored.frozen == {}


@pytest.mark.parametrize("model", [T5GEMMA2_270M, T5GEMMA2_1B, T5GEMMA2_4B])
def test_six_flops_a_parameter_and_token_where_attention_is_short(model):
    # The field's rule of thumb: encoder layers see encoder tokens, decoder layers decoder tokens.
    # The decoder's keys and values see both; a row of one token each has next to no attention.
    layers = (
        model.hidden_size * 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
        + 3 * model.hidden_size * model.mlp_dim
    ) * model.num_layers
    memory = 2 * model.hidden_size * model.num_kv_heads * model.head_dim * model.num_layers
    head = model.hidden_size * model.vocab_size
    flops = model_flops(model, Load(rows=1, inputs=1, targets=1))
    attention = sum(f for part, f in flops.trained.items() if "attention" in part)
    assert flops.total - 3 * attention == 6 * (2 * layers + memory + head)


def test_what_each_device_multiplies_of_its_own_rows_counts_for_all_of_them():
    mesh = AbstractMesh((2, 3, 2), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)
    layout = Layout(mesh, {})
    rows = ("data", "fsdp")
    product = jax.jit(
        lambda weight, x: on_shards(
            lambda weight, x: x @ weight, layout, (P(None, "tensor"), P(rows)), P(rows, "tensor")
        )(weight, x)
    )
    shapes = jax.ShapeDtypeStruct((8, 4), np.float32), jax.ShapeDtypeStruct((12, 8), np.float32)
    assert executed(product.trace(*shapes).jaxpr).flops == 2 * 12 * 8 * 4
