"""GPU's attention kernel, interpreted, against the reference; and compiled without a GPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_cases import (
    CASES,
    attends_alone_on_each_device,
    both,
    gradients_with,
    is_the_same_where_results_are_kept,
)
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from packed_rows import SCALE, long_rows, packed

from t5g2.kernels.attention import (
    RESULTS,
    KeyValues,
    Window,
    attention,
    reference_attention,
)
from t5g2.kernels.triton import triton_attention
from t5g2.planning.executed import executed

TRITON = functools.partial(triton_attention, interpret=True)


@pytest.mark.parametrize("case", CASES)
def test_triton_equals_the_reference_in_value_and_gradient(case):
    (out, *gradients), (expected, *expected_gradients), segment_ids = both(case, TRITON)
    assert not out[segment_ids == 0].any()
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_bfloat16_errs_by_less_than_its_own_rounding():
    for case in ("encoder, odd window", "decoder, window"):
        ours, exact, _ = both(case, TRITON, jnp.bfloat16)
        for mine, right in zip(ours, exact, strict=True):
            # 2**-8 is the unit of bfloat16; squares are averaged.
            assert np.square(mine - right).mean() <= 2.0**-16 * np.square(right).mean()


def test_padding_and_examples_without_a_counterpart_are_zeros_and_no_nan():
    # A row of padding; a row whose second example has nothing on the encoder's side.
    query, _, keys, memory = long_rows(160, 140, heads=(2, 1))
    own = np.zeros((2, 160), int)
    own[1, :90], own[1, 90:150] = 1, 2
    segment_ids, positions = packed(own)
    other = np.zeros((2, 140), int)
    other[1, :100] = 1
    keys = KeyValues(keys.key, keys.value, segment_ids, positions)
    memory = KeyValues(memory.key, memory.value, *packed(other))

    def total(function, *states):
        query, key, value, far_key, far_value = states
        near, far = keys._replace(key=key, value=value), memory._replace(key=far_key)
        out = function(query, near, far._replace(value=far_value))
        return jnp.sum(jnp.sin(out)), out

    def attend(query, near, far):
        return TRITON(query, segment_ids, near, far, window=Window(20, 0), scale=SCALE)

    def reference(query, near, far):
        return reference_attention(
            query, segment_ids, positions, near, far, window=Window(20, 0), scale=SCALE
        )

    states = (query, keys.key, keys.value, memory.key, memory.value)
    (gradients, out), (expected_gradients, expected) = (
        jax.grad(functools.partial(total, f), argnums=range(5), has_aux=True)(*states)
        for f in (attend, reference)
    )
    assert not np.asarray(out)[0].any()
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_other_examples_blocks_are_not_read():
    # Two examples, each of whole blocks on both sides: what is in one is nothing to the other.
    query, _, keys, memory = long_rows(512, 512, heads=(2, 1), rows=1)
    segment_ids, positions = packed(np.repeat([[1, 2]], 256, axis=1))

    def gradients(poison):
        def spoiled(states):
            return states.at[:, 256:].set(poison)

        near = KeyValues(spoiled(keys.key), spoiled(keys.value), segment_ids, positions)
        far = KeyValues(spoiled(memory.key), spoiled(memory.value), segment_ids, positions)

        def total(query):
            out = TRITON(query, segment_ids, near, far, window=Window(None, 0), scale=SCALE)
            return out[:, :256].sum(), out[:, :256]

        gradient, out = jax.grad(total, has_aux=True)(query)
        return np.asarray(out), np.asarray(gradient[:, :256])

    for poisoned, clean in zip(gradients(np.nan), gradients(0.0), strict=True):
        np.testing.assert_array_equal(poisoned, clean)


def test_gradients_are_the_same_where_results_are_kept():
    is_the_same_where_results_are_kept(TRITON)


def test_where_results_are_kept_the_backward_pass_does_not_attend_anew():
    policies = jax.checkpoint_policies
    kept, anew = (
        executed(gradients_with(policy, triton_attention).jaxpr).in_kernels
        for policy in (policies.save_only_these_names(RESULTS), policies.nothing_saveable)
    )
    query, own, keys, memory = long_rows(130, 200, heads=(4, 2))

    def attend(query):
        return triton_attention(query, own[0], keys, memory, window=Window(40, 0), scale=SCALE)

    assert anew - kept == executed(jax.jit(attend).trace(query).jaxpr).in_kernels


@pytest.mark.parametrize(
    ("device", "queries"),
    [("NVIDIA H100 80GB HBM3", 128), ("NVIDIA A100-SXM4-80GB", 64), ("NVIDIA L4", 32)],
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_the_devices_of_the_mesh_choose_the_blocks_of_a_step_lowered_for_them(device, queries):
    device = AbstractDevice(device_kind=device, num_cores=None, platform="gpu")
    axes = ("data", "fsdp", "tensor")
    mesh = AbstractMesh((1, 1, 1), axes, (AxisType.Auto,) * 3, abstract_device=device)
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)

    def states(heads):
        return jax.ShapeDtypeStruct((1, 512, heads, 256), jnp.bfloat16)

    def total(query, key, value, ids):
        near = KeyValues(key, value, ids, ids)
        with jax.sharding.use_abstract_mesh(mesh):
            out = attention(query, ids, ids, near, near, window=Window(99, 0), scale=1.0)
        return out.astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(states(4), states(1), states(1), ids)
    with jax.sharding.use_abstract_mesh(mesh):
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = dict(
        reversed(call) for call in re.findall(r'grid_y = (\d+).*?name = "attention_(\w+)"', text)
    )
    assert set(calls) == {"fwd", "dq", "dkv"}
    assert int(calls["fwd"]) == 512 // queries


def test_on_a_mesh_each_device_attends_for_its_rows_and_heads():
    attends_alone_on_each_device("triton")
