"""TPU's splash kernel, interpreted, against the reference; and who gets it."""

import functools

import numpy as np
import pytest
from fused_cases import (
    CASES,
    attends_alone_on_each_device,
    both,
    is_the_same_where_results_are_kept,
)
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from t5g2.errors import UserError
from t5g2.kernels.attention import Window, choose_backend
from t5g2.kernels.splash import MergedMask, splash

SPLASH = functools.partial(splash, interpret=True)


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_the_reference_in_value_and_gradient(case):
    (out, *gradients), (expected, *expected_gradients), segment_ids = both(case, SPLASH)
    assert not out[segment_ids == 0].any()
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_gradients_are_the_same_where_results_are_kept():
    is_the_same_where_results_are_kept(SPLASH)


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
    assert choose_backend("auto", mesh_of("gpu")) == "triton"
    assert choose_backend("auto", mesh_of("cpu")) == "blockwise"
    assert choose_backend("auto", None) == "blockwise"
    for wanted in ("reference", "blockwise"):
        assert choose_backend(wanted, mesh_of("tpu")) == wanted
    with pytest.raises(UserError, match="= 'splash' is for TPUs, not for CPUs"):
        choose_backend("splash", mesh_of("cpu"))
    with pytest.raises(UserError, match="is for TPUs"):
        choose_backend("splash", None)
    with pytest.raises(UserError, match="= 'triton' is for GPUs, not for TPUs"):
        choose_backend("triton", mesh_of("tpu"))


def test_devices_that_share_rows_have_no_fused_kernel():
    for platform, kernel in (("tpu", "splash"), ("gpu", "triton")):
        assert choose_backend("auto", mesh_of(platform, "context")) == "blockwise"
        with pytest.raises(UserError, match=rf"'{kernel}' needs mesh\.context = 1"):
            choose_backend(kernel, mesh_of(platform, "context"))


def test_on_a_mesh_each_device_attends_for_its_rows_and_heads():
    attends_alone_on_each_device("splash")
