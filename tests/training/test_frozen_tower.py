"""Training on images: the tower is frozen, the projector learns, and the rest is as for text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5g2.data.batch import empty_batch
from t5g2.models.config import ModelConfig, VisionConfig
from t5g2.models.t5gemma2 import from_parameters, split_frozen
from t5g2.training.optimizer import OptimizerConfig, make_optimizer
from t5g2.training.state import initial_state
from t5g2.training.step import loss_sums, train_step

VISION = VisionConfig(
    hidden_size=12,
    mlp_dim=20,
    num_layers=2,
    num_heads=2,
    image_size=8,
    patch_size=2,
    tokens_per_image=4,
    boi_id=60,
    image_id=61,
)
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    mlp_dim=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    sliding_window=4,
    global_every=2,
    eoi_id=62,
    initializer_range=0.25,
    vision=VISION,
)
# A large rate and decay: what must not change would, visibly.
OPTIMIZER = make_optimizer(
    OptimizerConfig(weight_decay=0.5, clip_norm=1e-3), optax.constant_schedule(0.1)
)


def batch_with_images(seed=0):
    """Four rows with no, one, two and no images, in two slots a row."""
    rng = np.random.default_rng(seed)
    batch = empty_batch(4, 14, 10)
    for name in ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens"):
        batch[name][:] = rng.integers(3, 60, batch[name].shape)
    for row, images in enumerate([0, 1, 2, 0]):
        for image in range(images):
            start = 1 + 6 * image
            batch["encoder_input_tokens"][row, start : start + 6] = [60, *[61] * 4, 62]
    for side in ("encoder", "decoder"):
        batch[f"{side}_segment_ids"][:] = 1
        batch[f"{side}_positions"][:] = np.arange(batch[f"{side}_positions"].shape[1])
    batch["decoder_loss_weights"][:] = 1
    batch["images"] = rng.integers(0, 256, (4, 2, 8, 8, 3), np.uint8)
    return {name: jnp.asarray(array) for name, array in batch.items()}


def step(accumulation=1):
    return jax.jit(
        lambda state, batch: train_step(
            state,
            batch,
            config=CONFIG,
            optimizer=OPTIMIZER,
            num_tasks=1,
            accumulation=accumulation,
        )
    )


@pytest.fixture(scope="module")
def trained():
    state = first = initial_state(CONFIG, OPTIMIZER, 0)
    run, metrics = step(), None
    for seed in range(3):
        state, metrics = run(state, batch_with_images(seed))
    return first, state, metrics


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_the_tower_stays_as_it_is_and_everything_else_trains(trained):
    first, state, _ = trained
    before, after = named(first.params), named(state.params)
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("vision/")}
    assert "projector/weight" not in same


def test_the_tower_has_no_optimizer_state(trained):
    _, state, _ = trained
    names = named(state.opt_state)
    assert any("projector/weight" in name for name in names)
    assert not any("vision/" in name for name in names)


def test_the_gradient_norm_and_with_it_clipping_leave_the_tower_out():
    state, batch = initial_state(CONFIG, OPTIMIZER, 0), batch_with_images()

    def mean(params):
        total, sums = loss_sums(CONFIG, params, batch, 1)
        return total / sums.targets.sum()

    gradient = jax.jit(jax.grad(mean))(state.params)
    text, tower = split_frozen(gradient)
    assert all(not leaf.any() for leaf in jax.tree.leaves(tower))
    _, metrics = step()(state, batch)
    np.testing.assert_allclose(metrics.grad_norm, optax.global_norm(text), rtol=1e-5)


def test_accumulation_gives_each_microbatch_its_own_images():
    state, batch = initial_state(CONFIG, OPTIMIZER, 0), batch_with_images()
    _, whole = step()(state, batch)
    _, parts = step(accumulation=2)(state, batch)
    np.testing.assert_allclose(parts.sums.nll, whole.sums.nll, rtol=1e-5)
    np.testing.assert_allclose(parts.grad_norm, whole.grad_norm, rtol=1e-5)


def test_stored_features_give_the_loss_of_the_images_they_were_made_of():
    params, batch = initial_state(CONFIG, OPTIMIZER, 0).params, batch_with_images()
    model = from_parameters(CONFIG, params)
    expected, _ = loss_sums(CONFIG, params, batch, 1)
    features = model.visual_tokens(batch["images"]).reshape(4, 2, 4, 12)
    images = batch.pop("images")
    stored, _ = loss_sums(CONFIG, params, {**batch, "image_features": features}, 1)
    np.testing.assert_allclose(stored, expected, rtol=1e-6)
    # In bfloat16, as features are stored, rounding is far below what other images change.
    rounded = features.astype(jnp.bfloat16)
    stored, _ = loss_sums(CONFIG, params, {**batch, "image_features": rounded}, 1)
    blank, _ = loss_sums(CONFIG, params, {**batch, "images": jnp.zeros_like(images)}, 1)
    assert abs(blank - expected) > 5e-3 * expected
    assert abs(stored - expected) < 5e-4 * expected


def test_a_model_without_tower_has_the_losses_of_one_with_it_on_text():
    text = dataclasses.replace(CONFIG, vision=None)
    params, batch = initial_state(CONFIG, OPTIMIZER, 0).params, batch_with_images()
    del batch["images"]
    alone = {name: params[name] for name in ("embedder", "encoder", "decoder")}
    with_tower, without = loss_sums(CONFIG, params, batch, 1), loss_sums(text, alone, batch, 1)
    np.testing.assert_array_equal(with_tower[0], without[0])
