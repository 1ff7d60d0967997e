"""What a compiled program sends between devices, read from XLA's text of it."""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

from t5g2.planning.hlo import arrays, computations, dimensions

_COLLECTIVE = re.compile(
    r"= (?P<shape>\(.*?\)|\S+) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"ragged-all-to-all|collective-permute|collective-broadcast)(?P<start>-start)?\("
)
# Between slices XLA leaves the exchange to a runtime, which is sent the chip's part of it.
_BETWEEN_SLICES = re.compile(
    r'= \((?P<shape>\w+\[[\d,]*\]).* send\(.*_xla_megascale_target="\{(?P<slices>[\d,:]+)\}.*'
    r'_xla_megascale_transfer_type="(?P<kind>\w+)"'
)
# In place of mesh axes, for exchanges over the network between slices.
SLICES = "slices"
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
    r"\{([^}]*)\}"
)


class Collective(NamedTuple):
    """Exchanges of one kind between the devices along some mesh axes.

    Attributes:
        kind: "all-gather", "all-reduce", ...
        axes: the mesh axes, joined by " x "; "part of" them if not all devices along them do it;
            `SLICES`: from slice to slice.
        number: how many of them a step does.
        bytes: what a device sends in a step, by the ring algorithm: of an array of n bytes that p
            devices gather or scatter n (p - 1) / p, and twice that to reduce it to all of them.
    """

    kind: str
    axes: str
    number: int
    bytes: int


class Exchange(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: as in `Collective`.
        bytes: that a device sends each time.
        group: the devices of the first one's group; none: from slice to slice.
        times: how often a step does it.
        shapes: of the arrays that it makes.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    times: int
    shapes: tuple[tuple[int, ...], ...]


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
    """The collectives of a compiled module summed by kind and axes, most bytes first.

    Args:
        text: of the module after partitioning, as XLA prints it.
        mesh: sizes of the mesh axes, by name, in order.
    """
    sums: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    for exchange in exchanges(text, mesh):
        axes = _axes(exchange.group, mesh) if exchange.group else SLICES
        total = sums[exchange.kind, axes]
        total[0] += exchange.times
        total[1] += exchange.times * exchange.bytes
    made = [Collective(kind, axes, number, size) for (kind, axes), (number, size) in sums.items()]
    return sorted(made, key=lambda c: -c.bytes)


def exchanges(text: str, mesh: dict[str, int]) -> list[Exchange]:
    """The collectives of a compiled module, each once; arguments as those of `collectives`."""
    # A collective that overlaps with others stands in several computations, under one channel. All
    # those written with shard_map share a channel too: what they are of tells them apart.
    found: dict[tuple[str, int], Exchange] = {}
    for name, lines, times in computations(text):
        alike: collections.Counter[str] = collections.Counter()
        for number, line in enumerate(lines):
            if match := _COLLECTIVE.search(line):
                channel = re.search(r"channel_id=(\d+)", line)
                source = re.search(r'op_name="[^"]*"', line)
                of = f"{match['kind']} {match['shape']} {source and source[0]}"
                what = f"{channel[1]} {of}" if channel else f"{name} {number}"
                key = what, alike[what]
                alike[what] += 1
                exchange = _exchange(match, line, name, times, mesh)
                if key not in found or exchange.times > found[key].times:
                    found[key] = exchange
            elif match := _BETWEEN_SLICES.search(line):
                found[f"{name} {number}", 0] = _between_slices(match, times)
    return list(found.values())


def _exchange(
    match: re.Match[str], line: str, computation: str, times: int, mesh: dict[str, int]
) -> Exchange:
    kind, group = match["kind"], _first_group(line, math.prod(mesh.values()))
    made = arrays(match["shape"])
    if match["start"] and match["shape"].startswith("("):
        # Its shape holds arguments and results (all-reduce: results alone; a permute, on a TPU: two
        # more numbers).
        if kind == "collective-permute":
            made = [array for array in made if array.sizes]
        if kind != "all-reduce":
            made = made[len(made) // 2 :]
    size, count = sum(array.bytes for array in made), len(group)
    share = (count - 1) / max(count, 1)
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"  # TPU: the scatter follows within the fusion.
    elif kind == "reduce-scatter":
        size *= count
    sent = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}
    shapes = tuple(array.sizes for array in made)
    return Exchange(kind, round(size * sent.get(kind, share)), group, times, shapes)


def _between_slices(match: re.Match[str], times: int) -> Exchange:
    (array,) = arrays(match["shape"])
    spans = [span.split(":") for span in match["slices"].split(",")]
    slices = sum(int(span[-1]) - int(span[0]) + 1 for span in spans)
    kind = match["kind"].lower().replace("_", "-")
    # By the ring, as above; of any other kind a chip sends its part to each of the others.
    size = array.bytes * (slices - 1)
    if kind == "all-reduce":
        size = round(2 * size / slices)
    return Exchange(kind, size, (), times, (array.sizes,))


def _first_group(line: str, devices: int) -> tuple[int, ...]:
    """The devices that the first of them exchanges with, in any of XLA's notations."""
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return int(match[1]), int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return tuple(map(int, match[1].split(",")))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return tuple(_iota(match[2], match[3]).reshape(dimensions(match[1]))[0].tolist())
    if match := _MESH_GROUPS.search(line):
        axes = dict(part.split("=") for part in match[1].split(","))
        ids = np.arange(devices) if match[2] is None else _iota(match[2], match[3])
        ordered = ids.reshape([int(size) for size in axes.values()])
        chosen = match[4].split(",")
        return tuple(
            ordered[tuple(slice(None) if a in chosen else 0 for a in axes)].ravel().tolist()
        )
    return tuple(range(devices))  # No groups, or one that is empty: all of them.


def _iota(sizes: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(dimensions(sizes))).reshape(dimensions(sizes))
    return ids if order is None else ids.transpose(dimensions(order))


def _axes(group: tuple[int, ...], mesh: dict[str, int]) -> str:
    """The mesh axes along which a group's devices differ."""
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    varies = [len(set(row)) > 1 for row in places]
    size = math.prod(n for n, along in zip(mesh.values(), varies, strict=True) if along)
    names = " x ".join(axis for axis, along in zip(mesh, varies, strict=True) if along)
    return names if size == len(group) or len(group) == 2 else f"part of {names}"
