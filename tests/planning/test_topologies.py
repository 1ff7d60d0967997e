"""The machines that can be planned for are those that exist."""

import pytest

from t5g2.errors import UserError
from t5g2.planning.topologies import TOPOLOGIES, find_topology


def test_a_slice_has_the_chips_of_its_shape():
    assert find_topology("v5p:4x4x4").count == 64
    assert find_topology("v5e:4x4").count == 16
    assert find_topology("h100:8").count == 8
    assert find_topology("cpu:3").count == 3
    for name, topology in TOPOLOGIES.items():
        assert topology.name == name
        assert topology.count > 0


def test_accelerator_types_name_slices_too():
    # v5p counts cores, two to a chip.
    assert find_topology("v5p-512") == find_topology("v5p:4x8x8")
    assert find_topology("v5p-1024").count == 512
    assert find_topology("v5e-16") == find_topology("v5litepod-16") == find_topology("v5e:4x4")
    assert find_topology("v6e-64") == find_topology("v6e:8x8")


def test_slices_are_joined_by_their_number():
    two = find_topology("2xv5e-256")
    assert (two.name, two.one_slice, two.count, two.slices) == (
        "2xv5e:16x16",
        "v5e:16x16",
        512,
        2,
    )
    assert find_topology("v5e-256").one_slice == "v5e:16x16"
    for name, message in (
        ("2xv5e:2x4", "v5e:2x4 is one host"),
        ("2xv5p-8", "v5p:2x2x1 is one host"),
        ("2xv5e:4x5", "did you mean 'v5e:4x"),
    ):
        with pytest.raises(UserError, match=message):
            find_topology(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1xv5e:4x4", "no such machine"),
        ("v5e:16x16x2", "did you mean 'v5e:16x16'"),  # libtpu would take it
        ("v5p:4x4x5", "did you mean 'v5p:4x4"),
        ("h100:16", "did you mean 'h100:1'"),
        ("cpu:0", "the kinds are v5e, v6e, v5p, a100, h100, h200, cpu"),
        ("abacus", "the kinds are v5e"),
    ],
)
def test_machines_that_do_not_exist_are_refused_with_the_nearest(name, message):
    with pytest.raises(UserError, match=message) as error:
        find_topology(name)
    assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)
