"""The machines that can be planned for: real ones, with the figures their makers publish."""

import dataclasses
import math
import re
from typing import Literal

from t5g2.config import did_you_mean
from t5g2.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What one device can do at best.

    Attributes:
        name: what its maker calls it.
        flops: bfloat16 products and sums a second, dense.
        hbm_bytes: memory that a program can have.
        hbm_bandwidth: bytes a second between memory and cores.
        link_bandwidth: bytes a second that it can send to the other devices of the topology, over
            all its links together.
        slice_bandwidth: bytes a second that it can send to other slices; None: it has none.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    slice_bandwidth: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Some devices and how they are connected.

    Attributes:
        name: as on the command line.
        platform: what XLA compiles for.
        count: number of devices.
        chip: of which kind; None: a CPU, of which nothing is known.
        slices: equal parts behind the data center's network.
    """

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    count: int
    chip: Chip | None
    slices: int = 1

    @property
    def one_slice(self) -> str:
        """The name of each of its slices."""
        return self.name.removeprefix(f"{self.slices}x") if self.slices > 1 else self.name


_GIB = 2**30

# Cloud TPU documentation, pages "TPU v5e", "TPU v5p" and "TPU v6e": peak compute per chip (bf16),
# HBM bandwidth; of the bidirectional inter-chip interconnect bandwidth, one direction. Of the HBM
# (16, 95 and 32 GB) a program can have what libtpu's compiler says. The data center's network: 6.4
# Tbit/s for the 256 chips of a v5e pod, 50 Gbit/s for a v5p chip, four of 200 Gbit/s for the eight
# chips of a v6e host.
_V5E = Chip(
    name="TPU v5e",
    flops=197e12,
    hbm_bytes=round(15.75 * _GIB),
    hbm_bandwidth=819e9,
    link_bandwidth=200e9,
    slice_bandwidth=3.125e9,
)
_V5P = Chip(
    name="TPU v5p",
    flops=459e12,
    hbm_bytes=round(95.74 * _GIB),
    hbm_bandwidth=2765e9,
    link_bandwidth=600e9,
    slice_bandwidth=6.25e9,
)
_V6E = Chip(
    name="TPU v6e",
    flops=918e12,
    hbm_bytes=round(31.25 * _GIB),
    hbm_bandwidth=1600e9,
    link_bandwidth=400e9,
    slice_bandwidth=12.5e9,
)
# NVIDIA data sheets "A100 Tensor Core GPU" (80 GB SXM), "H100 Tensor Core GPU" (SXM), "H200 Tensor
# Core GPU" (SXM): bfloat16 without sparsity; of the NVLink bandwidth, one direction. Of the memory
# (80, 80 and 141 GB) CUDA says that a program can have so much, as frameworks print it when they
# run out of it.
_A100 = Chip(
    name="NVIDIA A100 80GB",
    flops=312e12,
    hbm_bytes=round(79.25 * _GIB),
    hbm_bandwidth=2039e9,
    link_bandwidth=300e9,
)
_H100 = Chip(
    name="NVIDIA H100 SXM",
    flops=989.5e12,
    hbm_bytes=round(79.1 * _GIB),
    hbm_bandwidth=3350e9,
    link_bandwidth=450e9,
)
_H200 = Chip(
    name="NVIDIA H200 SXM",
    flops=989.5e12,
    hbm_bytes=round(139.8 * _GIB),
    hbm_bandwidth=4800e9,
    link_bandwidth=450e9,
)

CHIPS = {chip.name: chip for chip in (_V5E, _V5P, _V6E, _A100, _H100, _H200)}

# Shapes of single slices, from the same pages' tables of supported configurations.
_SQUARES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    *("8x16x16", "16x16x16", "16x16x24"),
)
_SLICES = {"v5e": (_V5E, _SQUARES), "v6e": (_V6E, _SQUARES), "v5p": (_V5P, _CUBES)}
# One machine; several of them are as fast as their network, of which no data sheet tells.
_MACHINES = {"a100": _A100, "h100": _H100, "h200": _H200}
_GPUS = (1, 2, 4, 8)


def _known() -> dict[str, Topology]:
    slices = {
        f"{kind}:{shape}": Topology(
            name=f"{kind}:{shape}",
            platform="tpu",
            count=math.prod(map(int, shape.split("x"))),
            chip=chip,
        )
        for kind, (chip, shapes) in _SLICES.items()
        for shape in shapes
    }
    machines = {
        f"{kind}:{count}": Topology(name=f"{kind}:{count}", platform="gpu", count=count, chip=chip)
        for kind, chip in _MACHINES.items()
        for count in _GPUS
    }
    return slices | machines


TOPOLOGIES = _known()

# Cloud TPU's accelerator types: v5e and v6e count chips, v5p counts cores, two to a chip.
_ACCELERATOR_TYPES = {
    f"{prefix}-{topology.count * cores}": topology
    for kind, prefix, cores in (
        ("v5e", "v5e", 1),
        ("v5e", "v5litepod", 1),
        ("v6e", "v6e", 1),
        ("v5p", "v5p", 2),
    )
    for topology in TOPOLOGIES.values()
    if topology.name.startswith(kind)
}


def find_topology(name: str) -> Topology:
    """The topology of a name such as v5p:4x4x4, v5p-128, 2xv5e-256, h100:8 or cpu:8.

    Raises:
        UserError: there is none, with the nearest that there is.
    """
    if match := re.fullmatch(r"cpu:([1-9]\d*)", name):
        return Topology(name=name, platform="cpu", count=int(match[1]), chip=None)
    if (match := re.fullmatch(r"([1-9]\d*)x(v.+)", name)) and int(match[1]) > 1:
        return _slices(int(match[1]), find_topology(match[2]))
    found = TOPOLOGIES.get(name) or _ACCELERATOR_TYPES.get(name)
    if found is None:
        kind = re.split("[:-]", name.lower())[0]
        of_kind = [known for known in TOPOLOGIES if known.startswith(f"{kind}:")]
        hint = f"; there are {', '.join(of_kind)}" if of_kind else ""
        near = did_you_mean(name, [*TOPOLOGIES, *_ACCELERATOR_TYPES])
        kinds = f"; the kinds are {', '.join([*_SLICES, *_MACHINES, 'cpu'])}"
        raise UserError(f"--topology: no such machine as {name!r}{near or hint or kinds}")
    return found


def _slices(count: int, one: Topology) -> Topology:
    """Several slices, joined by the data center's network (Cloud TPU documentation, "Multislice").

    Raises:
        UserError: slices of a single host, which cannot be joined.
    """
    if one.count <= (4 if one.name.startswith("v5p") else 8):
        raise UserError(f"--topology: {one.name} is one host: only slices of several are joined")
    return dataclasses.replace(
        one, name=f"{count}x{one.name}", count=count * one.count, slices=count
    )
