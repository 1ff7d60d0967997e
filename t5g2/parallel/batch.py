"""How a global batch is made out: its rows from a number of tokens, its parts from the mesh."""

import math
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from t5g2.parallel.mesh import check_rows, row_parts

# How far a batch may be from `train.tokens_per_batch` to have rows that more meshes can share.
_TOLERANCE = 0.02


def rows_for(tokens_per_batch: int, tokens_per_row: int) -> int:
    """Rows of about so many tokens: the same on every mesh, so that a run can move.

    Of the numbers within 2% it is the one that two divides most often (the nearest of several),
    as most meshes are powers of two: 4.2M tokens are 4096 rows of 512 + 512. Without a whole
    number of rows that near, it is the nearest.

    Args:
        tokens_per_batch: inputs and targets of a global batch, padding included.
        tokens_per_row: inputs and targets of a row.

    Raises:
        ValueError: not even one row.
    """
    if tokens_per_batch < tokens_per_row:
        raise ValueError(
            f"tokens_per_batch = {tokens_per_batch:,} is less than a row of {tokens_per_row:,} "
            "tokens: raise it, or lower data.inputs_length and data.targets_length"
        )
    exact = tokens_per_batch / tokens_per_row
    low, high = math.ceil(exact * (1 - _TOLERANCE)), math.floor(exact * (1 + _TOLERANCE))
    if low > high:
        return round(exact)
    step = 1
    while (low + 2 * step - 1) // (2 * step) * 2 * step <= high:
        step *= 2
    return min(range(-(-low // step) * step, high + 1, step), key=lambda rows: abs(rows - exact))


class BatchParts(NamedTuple):
    """A global batch on a mesh.

    Attributes:
        rows: of the global batch.
        room: encoder and decoder tokens of a row (S, T).
        accumulation: microbatches.
        rows_per_device: of a microbatch, on each device.
        devices: all of the mesh.
        processes: that feed it.
    """

    rows: int
    room: tuple[int, int]
    accumulation: int
    rows_per_device: int
    devices: int
    processes: int

    @property
    def tokens(self) -> int:
        """Tokens that the batch has room for, both sides together."""
        return self.rows * sum(self.room)

    def __str__(self) -> str:
        per_device = _some(self.rows_per_device, "row")
        parts = [
            f"{_some(self.rows, 'row')} of {self.room[0]:,} + {self.room[1]:,} tokens, "
            f"{self.tokens:,} in all",
            f"{_some(self.accumulation, 'microbatch')} of {per_device} on each of "
            f"{_some(self.devices, 'device')}",
        ]
        if self.processes > 1:
            parts.append(f"{_some(self.processes, 'process')}")
        return "; ".join(parts)

    def to_json(self) -> dict[str, int]:
        """For the metrics log."""
        inputs, targets = self.room
        counts = {**self._asdict(), "tokens": self.tokens, "inputs": inputs, "targets": targets}
        return {name: count for name, count in counts.items() if name != "room"}


def split_batch(
    mesh: Mesh | AbstractMesh,
    rows: int,
    room: tuple[int, int],
    *,
    accumulation: int = 1,
    rows_per_device: int | None = None,
) -> BatchParts:
    """Deals a global batch out to the devices of a mesh.

    Args:
        mesh: the devices.
        rows: of the global batch.
        room: encoder and decoder tokens of a row (S, T).
        accumulation: the fewest microbatches.
        rows_per_device: the most rows of a microbatch that a device takes; None: any number.

    Returns:
        The batch in the fewest microbatches that are equally large and small enough.

    Raises:
        UserError: the rows cannot be dealt out evenly; with numbers of rows that can.
    """
    check_rows(mesh, rows, accumulation)
    here = rows // row_parts(mesh)
    if rows_per_device is not None:
        enough = (n for n in range(accumulation, here + 1) if here % n == 0)
        accumulation = next(n for n in enough if here // n <= rows_per_device)
    # A mesh without devices does not tell who has them.
    devices = () if isinstance(mesh, AbstractMesh) else mesh.devices.flat
    processes = {device.process_index for device in devices}
    return BatchParts(
        rows, room, accumulation, here // accumulation, mesh.size, max(len(processes), 1)
    )


def _some(count: int, noun: str) -> str:
    plural = "" if count == 1 else "es" if noun.endswith(("s", "h")) else "s"
    return f"{count:,} {noun}{plural}"
