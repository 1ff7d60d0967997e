"""Which mesh axes each logical axis of parameters, batches and activations is split over."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from t5g2.config import did_you_mean
from t5g2.errors import UserError
from t5g2.kernels.layout import LENGTH, ROWS, Layout, Names
from t5g2.models.config import ModelConfig

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axes of parameters, which `mesh.rules` may change. `heads`, `kv_heads`, `mlp` and
# `vocab` split activations too, over those mesh axes that do not split the tokens.
PARAMETER_RULES: Mapping[str, tuple[str, ...]] = {
    "embed": ("fsdp", "context"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "layers": (),
    "vision_embed": ("fsdp", "context"),
    "vision_heads": ("tensor",),
    "vision_mlp": ("tensor",),
}
# Logical axes of tokens and patches, which stay as they are.
TOKEN_RULES: Mapping[str, tuple[str, ...]] = {
    ROWS: ("data", "fsdp"),
    LENGTH: ("context",),
    "patches": ("context",),
}
# What an axis is split over first: a table's parts stay together where its other axes are gathered.
_MAJOR_FIRST = ("tensor", "data", "fsdp", "context")


def make_layout(mesh: Mesh | AbstractMesh, changed: Mapping[str, tuple[str, ...]] = {}) -> Layout:
    """The layout of a mesh by the rules above.

    Args:
        mesh: the devices, or their shape alone.
        changed: logical axis to mesh axes, instead of those above; () splits it over none.

    Raises:
        UserError: an unknown logical or mesh axis, or one that may not change, by name.
    """
    for name, axes in changed.items():
        if name in TOKEN_RULES:
            raise UserError(f"mesh.rules: {name} stays split over {', '.join(TOKEN_RULES[name])}")
        if name not in PARAMETER_RULES:
            raise UserError(
                f"mesh.rules: no logical axis {name!r}{did_you_mean(name, PARAMETER_RULES)}"
            )
        for axis in axes:
            if axis not in MESH_AXES:
                raise UserError(
                    f"mesh.rules: no mesh axis {axis!r} (of {name}){did_you_mean(axis, MESH_AXES)}"
                )
    rules = {**PARAMETER_RULES, **TOKEN_RULES, **changed}
    return Layout(mesh, {n: tuple(a for a in _MAJOR_FIRST if a in rules[n]) for n in rules})


def parameter_shardings(layout: Layout, axes: Any, shapes: Any) -> Any:
    """NamedShardings of a parameter tree.

    Args:
        layout: the mesh and its rules.
        axes: tree of tuples of logical axis names.
        shapes: the same tree of arrays or shape structs.

    Raises:
        UserError: a dimension that its mesh axes do not divide, or two of one parameter that are
            split over the same one, by the parameter's name.
    """

    def sharding(path: Any, names: Names, array: Any) -> NamedSharding:
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        used: dict[str, str | None] = {}
        for name, size in zip(names, array.shape, strict=True):
            split = layout.axes(name)
            parts = layout.size(name or "")
            if size % parts:
                over = " x ".join(f"mesh.{axis}" for axis in split)
                raise UserError(
                    f"{over} = {parts} does not divide the {name} axis ({size}) of {where}: change "
                    f"the mesh, or hold the axis whole on each device by mesh.rules = "
                    f"{{{name!r}: ()}}"
                )
            for axis in split:
                if axis in used:
                    raise UserError(
                        f"mesh.rules: {used[axis]} and {name} of {where} are both split over {axis}"
                    )
                used[axis] = name
        return NamedSharding(layout.mesh, layout.parameter_spec(names))

    return jax.tree_util.tree_map_with_path(
        sharding, axes, shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def check_room(layout: Layout, model: ModelConfig, room: tuple[int, int]) -> None:
    """Refuses lengths and models whose activations cannot be dealt out evenly.

    Args:
        layout: the mesh and its rules.
        model: what works on the batch.
        room: encoder and decoder tokens of a row.

    Raises:
        UserError: naming the setting, and what it must be a multiple of.
    """
    parts = layout.size(LENGTH)
    for name, length in zip(("inputs_length", "targets_length"), room, strict=True):
        if length % parts:
            raise UserError(f"data.{name} = {length} must be a multiple of {parts} (mesh.context)")
    vision = model.vision
    if vision is not None and vision.patches % parts:
        raise UserError(
            f"mesh.context = {parts} does not divide the {vision.patches} patches of an image"
        )
    parts = layout.size("vision_heads")
    if vision is not None and vision.num_heads % parts:
        raise UserError(
            f"mesh.tensor = {parts} does not divide the {vision.num_heads} heads of model.vision: "
            "change the mesh, or hold them whole on each device by mesh.rules = "
            "{'vision_heads': ()}"
        )


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def row_sharding(layout: Layout) -> NamedSharding:
    """The sharding of a leading axis of rows."""
    return layout.sharding(ROWS)


def batch_shardings(layout: Layout, batch: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """Where the arrays of a batch lie: tokens by row and place, everything else by row.

    Args:
        layout: the mesh and its rules.
        batch: arrays or shapes, under the names of `t5g2.data.batch`.
    """
    tokens, rows = layout.sharding(ROWS, LENGTH), row_sharding(layout)
    return {name: tokens if name.startswith(("encoder", "decoder")) else rows for name in batch}
