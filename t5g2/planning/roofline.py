"""The shortest time that a step can take on a chip, by its published figures.

A bound, not a forecast: each of computing, memory and network is taken to work at its peak.
"""

from collections.abc import Sequence
from typing import NamedTuple

from t5g2.planning.collectives import SLICES, Collective
from t5g2.planning.compile import CompiledStep
from t5g2.planning.executed import Executed
from t5g2.planning.topologies import Chip

# AdamW in float32: reads parameter, gradient and two moments, writes parameter and moments.
_OPTIMIZER_BYTES = 7 * 4
_SECONDS_A_DAY = 86_400


class Roofline(NamedTuple):
    """Seconds that a step takes at least, by what it waits for.

    Attributes:
        compute: products at the chip's peak.
        memory: what goes through HBM. On a GPU all that kernels read and write; on a TPU the
            products' factors and results, the weights and the optimizer.
        network: what a device sends, over all its links, then to other slices.
    """

    compute: float
    memory: float
    network: float

    @property
    def overlapped(self) -> float:
        """If all three go on at the same time."""
        return max(self.compute, self.memory, self.network)

    @property
    def in_turn(self) -> float:
        """If the network is idle while the cores work, and they wait for it."""
        return max(self.compute, self.memory) + self.network


class Budget(NamedTuple):
    """What a run of some tokens takes.

    Attributes:
        steps: number of steps.
        days: of time.
        chip_hours: of all chips together.
    """

    steps: int
    days: float
    chip_hours: float


def roofline(
    chip: Chip,
    devices: int,
    work: Executed,
    *,
    parameters: int,
    weight_bytes: int,
    passes: int,
    splits: int,
    tensor: int,
    compiled: CompiledStep,
) -> Roofline:
    """The bound of a step.

    Args:
        chip: what each device is.
        devices: number of them.
        work: products of the step on all devices.
        parameters: number of those that train.
        weight_bytes: of one parameter as it is multiplied.
        passes: how often all weights are read in a step: forward, backward and in recomputation,
            in every microbatch.
        splits: devices that share the parameters.
        tensor: devices that share each layer's products; the others hold its weights whole.
        compiled: what the compiler made of the step.
    """
    moved: float
    if compiled.traffic is not None:
        moved = compiled.traffic
    else:
        weights = passes * parameters * weight_bytes / tensor
        moved = work.bytes / devices + weights + _OPTIMIZER_BYTES * parameters / splits
    # XLA does not see into kernels, whose work is shared evenly.
    flops = compiled.products.flops + work.in_kernels / devices
    return Roofline(
        compute=flops / chip.flops,
        memory=moved / chip.hbm_bandwidth,
        network=_network(chip, compiled.collectives),
    )


def _network(chip: Chip, exchanges: Sequence[Collective]) -> float:
    """Seconds of a device's sending: within its slice, then to the others."""
    between = sum(exchange.bytes for exchange in exchanges if exchange.axes == SLICES)
    time = (sum(exchange.bytes for exchange in exchanges) - between) / chip.link_bandwidth
    if between:
        assert chip.slice_bandwidth is not None
        time += between / chip.slice_bandwidth
    return time


def utilization(chip: Chip, devices: int, model_flops: int, seconds: float) -> float:
    """MFU: the share of the peak that model FLOPs alone make up (arXiv:2204.02311, appendix B)."""
    return model_flops / (devices * chip.flops * seconds)


def budget(tokens: float, tokens_per_step: int, seconds: float, devices: int) -> Budget:
    """A run of `tokens` real tokens of both sides, in steps of full rows."""
    steps = -(-int(tokens) // tokens_per_step)
    days = steps * seconds / _SECONDS_A_DAY
    return Budget(steps, days, days * 24 * devices)
