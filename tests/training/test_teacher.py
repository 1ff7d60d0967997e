"""Distillation: the teacher's distribution on real tokens, the token itself on sentinels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import CONFIG, OPTIMIZER, uneven_batch

from t5g2.training.state import initial_state
from t5g2.training.step import loss_sums, train_step
from t5g2.training.teacher import Teacher

SENTINELS = range(50, 64)
PARAMS = initial_state(CONFIG, OPTIMIZER, 0).params
OTHER = jax.tree.map(
    lambda x: x + 0.3 * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32),
    initial_state(CONFIG, OPTIMIZER, 1).params,
)


def batch_of(targets):
    """A batch whose targets all lie in the range `targets`."""
    batch = uneven_batch()
    drawn = np.random.default_rng(3).integers(targets.start, targets.stop, (4, 12))
    return {**batch, "decoder_target_tokens": jnp.asarray(drawn, jnp.int32)}


@jax.jit
def gradient(params, batch, teacher):
    def loss(params):
        return loss_sums(CONFIG, params, batch, 3, teacher)

    return jax.grad(loss, has_aux=True)(params)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_but_sentinels():
    teacher = Teacher(OTHER, CONFIG, SENTINELS)
    on_text, _ = gradient(OTHER, batch_of(range(3, 50)), teacher)
    without, _ = gradient(OTHER, batch_of(range(3, 50)), None)
    assert optax.global_norm(on_text) < 1e-5 * optax.global_norm(without)
    on_sentinels, _ = gradient(OTHER, batch_of(SENTINELS), teacher)
    assert optax.global_norm(on_sentinels) > 0.1


def test_on_sentinels_a_teacher_changes_nothing():
    batch = batch_of(SENTINELS)
    taught, _ = gradient(PARAMS, batch, Teacher(OTHER, CONFIG, SENTINELS))
    alone, _ = gradient(PARAMS, batch, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), taught, alone)


def test_the_reported_loss_by_task_stays_the_negative_log_likelihood():
    batch = uneven_batch()
    _, sums = gradient(PARAMS, batch, Teacher(OTHER, CONFIG, SENTINELS))
    total, expected = loss_sums(CONFIG, PARAMS, batch, 3)
    np.testing.assert_allclose(sums.nll, expected.nll, rtol=1e-6)
    assert expected.distilled is None
    assert abs(sums.distilled - total) > 1e-2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_brings_the_student_towards_the_teacher(accumulation):
    teacher, batch = Teacher(OTHER, CONFIG, SENTINELS), batch_of(range(3, 50))

    @jax.jit
    def step(state, batch, teacher):
        return train_step(
            state,
            batch,
            config=CONFIG,
            optimizer=OPTIMIZER,
            num_tasks=3,
            accumulation=accumulation,
            teacher=teacher,
        )

    state, losses = initial_state(CONFIG, OPTIMIZER, 0), []
    for _ in range(15):
        state, metrics = step(state, batch, teacher)
        losses.append(float(metrics.sums.distilled) / 20)
    entropy = gradient(OTHER, batch, teacher)[1].distilled / 20
    assert losses[-1] < losses[0] - 0.2
    assert losses[-1] > entropy  # no distribution does better than the teacher's own
