"""The tiled loss against a dense log-softmax, and how little it holds at a time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from t5g2.kernels.vocabulary_loss import Teaching, logits, summed_losses, token_losses


def operands(batch, length, vocabulary, width=16, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, length, width)).astype(np.float32)
    table = rng.normal(size=(vocabulary, width)).astype(np.float32)
    return hidden, table, rng.integers(0, vocabulary, (batch, length))


def dense(hidden, table, targets, softcap):
    out = hidden @ table.T
    if softcap is not None:
        out = softcap * jnp.tanh(out / softcap)
    return -jnp.take_along_axis(jax.nn.log_softmax(out), targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("batch", "length", "vocabulary", "rows"),
    [(1, 1, 7, 512), (3, 7, 101, 4), (2, 13, 50, 25)],
)
def test_losses_and_gradients_equal_those_of_a_dense_log_softmax(
    batch, length, vocabulary, rows, softcap
):
    hidden, table, targets = operands(batch, length, vocabulary)
    weights = np.random.default_rng(1).normal(size=targets.shape)

    def tiled(hidden, table):
        return summed_losses(hidden, table, targets, weights, softcap=softcap, rows=rows)

    def again(hidden, table):
        losses = token_losses(hidden, table, targets, softcap=softcap, rows=rows)
        return jnp.sum(losses * weights), losses

    def reference(hidden, table):
        losses = dense(hidden, table, targets, softcap)
        return jnp.sum(losses * weights), losses

    gradient_of = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))  # noqa: E731
    (expected_total, expected), expected_gradient = gradient_of(reference)(hidden, table)
    for function in (tiled, again):
        (total, losses), gradient = gradient_of(function)(hidden, table)
        assert losses.shape == targets.shape
        np.testing.assert_allclose(total, expected_total, rtol=1e-5)
        np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(gradient, expected_gradient, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(tiled(hidden, table), (expected_total, expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_z_loss_is_in_the_gradient_as_torch_has_it_and_not_in_the_value(softcap):
    hidden, table, targets = operands(3, 7, 101)
    weights = np.random.default_rng(1).uniform(size=targets.shape).astype(np.float32)

    def weighted(hidden, table):
        return summed_losses(hidden, table, targets, weights, softcap=softcap, z_loss=0.01, rows=4)

    gradient, losses = jax.grad(weighted, argnums=(0, 1), has_aux=True)(hidden, table)
    np.testing.assert_allclose(losses, dense(hidden, table, targets, softcap), rtol=1e-5, atol=1e-5)

    theirs = [torch.tensor(np.array(x), requires_grad=True) for x in (hidden, table)]
    logits = theirs[0] @ theirs[1].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(np.array(targets)).long().flatten(), reduction="none"
    )
    loss = nll + 0.01 * torch.logsumexp(logits, -1).flatten() ** 2
    (loss * torch.tensor(weights).flatten()).sum().backward()
    for ours, reference in zip(gradient, theirs, strict=True):
        np.testing.assert_allclose(ours, reference.grad.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_teachers_losses_and_their_gradient_equal_those_of_torch(softcap):
    hidden, table, targets = operands(3, 7, 101)
    teacher_hidden, teacher_table, _ = operands(3, 7, 101, width=24, seed=1)
    weights = np.random.default_rng(2).normal(size=targets.shape).astype(np.float32)

    teaches = np.random.default_rng(3).uniform(size=targets.shape) < 0.7

    def weighted(hidden, table, teacher_hidden, teacher_table):
        teaching = Teaching(teacher_hidden, teacher_table, teaches, 7.0)
        return summed_losses(
            hidden, table, targets, weights, softcap=softcap, teaching=teaching, rows=4
        )

    (total, likelihoods), gradient = jax.jit(
        jax.value_and_grad(weighted, argnums=(0, 1, 2, 3), has_aux=True)
    )(hidden, table, teacher_hidden, teacher_table)
    own, own_table = torch.tensor(hidden).requires_grad_(), torch.tensor(table).requires_grad_()
    out = own @ own_table.T
    out = out if softcap is None else softcap * torch.tanh(out / softcap)
    teacher = torch.tensor(teacher_hidden) @ torch.tensor(teacher_table).T
    hard = torch.nn.functional.one_hot(torch.tensor(np.array(targets)), 101).float()
    soft = torch.softmax(7 * torch.tanh(teacher / 7), -1)
    goal = torch.where(torch.tensor(teaches)[..., None], soft, hard)
    losses = torch.nn.functional.cross_entropy(
        out.flatten(0, 1), goal.flatten(0, 1), reduction="none"
    )
    expected = (losses * torch.tensor(weights).flatten()).sum()
    expected.backward()
    np.testing.assert_allclose(total, expected.detach(), rtol=1e-5)
    np.testing.assert_allclose(likelihoods, dense(hidden, table, targets, softcap), rtol=1e-5)
    np.testing.assert_allclose(gradient[0], own.grad, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient[1], own_table.grad, rtol=1e-4, atol=1e-5)
    assert not gradient[2].any()
    assert not gradient[3].any()


def test_losses_of_huge_logits_are_finite_and_exact():
    hidden, table, targets = operands(2, 9, 33)
    np.testing.assert_allclose(
        token_losses(1e3 * hidden, table, targets, rows=4),
        dense(1e3 * hidden, table, targets, None),
        rtol=1e-5,
    )


def test_logits_are_float32_also_from_bfloat16():
    hidden, table, _ = operands(1, 4, 9)
    half = logits(jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(table, jnp.bfloat16), None)
    assert half.dtype == jnp.float32
    # Rounding the result, too, would leave no more than eight bits.
    assert (half != half.astype(jnp.bfloat16).astype(jnp.float32)).any()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_array_of_all_tokens_by_the_vocabulary_is_ever_made(softcap):
    batch, length, vocabulary, rows = 4, 256, 3001, 128
    hidden, table, targets = operands(batch, length, vocabulary)

    weights = np.ones(targets.shape, np.float32)

    def loss(hidden, table):
        return summed_losses(hidden, table, targets, weights, softcap=softcap, rows=rows)[0]

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, table).compile()
    shapes = [
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"\b(?:f32|bf16|f16|pred|s32)\[([\d,]+)\]", compiled.as_text())
    ]
    assert any(vocabulary in shape and rows in shape for shape in shapes)
    largest = max(np.prod(shape) for shape in shapes)
    assert largest == rows * vocabulary
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < batch * length * vocabulary * 4


def test_on_a_mesh_the_table_is_sent_once_and_its_gradient_once():
    script = Path(__file__).with_name("loss_on_mesh.py")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    # Gathering sends it once, adding up twice.
    assert all(float(tables) < 4 for tables in run.stdout.split())
    assert len(run.stdout.split()) == 3
