"""The train step: a mean over real targets, however they are spread over rows and microbatches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5g2.data.batch import empty_batch
from t5g2.models.config import ModelConfig
from t5g2.parallel.mesh import MeshConfig, make_mesh
from t5g2.parallel.rules import make_layout
from t5g2.training.limits import Limits
from t5g2.training.optimizer import OptimizerConfig, make_optimizer
from t5g2.training.state import initial_state
from t5g2.training.step import jit_eval_step, loss_sums, train_step

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
)
OPTIMIZER = make_optimizer(OptimizerConfig(), optax.constant_schedule(0.01))


def uneven_batch(rows=4, length=12, inputs=(12, 1, 5, 2), targets=(12, 1, 5, 2), seed=0):
    """Rows with very different numbers of tokens, the rest padding with garbage in it."""
    rng = np.random.default_rng(seed)
    batch = empty_batch(rows, length, length)
    for name in ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens"):
        batch[name][:] = rng.integers(3, 64, (rows, length))
    batch["decoder_task_ids"][:] = rng.integers(0, 3, (rows, 1))
    for side, counts in (("encoder", inputs), ("decoder", targets)):
        for row, real in enumerate(counts):
            batch[f"{side}_segment_ids"][row, :real] = 1
            batch[f"{side}_positions"][row, :real] = np.arange(real)
    for row, real in enumerate(targets):
        batch["decoder_loss_weights"][row, :real] = 1
    batch["row_digest"][:] = [2**32 - 1, *range(2, rows + 1)]
    return {name: jnp.asarray(array) for name, array in batch.items()}


@pytest.fixture(scope="module")
def results():
    state, batch = initial_state(CONFIG, OPTIMIZER, 0), uneven_batch()
    made = {}
    for accumulation in (1, 2, 4):
        made[accumulation] = jax.jit(
            lambda s, b, a=accumulation: train_step(
                s, b, config=CONFIG, optimizer=OPTIMIZER, num_tasks=3, accumulation=a
            )
        )(state, batch)
    return state, batch, made


def test_accumulation_changes_neither_loss_nor_update(results):
    _, _, made = results
    whole_state, whole = made[1]
    for accumulation in (2, 4):
        state, metrics = made[accumulation]
        np.testing.assert_allclose(metrics.sums.nll, whole.sums.nll, rtol=1e-5)
        np.testing.assert_array_equal(metrics.sums.targets, whole.sums.targets)
        np.testing.assert_allclose(metrics.grad_norm, whole.grad_norm, rtol=1e-5)
        assert metrics.digest == whole.digest == 8  # 2**32 + 8, modulo 2**32
        for ours, theirs in zip(
            *map(jax.tree.leaves, (state.params, whole_state.params)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_held_out_sums_do_not_depend_on_the_microbatches(results):
    state, batch, _ = results
    mesh = make_mesh(MeshConfig())
    layout = make_layout(mesh)
    anywhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state.params)
    sums = [
        jit_eval_step(layout, anywhere, config=CONFIG, num_tasks=3, accumulation=parts)(
            state.params, batch
        )
        for parts in (1, 2, 4)
    ]
    for parts in sums[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), parts, sums[0])


def test_the_gradient_is_of_the_mean_over_real_targets(results):
    state, batch, made = results

    def mean(params):
        total, sums = loss_sums(CONFIG, params, batch, 3)
        return total / sums.targets.sum()

    norm = optax.global_norm(jax.grad(mean)(state.params))
    np.testing.assert_allclose(made[1][1].grad_norm, norm, rtol=1e-5)
    assert made[1][1].sums.targets.sum() == 20
    assert made[1][1].sums.inputs == 20


def test_the_norms_are_those_of_the_new_parameters_and_of_what_was_added(results):
    state, _, made = results
    new, metrics = made[1]
    before, after = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
        for tree in (state.params, new.params)
    )
    np.testing.assert_allclose(metrics.param_norm, np.linalg.norm(after), rtol=1e-5)
    np.testing.assert_allclose(metrics.update_norm, np.linalg.norm(after - before), rtol=1e-4)


def test_losses_by_task_are_those_of_the_rows_of_the_task(results):
    state, batch, made = results
    tasks = np.asarray(batch["decoder_task_ids"][:, 0])
    for task in range(3):
        alone = {**batch}
        in_task = (tasks == task)[:, None]
        alone["decoder_loss_weights"] = jnp.where(in_task, batch["decoder_loss_weights"], 0)
        total, _ = loss_sums(CONFIG, state.params, alone, 3)
        np.testing.assert_allclose(made[1][1].sums.nll[task], total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_recomputing_changes_nothing(results, remat):
    state, batch, made = results
    config = dataclasses.replace(CONFIG, remat=remat)
    _, metrics = jax.jit(
        lambda s, b: train_step(
            s, b, config=config, optimizer=OPTIMIZER, num_tasks=3, accumulation=1
        )
    )(state, batch)
    np.testing.assert_allclose(metrics.sums.nll, made[1][1].sums.nll, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, made[1][1].grad_norm, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_a_step_beyond_the_limits_keeps_the_bits_of_parameters_and_optimizer(name):
    optimizer = make_optimizer(OptimizerConfig(name=name), lambda step: 0.01 / (1 + step))
    params, batch = initial_state(CONFIG, optimizer, 0).params, uneven_batch()

    @jax.jit
    def step(state, limits):
        return train_step(
            state,
            batch,
            limits,
            config=CONFIG,
            optimizer=optimizer,
            num_tasks=3,
            accumulation=1,
        )

    state = initial_state(CONFIG, optimizer, 0)
    state, made = step(state, Limits(np.bool_(True), np.float32(np.inf), np.float32(np.inf)))
    assert not made.skipped
    assert made.update_norm > 0
    kept, left_out = step(state, Limits(np.bool_(True), np.float32(0), np.float32(np.inf)))
    assert left_out.skipped
    assert left_out.update_norm == 0
    assert kept.step == state.step + 1
    same = lambda a, b: np.testing.assert_array_equal(*map(np.asarray, (a, b)))  # noqa: E731
    jax.tree.map(same, (kept.params, kept.opt_state), (state.params, state.opt_state))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, params)
    assert changed["embedder"]["table"]
