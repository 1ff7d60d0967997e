"""Where every array of a recipe's step lies, and how many bytes of it a device has."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from t5g2.data.batch import empty_batch
from t5g2.data.image_examples import pixel_slot
from t5g2.data.packing import ImageSlots
from t5g2.kernels.layout import Layout, Names, installed
from t5g2.parallel.mesh import abstract_mesh, make_mesh
from t5g2.parallel.rules import batch_shardings, check_room, make_layout
from t5g2.settings import Settings
from t5g2.training.optimizer import make_optimizer
from t5g2.training.schedule import make_schedule
from t5g2.training.state import state_shardings
from t5g2.training.step import loss_sums


def shard_bytes(array: Any, sharding: NamedSharding) -> int:
    """Bytes of an array, or of a shape struct, on each device."""
    return math.prod(sharding.shard_shape(array.shape)) * array.dtype.itemsize


def placement(settings: Settings) -> Iterator[str]:
    """Lines that say how parameters, optimizer state, batch and activations lie on the mesh.

    The devices need not be there if the mesh says how many they are.

    Raises:
        UserError: as `t5g2 train` would, of the mesh and of the batch.
    """
    config, data, train = settings.model, settings.data, settings.train
    mesh = make_mesh(settings.mesh) if settings.mesh.data == -1 else abstract_mesh(settings.mesh)
    layout = make_layout(mesh, settings.mesh.rules)
    room = (data.inputs_length, data.targets_length)
    check_room(layout, config, room)
    parts = settings.batch_parts(mesh)
    schedule = make_schedule(settings.schedule, train.total_steps)
    shapes, shardings = state_shardings(
        config, make_optimizer(settings.optimizer, schedule), layout
    )
    slots = None
    if config.vision is not None and data.images_per_row:
        slots = ImageSlots(data.images_per_row, pixel_slot(config))
    batch = functools.partial(empty_batch, inputs_length=room[0], targets_length=room[1])
    whole = jax.eval_shape(lambda: batch(parts.rows, images=slots))
    part = jax.eval_shape(lambda: batch(parts.rows // parts.accumulation, images=slots))

    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    if isinstance(mesh, Mesh):
        yield f"# Batch: {parts}"
    yield f"# On a mesh of {mesh.size} devices ({sizes}), with bytes on each:"
    yield from _lines("Parameters", _flat(shapes.params, shardings.params))
    yield from _lines("Optimizer state", _flat(shapes.opt_state, shardings.opt_state))
    yield from _lines("Batch", _flat(whole, batch_shardings(layout, whole)))
    states = _activations(settings, layout, shapes.params, part)
    yield from _lines("Activations of a microbatch, one of each", states, total=False)
    total = sum(array.size for array in jax.tree.leaves(shapes.params))
    yield f"# {total:,} parameters"


Placed = tuple[str, Any, NamedSharding]


def _flat(tree: Any, shardings: Any) -> list[Placed]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), array, sharding)
        for (path, array), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    ]


def _activations(settings: Settings, layout: Layout, params: Any, batch: Any) -> list[Placed]:
    """What the forward pass says of where its activations lie."""
    found: dict[tuple[str, tuple[int, ...]], Placed] = {}

    def watch(what: str, x: Any, names: Names) -> None:
        struct = jax.ShapeDtypeStruct(x.shape, x.dtype)
        found[what, x.shape] = (what, struct, layout.sharding(*names))

    def forward(params: Any, batch: Any) -> Any:
        with installed(layout, watch):
            return loss_sums(settings.model, params, batch, 1)

    jax.eval_shape(forward, params, batch)
    return list(found.values())


def _lines(title: str, placed: list[Placed], *, total: bool = True) -> Iterator[str]:
    yield f"# {title}"
    here = 0
    for name, array, sharding in placed:
        size = shard_bytes(array, sharding)
        here += size
        split = "whole" if sharding.is_fully_replicated else _words(sharding)
        shape = f"{array.dtype}{list(array.shape)}"
        yield f"#   {name:52} {shape:32} {split:44} {size:>14,} B"
    if total:
        yield f"#   {'together':52} {'':32} {'':44} {here:>14,} B"


def _words(sharding: NamedSharding) -> str:
    """Each axis's mesh axes: `fsdp x context, -, tensor`."""
    return ", ".join(
        "-" if entry is None else entry if isinstance(entry, str) else " x ".join(entry)
        for entry in sharding.spec
    )
