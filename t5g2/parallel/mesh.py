"""The device mesh."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh

from t5g2.errors import UserError
from t5g2.parallel.rules import MESH_AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; one may be -1 and takes the devices that the others leave.

    Attributes:
        data: copies of the model, each with its own rows.
        fsdp: devices that share the parameters and the rows.
        tensor: devices that share heads, MLP and vocabulary.
        context: devices that share the parameters and a row's tokens.
        slices: groups of devices behind a slower network than the one within; `data` is a multiple
            and crosses it, the other axes do not. None: as many as the devices say.
        rules: logical axis of parameters to the mesh axes that it is split over, instead of
            `t5g2.parallel.rules.PARAMETER_RULES`.
        cpu_devices: split this machine's CPU into so many devices; None: leave it as it is.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    slices: int | None = None
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    cpu_devices: int | None = None

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        if list(sizes.values()).count(-1) > 1:
            raise ValueError("only one mesh axis may be -1")
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"{axis} must be at least 1, or -1 for the rest, not {size}")
        if self.slices is not None and self.slices < 1:
            raise ValueError(f"slices must be at least 1, not {self.slices}")


def configure_devices(config: MeshConfig) -> None:
    """Splits the CPU into virtual devices, if asked to; only before jax has started its back end.

    Raises:
        UserError: the back end runs already with another number of devices.
    """
    if config.cpu_devices is None:
        return
    try:
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    except RuntimeError:
        if jax.device_count("cpu") != config.cpu_devices:
            raise UserError(
                f"mesh.cpu_devices = {config.cpu_devices}: jax runs with "
                f"{jax.device_count('cpu')} CPU devices already"
            ) from None


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices.

    Args:
        config: its shape.
        devices: what it is made of; None: the devices that jax runs on.

    Raises:
        UserError: the axes' sizes do not multiply to the number of devices, or the data axis does
            not deal out over the slices.
    """
    ordered = arranged(config, jax.devices() if devices is None else devices)
    return Mesh(ordered, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The shape of a mesh, without its devices.

    Raises:
        UserError: an axis takes "the rest" of devices that nobody counted.
    """
    sizes = _sizes(config)
    if -1 in sizes:
        axis = MESH_AXES[sizes.index(-1)]
        raise UserError(f"mesh.{axis} = -1 takes the rest of the devices: say how many it is")
    return AbstractMesh(tuple(sizes), MESH_AXES)


def arranged(config: MeshConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the order of a mesh: an array of its shape; see `make_mesh`."""
    sizes, count = _sizes(config), len(devices)
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count:
        shape = ", ".join(f"{a}={getattr(config, a)}" for a in MESH_AXES)
        fix = (
            f"make the product of the others a divisor of {count}"
            if -1 in sizes
            else f"make their product {count}, or one of them -1 for the rest"
        )
        raise UserError(f"mesh ({shape}) does not fit {count} devices: {fix}")
    by_slice = hasattr(devices[0], "slice_index")
    groups = {d.slice_index if by_slice else d.process_index for d in devices}
    slices = config.slices or (len(groups) if by_slice else 1)
    if slices > 1:
        if slices != len(groups):
            what = "slices" if by_slice else "processes"
            raise UserError(f"mesh.slices = {slices}, but the devices are of {len(groups)} {what}")
        if sizes[0] % slices:
            raise UserError(
                f"mesh.data = {sizes[0]} must be a multiple of the {slices} slices: the other axes "
                "do not cross the network between them"
            )
        # Only gradients cross the slower network: the data axis alone spans it, from outside.
        return mesh_utils.create_hybrid_device_mesh(
            [sizes[0] // slices, *sizes[1:]],
            [slices] + [1] * (len(sizes) - 1),
            devices,
            process_is_granule=not by_slice,
            allow_split_physical_axes=True,
        )
    # On a TPU torus a mesh axis may take a part of a physical one, or several of them.
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def row_parts(mesh: Mesh | AbstractMesh) -> int:
    """How many parts the rows of a batch are split into: those of the axes that share them."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(mesh: Mesh | AbstractMesh, rows: int, accumulation: int) -> None:
    """Refuses batches whose microbatches cannot be dealt out evenly.

    Raises:
        UserError: `rows` is no multiple of `accumulation` times the devices that share the rows.
    """
    parts = row_parts(mesh) * accumulation
    if rows % parts:
        below = rows // parts * parts
        fitting = " or ".join(str(fit) for fit in (below, below + parts) if fit)
        raise UserError(
            f"a batch of {rows} rows (train.rows, or train.tokens_per_batch) must be a multiple of "
            f"{parts} (mesh.data x mesh.fsdp x train.accumulation): train.rows = {fitting} would do"
        )


def _sizes(config: MeshConfig) -> list[int]:
    return [getattr(config, axis) for axis in MESH_AXES]
