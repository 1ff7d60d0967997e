"""Meshes: what fits, what is split over what, and what is refused by name."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from t5g2.errors import UserError
from t5g2.models.config import T5GEMMA2_4B, T5GEMMA2_270M
from t5g2.models.t5gemma2 import abstract_model, logical_axes, parameter_tree
from t5g2.parallel.mesh import MeshConfig, abstract_mesh, arranged, check_rows, make_mesh
from t5g2.parallel.rules import MESH_AXES, check_room, make_layout, parameter_shardings


def layout_of(rules=None, **sizes):
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    return make_layout(mesh, rules or {})


def shardings_on(rules=None, config=T5GEMMA2_270M, **sizes):
    params = parameter_tree(abstract_model(config))
    return parameter_shardings(layout_of(rules, **sizes), logical_axes(config), params)


def test_every_matrix_is_split_over_all_axes_but_data():
    shardings = shardings_on(config=T5GEMMA2_4B, data=2, fsdp=8, tensor=4, context=2)
    over = ("fsdp", "context")
    assert shardings["embedder"]["table"].spec == PartitionSpec("tensor", over)
    mlp = shardings["encoder"]["layers"]["mlp"]
    assert mlp["up"].spec == PartitionSpec(None, over, "tensor")
    assert mlp["down"].spec == PartitionSpec(None, "tensor", over)
    assert all(isinstance(leaf, NamedSharding) for leaf in jax.tree.leaves(shardings))


def test_heads_that_a_mesh_axis_does_not_divide_are_refused_by_name():
    # 270M has a single key and value head.
    with pytest.raises(
        UserError,
        match=r"mesh.tensor = 2 does not divide the kv_heads axis \(1\).*'kv_heads': \(\)",
    ):
        shardings_on(tensor=2)
    kept = shardings_on({"kv_heads": ()}, tensor=2)["decoder"]["layers"]["attention"]
    assert (kept["k"].spec, kept["q"].spec) == (
        PartitionSpec(None, None, None, None),
        PartitionSpec(None, None, "tensor", None),
    )


def test_rules_may_be_changed():
    table = shardings_on({"vocab": ("fsdp", "tensor"), "embed": ()}, fsdp=4)["embedder"]["table"]
    assert table.spec == PartitionSpec("fsdp", None)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"vocb": ("fsdp",)}, "no logical axis 'vocb'; did you mean 'vocab'?"),
        ({"vocab": ("tensr",)}, r"no mesh axis 'tensr' \(of vocab\); did you mean 'tensor'?"),
        ({"rows": ("data",)}, "rows stays split over data, fsdp"),
        ({"vocab": ("fsdp",)}, "vocab and embed of embedder/table are both split over fsdp"),
    ],
)
def test_rules_that_cannot_be_are_refused_by_name(rules, message):
    with pytest.raises(UserError, match=message):
        shardings_on(rules, fsdp=2)


def test_one_axis_may_take_the_rest_of_the_devices():
    assert dict(make_mesh(MeshConfig()).shape) == {
        "data": jax.device_count(),
        "fsdp": 1,
        "tensor": 1,
        "context": 1,
    }
    with pytest.raises(UserError, match=r"mesh \(data=-1, fsdp=7.*does not fit 1 devices"):
        make_mesh(MeshConfig(fsdp=7))
    with pytest.raises(ValueError, match="only one mesh axis may be -1"):
        MeshConfig(fsdp=-1)


def test_rows_must_deal_out_evenly():
    mesh = make_mesh(MeshConfig())
    check_rows(mesh, 8, 4)
    with pytest.raises(UserError, match=r"6 rows .*multiple of 4 .* = 4 or 8 would do"):
        check_rows(mesh, 6, 4)


def test_a_mesh_without_devices_must_say_how_many_they_are():
    assert abstract_mesh(MeshConfig(data=2, fsdp=64)).size == 128
    with pytest.raises(UserError, match=r"mesh.data = -1 takes the rest"):
        abstract_mesh(MeshConfig())


@pytest.mark.parametrize(
    ("room", "sizes", "message"),
    [
        ((66, 64), {"context": 4}, r"data.inputs_length = 66 must be a multiple of 4"),
        ((64, 66), {"context": 4}, r"data.targets_length = 66 must be a multiple of 4"),
        ((96, 96), {"context": 3}, r"mesh.context = 3 does not divide the 4096 patches"),
        ((96, 96), {"tensor": 32}, r"mesh.tensor = 32 does not divide the 16 heads of model.v"),
    ],
)
def test_lengths_and_images_that_do_not_deal_out_evenly_are_refused_by_name(room, sizes, message):
    with pytest.raises(UserError, match=message):
        check_room(layout_of(**sizes), T5GEMMA2_270M, room)
    text = dataclasses.replace(T5GEMMA2_270M, vision=None)
    check_room(layout_of(**sizes), text, (96, 96))


def devices_of(slices, each):
    """Stand-ins for the devices of some slices, in no order."""
    made = [
        SimpleNamespace(
            id=i,
            slice_index=i % slices,
            process_index=i % slices,
            platform="cpu",
            device_kind="cpu",
        )
        for i in range(slices * each)
    ]
    return made[::-1]


def test_only_the_data_axis_crosses_from_slice_to_slice():
    for given in (None, 2):
        config = MeshConfig(data=4, fsdp=2, tensor=2, slices=given)
        mesh = arranged(config, devices_of(2, 8))
        assert mesh.shape == (4, 2, 2, 1)
        slices = np.vectorize(lambda device: device.slice_index)(mesh)
        assert [set(part.ravel()) for part in slices] == [{0}, {0}, {1}, {1}]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=1, fsdp=16), "mesh.data = 1 must be a multiple of the 2 slices"),
        (MeshConfig(slices=4), "mesh.slices = 4, but the devices are of 2 slices"),
    ],
)
def test_slices_that_do_not_fit_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        arranged(config, devices_of(2, 8))
