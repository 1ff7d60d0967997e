"""The device mesh."""

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from t5g2.errors import UserError
from t5g2.parallel.rules import MESH_AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; one may be -1 and takes the devices that the others leave.

    Attributes:
        data: copies of the model, each with its own rows.
        fsdp: devices that share the parameters and the rows.
        tensor: devices that share heads, MLP and vocabulary.
        context: devices that share a row's tokens; more than 1 is refused for now.
        cpu_devices: split this machine's CPU into so many devices; None: leave it as it is.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    cpu_devices: int | None = None

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        if list(sizes.values()).count(-1) > 1:
            raise ValueError("only one mesh axis may be -1")
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"{axis} must be at least 1, or -1 for the rest, not {size}")
        if self.context != 1:
            raise ValueError("context must be 1: rows cannot be split over devices yet")


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
        UserError: the axes' sizes do not multiply to the number of devices.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    count = jax.device_count() if devices is None else len(devices)
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count:
        shape = ", ".join(f"{a}={getattr(config, a)}" for a in MESH_AXES)
        raise UserError(f"mesh ({shape}) does not fit {count} devices")
    # On a TPU torus a mesh axis may take a part of a physical one, or several of them.
    ordered = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(ordered, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def row_parts(mesh: Mesh) -> int:
    """How many parts the rows of a batch are split into: those of the axes that share them."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(mesh: Mesh, rows: int, accumulation: int) -> None:
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
