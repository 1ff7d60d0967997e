"""MFU of a run: known where the chip is, and then the share of its peak."""

import pytest

from t5g2.planning.rate import FlopRate, chip_of


@pytest.mark.parametrize(
    ("kind", "flops"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H200", 989.5e12),
    ],
)
def test_chips_have_the_peak_of_their_data_sheet(kind, flops):
    assert chip_of(kind).flops == flops


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "TPU v4", "NVIDIA GeForce RTX 4090"])
def test_of_other_devices_no_peak_is_made_up(kind):
    assert chip_of(kind) is None


def test_the_rate_of_a_step():
    found = FlopRate(step=10**15, peak=1e16).of(0.5)
    assert found == {"model_flops_per_second": 2e15, "mfu": pytest.approx(0.2)}
    assert FlopRate(step=10**15, peak=None).of(0.5) == {"model_flops_per_second": 2e15}
