"""Kernels that XLA cannot split, or not well: run on each device's own rows and heads."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec

# The axes of a mesh that split the rows of a batch, and the one that splits attention heads.
ROW_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"


def current_mesh() -> AbstractMesh | None:
    """The mesh that the program being traced is for: the train and evaluation steps name theirs."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def target_platform(mesh: AbstractMesh | None) -> str:
    """What a mesh's devices are: "tpu", "gpu" or "cpu"; None: what jax itself runs on."""
    if mesh is None:
        return jax.default_backend()
    device = mesh.abstract_device
    assert device is not None, "a mesh of devices knows their platform"
    return device.platform


def on_each_device(function: Callable[..., Any], mesh: AbstractMesh | None) -> Callable[..., Any]:
    """A function of arrays [B, length] and [B, length, heads, ...], as every device runs it.

    Its result is [B, length, heads, ...]. The rows are split over `ROW_AXES`, the heads over
    `HEAD_AXIS`: what a device has of them already, if the model is sharded by the usual rules.

    Args:
        function: of any tree of such arrays.
        mesh: the devices; None: there is one alone.
    """
    if mesh is None:
        return function

    def spec(array: jax.Array) -> PartitionSpec:
        return PartitionSpec(ROW_AXES, None, *([HEAD_AXIS] if array.ndim > 2 else []))

    def call(*arrays: Any) -> Any:
        specs = jax.tree.map(spec, arrays)
        out = PartitionSpec(ROW_AXES, None, HEAD_AXIS)
        # What a Pallas kernel varies over is nothing that jax can know.
        mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
        return mapped(*arrays)

    return call
