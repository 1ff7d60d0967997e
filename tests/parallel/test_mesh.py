"""Meshes: what fits, and what is refused by name."""

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from t5g2.errors import UserError
from t5g2.models.config import T5GEMMA2_270M
from t5g2.models.t5gemma2 import abstract_model, logical_axes, parameter_tree
from t5g2.parallel.mesh import MeshConfig, check_rows, make_mesh
from t5g2.parallel.rules import MESH_AXES, parameter_shardings


def shardings_on(**sizes):
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    params = parameter_tree(abstract_model(T5GEMMA2_270M))
    return parameter_shardings(mesh, logical_axes(T5GEMMA2_270M), params)


def test_every_matrix_is_split_over_fsdp_and_tensor():
    shardings = shardings_on(fsdp=8)
    assert shardings["embedder"]["table"].spec == PartitionSpec("tensor", "fsdp")
    mlp = shardings["encoder"]["layers"]["mlp"]
    assert mlp["up"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert mlp["down"].spec == PartitionSpec(None, "tensor", "fsdp")
    assert all(isinstance(leaf, NamedSharding) for leaf in jax.tree.leaves(shardings))


def test_heads_that_a_mesh_axis_does_not_divide_are_refused_by_name():
    # 270M has a single key and value head.
    with pytest.raises(UserError, match=r"mesh.tensor = 2 does not divide the kv_heads axis \(1\)"):
        shardings_on(tensor=2)


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
