"""The bound, against figures worked out by hand."""

import dataclasses

import pytest

from t5g2.planning.collectives import Collective
from t5g2.planning.compile import CompiledStep, Memory
from t5g2.planning.executed import Executed
from t5g2.planning.products import Products
from t5g2.planning.roofline import budget, roofline, utilization
from t5g2.planning.topologies import Chip

CHIP = Chip(name="chip", flops=1e12, hbm_bytes=10**9, hbm_bandwidth=1e10, link_bandwidth=1e9)
SENT = [Collective("all-gather", "fsdp", 2, 300), Collective("all-reduce", "data", 1, 200)]
COMPILED = CompiledStep(
    Memory(1, 2, 3, 4), SENT, products=Products(3 * 10**12, 0), traffic=None, text=""
)


def bound(chip=CHIP, **changes):
    arguments = {
        "parameters": 1000,
        "weight_bytes": 2,
        "passes": 3,
        "splits": 4,
        "tensor": 2,
        "compiled": COMPILED,
    }
    return roofline(chip, 4, Executed(flops=8 * 10**12, bytes=4 * 10**6), **arguments | changes)


def test_each_resource_works_at_its_peak():
    made = bound()
    assert made.compute == pytest.approx(3.0)
    # A quarter of the products' bytes; half of the weights three times; a quarter of the optimizer.
    assert made.memory == pytest.approx((10**6 + 3 * 2 * 1000 / 2 + 28 * 1000 / 4) / 1e10)
    assert made.network == pytest.approx(500e-9)
    assert made.overlapped == made.compute
    assert made.in_turn == made.compute + made.network


def test_what_goes_to_other_slices_takes_the_time_of_their_network():
    chip = dataclasses.replace(CHIP, slice_bandwidth=1e8)
    sent = [*SENT, Collective("all-reduce", "slices", 1, 100)]
    made = bound(chip=chip, compiled=COMPILED._replace(collectives=sent))
    assert made.network == pytest.approx(500e-9 + 1e-6)


def test_what_kernels_read_and_write_is_the_memorys_work_where_that_is_known():
    made = bound(compiled=COMPILED._replace(traffic=5 * 10**10))
    assert made.memory == pytest.approx(5.0)
    assert made.in_turn == made.memory + made.network


def test_utilization_is_the_share_of_the_peak():
    assert utilization(CHIP, 4, 4 * 10**12, 2.0) == pytest.approx(0.5)


def test_a_run_takes_whole_steps():
    run = budget(2e12, 4_194_304, 10.0, 16)
    assert run.steps == 476_838
    assert run.days == pytest.approx(476_838 * 10 / 86_400)
    assert run.chip_hours == pytest.approx(run.days * 24 * 16)
