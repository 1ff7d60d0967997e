"""Which mesh, microbatch and remat suit a recipe: an estimate orders them, a compiler judges."""

import dataclasses
import itertools
from typing import NamedTuple

import jax.numpy as jnp

from t5g2.errors import UserError
from t5g2.models.config import ModelConfig
from t5g2.planning.compile import OutOfMemory
from t5g2.planning.flops import Load, head_flops, model_flops
from t5g2.planning.plan import HEADROOM, Plan, parameter_counts
from t5g2.planning.topologies import Chip, Topology
from t5g2.settings import Settings

_REMAT = ("none", "dots", "full")
# Parameters, gradients and the two moments of AdamW, in float32; what does not train has the first.
_TRAINED_BYTES, _FROZEN_BYTES = 16, 4
# Rows of logits that the loss makes at a time, and again in the backward pass.
_TILE = 512


class Candidate(NamedTuple):
    """A way to run a recipe, and what it is worth before anything is compiled.

    Attributes:
        settings: the recipe, run this way.
        bytes: of memory on each device, by the estimate.
        seconds: of a step, by the estimate; the network in turn with the rest.
    """

    settings: Settings
    bytes: int
    seconds: float

    @property
    def bindings(self) -> str:
        """What makes it of the recipe, as gin bindings."""
        mesh = self.settings.mesh
        values = {f"mesh.{axis}": getattr(mesh, axis) for axis in ("data", "fsdp", "tensor")}
        values["train.rows_per_device"] = self.settings.train.rows_per_device
        values["model.remat"] = f"'{self.settings.model.remat}'"
        return " ".join(f"{name}={value}" for name, value in values.items())


def candidates(settings: Settings, topology: Topology) -> list[Candidate]:
    """All ways that seem to fit, those with the shortest estimated step first.

    Tried are sizes of the mesh axes data, fsdp and tensor, rows of a microbatch on each device
    (powers of two) and remat policies; the rest is the recipe's. Of equal ones, as far as the
    estimate can tell, the one with the least memory comes first.

    Args:
        settings: the recipe.
        topology: the machine.

    Raises:
        UserError: nothing is known of the machine, or none fits, with how near the nearest comes.
    """
    chip = topology.chip
    if chip is None:
        raise UserError(f"--search: nothing is known of the time on {topology.name}")
    found = [
        _estimated(made, chip, topology.count) for made in _variants(settings, topology.count)
    ]
    if not found:
        raise UserError(
            f"--search: no mesh of {topology.count} devices shares {settings.rows} rows evenly: "
            "change train.rows"
        )
    room = (1 - HEADROOM) * chip.hbm_bytes
    fitting = [candidate for candidate in found if candidate.bytes <= room]
    if not fitting:
        least = min(found, key=lambda candidate: candidate.bytes)
        raise UserError(
            f"--search: nothing fits: {least.bytes / 2**30:.1f} GiB on each device of "
            f"{chip.hbm_bytes / 2**30:.1f} GiB at the least, by an estimate ({least.bindings}): "
            "take a larger slice"
        )
    return sorted(fitting, key=lambda candidate: (candidate.seconds, candidate.bytes))


def ranked(plans: list[tuple[Candidate, Plan]]) -> list[tuple[Candidate, Plan]]:
    """Plans with the best first: those that fit with room to spare, by the time of a step."""

    def key(pair: tuple[Candidate, Plan]) -> tuple[int, float]:
        _, plan = pair
        if plan.roofline is None or plan.fits is False:
            return 2, plan.result.needed if isinstance(plan.result, OutOfMemory) else 0.0
        tight = plan.headroom is not None and plan.headroom < HEADROOM
        return int(tight), plan.roofline.in_turn

    return sorted(plans, key=key)


def _variants(settings: Settings, devices: int) -> list[Settings]:
    model, context = settings.model, settings.mesh.context
    made = []
    for fsdp, tensor in itertools.product(_powers(devices), _powers(model.num_kv_heads)):
        splits = fsdp * tensor * context
        if devices % splits or model.num_kv_heads % tensor or model.hidden_size % fsdp:
            continue
        data = devices // splits
        rows, rest = divmod(settings.rows, data * fsdp)
        if rest:
            continue
        mesh = dataclasses.replace(settings.mesh, data=data, fsdp=fsdp, tensor=tensor)
        for count, remat in itertools.product(_powers(rows), _REMAT):
            if rows % count:
                continue
            made.append(
                dataclasses.replace(
                    settings,
                    mesh=mesh,
                    train=dataclasses.replace(
                        settings.train, accumulation=1, rows_per_device=count
                    ),
                    model=dataclasses.replace(model, remat=remat),
                )
            )
    return made


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(most.bit_length())]


def _estimated(settings: Settings, chip: Chip, devices: int) -> Candidate:
    model, mesh, data = settings.model, settings.mesh, settings.data
    count = settings.train.rows_per_device
    assert count is not None
    turns = settings.rows // (mesh.data * mesh.fsdp * count)
    everything, trained = parameter_counts(model)
    tokens = count * max(data.inputs_length, data.targets_length) // mesh.context
    both = count * (data.inputs_length + data.targets_length) // mesh.context
    width = jnp.dtype(model.dtype).itemsize
    kept, working = _elements(model, mesh.tensor)
    splits = mesh.fsdp * mesh.tensor * mesh.context
    state = _TRAINED_BYTES * trained + _FROZEN_BYTES * (everything - trained)
    # The table of the vocabulary, gathered, with its gradient, and a tile of logits, twice.
    head = (width + 4) * model.hidden_size + 2 * 4 * _TILE
    size = (
        state // splits
        + width * (model.num_layers * both * kept + 2 * tokens * working)
        + model.vocab_size // mesh.tensor * head
    )

    load = Load(rows=settings.rows, inputs=data.inputs_length, targets=data.targets_length)
    flops = model_flops(model, load)
    again = {
        part: amount
        for part, amount in flops.trained.items()
        if model.remat == "full" or (model.remat == "dots" and "attention" in part)
    }
    again.pop("vocabulary head", None)
    if model.remat == "none":
        again = {}
    logits = load.rows * load.targets * head_flops(model)
    compute = (flops.total + sum(again.values()) + logits) / (devices * chip.flops)
    passes = 3 if model.remat == "full" else 2
    weights = width * trained / mesh.tensor
    memory = turns * passes * weights / chip.hbm_bandwidth
    # Rings: weights are gathered in each pass and their gradients scattered; sums of copies go
    # around twice, as do the sums of a layer's two blocks in each pass.
    shared = mesh.fsdp * mesh.context
    sent = turns * (passes + 1) * weights * (shared - 1) / shared
    sent += turns * 2 * 4 * trained / splits * (mesh.data - 1) / mesh.data
    blocks = 2 * passes * model.num_layers * both * model.hidden_size * width
    sent += turns * 2 * blocks * (mesh.tensor - 1) / mesh.tensor
    return Candidate(settings, int(size), max(compute, memory) + sent / chip.link_bandwidth)


def _elements(model: ModelConfig, tensor: int) -> tuple[int, int]:
    """Elements that a layer keeps of a token for the backward pass, and that it makes in all."""
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    products = (heads + 2 * model.mlp_dim) // tensor + 2 * model.hidden_size
    # Beside products: norms, rotated queries and keys, the activated gate.
    everything = 2 * products
    kept = {"full": 0, "dots": products, "none": everything}[model.remat]
    return model.hidden_size + kept, everything
