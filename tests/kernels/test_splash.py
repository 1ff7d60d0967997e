"""TPU's splash kernel, interpreted, against the reference; and who gets it."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from packed_rows import SCALE, long_rows

from t5g2.errors import UserError
from t5g2.kernels.attention import RESULTS, Window, choose_backend, reference_attention
from t5g2.kernels.splash import MergedMask, splash

# Lengths of both sides (no multiples of a block), heads, key and value heads.
CASES = {
    "encoder, odd window": (150, None, (4, 1), Window(3, 3)),
    "encoder, window over blocks": (700, None, (2, 2), Window(127, 128)),
    "decoder, window": (300, 200, (8, 4), Window(40, 0)),
    "decoder, causal, longer encoder": (130, 600, (4, 2), Window(None, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_the_reference_in_value_and_gradient(case):
    length, memory_length, heads, window = CASES[case]
    query, own, keys, memory = long_rows(length, memory_length or 8, heads=heads)
    arrays = [query, keys.key, keys.value]
    arrays += [] if memory_length is None else [memory.key, memory.value]
    weights = np.random.default_rng(1).normal(size=query.shape).astype(np.float32)

    def run(function):
        def total(query, key, value, *crossed):
            near = keys._replace(key=key, value=value)
            far = memory._replace(key=crossed[0], value=crossed[1]) if crossed else None
            out = function(query, near, far)
            return jnp.sum(out * weights), out

        gradient = jax.grad(total, argnums=range(len(arrays)), has_aux=True)
        return jax.jit(gradient)(*arrays)

    gradients, out = run(
        lambda q, near, far: splash(
            q, own[0], near, far, window=window, scale=SCALE, interpret=True
        )
    )
    expected_gradients, expected = run(
        lambda q, near, far: reference_attention(q, *own, near, far, window=window, scale=SCALE)
    )
    assert not np.asarray(out)[own[0] == 0].any()
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_gradients_are_the_same_where_results_are_kept():
    query, own, keys, memory = long_rows(130, 200, heads=(4, 2))

    def gradient(policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def attend(query, near, far):
            window = Window(40, 0)
            return splash(query, own[0], near, far, window=window, scale=SCALE, interpret=True)

        def total(query, key, value):
            return jnp.sin(attend(query, keys._replace(key=key, value=value), memory)).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(query, keys.key, keys.value)

    expected = gradient(jax.checkpoint_policies.everything_saveable)
    kept = gradient(jax.checkpoint_policies.save_only_these_names(RESULTS))
    for ours, theirs in zip(kept, expected, strict=True):
        assert np.abs(theirs).max() > 0.01
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("window", [Window(None, None), Window(2, 0), Window(1, 3)])
def test_a_part_of_the_mask_is_that_part_of_the_whole(window):
    mask = MergedMask(6, 9, window)
    whole = mask[:, :]
    for q, k in np.ndindex(6, 9):
        left, right = (6 if reach is None else reach for reach in window)
        assert whole[q, k] == (k >= 6 or q - left <= k <= q + right)
    np.testing.assert_array_equal(mask[2:5, 4:8], whole[2:5, 4:8])


def mesh_of(platform, axis="data"):
    device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    return AbstractMesh((2,), (axis,), (AxisType.Auto,), abstract_device=device)


def test_the_devices_of_the_mesh_choose_the_back_end():
    assert choose_backend("auto", mesh_of("tpu")) == "splash"
    assert choose_backend("auto", mesh_of("cpu")) == "blockwise"
    assert choose_backend("auto", None) == "blockwise"
    for wanted in ("reference", "blockwise"):
        assert choose_backend(wanted, mesh_of("tpu")) == wanted
    with pytest.raises(UserError, match="= 'splash' is for TPUs, not for CPUs"):
        choose_backend("splash", mesh_of("cpu"))
    with pytest.raises(UserError, match="is for TPUs"):
        choose_backend("splash", None)


def test_devices_that_share_rows_have_no_fused_kernel():
    assert choose_backend("auto", mesh_of("tpu", "context")) == "blockwise"
    with pytest.raises(UserError, match=r"'splash' needs mesh\.context = 1"):
        choose_backend("splash", mesh_of("tpu", "context"))


def test_on_a_mesh_each_device_attends_for_its_rows_and_heads():
    script = Path(__file__).with_name("splash_on_mesh.py")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["equal", "no-collectives"]
