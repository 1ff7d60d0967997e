"""Which mesh axis each logical axis of parameters and batches is split over."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5g2.errors import UserError
from t5g2.kernels.on_mesh import HEAD_AXIS, ROW_AXES

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axis -> mesh axis. What is not named is not split.
PARAMETER_RULES: Mapping[str, str] = {
    "embed": "fsdp",
    "vision_embed": "fsdp",
    "vision_mlp": "tensor",
    "vocab": "tensor",
    "heads": HEAD_AXIS,
    "kv_heads": HEAD_AXIS,
    "mlp": "tensor",
}
# Rows of a batch are split over every axis that does not split the model itself.
BATCH = PartitionSpec(ROW_AXES)


def parameter_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """NamedShardings of a parameter tree.

    Args:
        mesh: the devices.
        axes: tree of tuples of logical axis names.
        shapes: the same tree of arrays or shape structs.

    Raises:
        UserError: a dimension that its mesh axis does not divide, by the parameter's name.
    """

    def sharding(path: Any, names: tuple[str, ...], array: Any) -> NamedSharding:
        spec = [PARAMETER_RULES.get(name) for name in names]
        for name, size, axis in zip(names, array.shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                raise UserError(
                    f"mesh.{axis} = {mesh.shape[axis]} does not divide the {name} axis ({size}) "
                    f"of {where}"
                )
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(
        sharding, axes, shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's leading axis, its rows."""
    return NamedSharding(mesh, BATCH)
