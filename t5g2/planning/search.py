"""Which mesh, microbatch and remat suit a recipe: an estimate orders them, a compiler judges."""

import dataclasses
import itertools
from typing import NamedTuple

import jax.numpy as jnp

from t5g2.errors import UserError
from t5g2.models.config import ModelConfig, RematPolicy
from t5g2.planning.compile import OutOfMemory
from t5g2.planning.flops import Load, head_flops, model_flops
from t5g2.planning.plan import HEADROOM, Plan, Stage, make_plan, parameter_counts, weight_passes
from t5g2.planning.topologies import Chip, Topology
from t5g2.settings import Settings

_REMAT: tuple[RematPolicy, ...] = ("none", "dots", "attention", "full")
# Parameters, gradients and the two moments of AdamW, in float32; what does not train has the first.
_TRAINED_BYTES, _FROZEN_BYTES = 16, 4
# Of attention's forward pass, what its backward kernels make again: each of the two the scores, and
# one of them the product with the values.
_ATTENTION_AGAIN = 1.5
# Rows of logits that the loss makes at a time.
_TILE = 512


class Candidate(NamedTuple):
    """A way to run a recipe, and what it is worth before anything is compiled.

    Attributes:
        settings: the recipe, run this way.
        bytes: of memory on each device, by the estimate.
        seconds: of a step, by the estimate; the network in turn with the rest.
        flops: that the model needs.
    """

    settings: Settings
    bytes: int
    seconds: float
    flops: int

    @property
    def bindings(self) -> list[str]:
        """What makes it of the recipe, as gin bindings."""
        mesh, train = self.settings.mesh, self.settings.train
        values = {f"mesh.{axis}": getattr(mesh, axis) for axis in ("data", "fsdp", "tensor")}
        values["train.accumulation"] = train.accumulation
        values["train.rows_per_device"] = train.rows_per_device
        values["model.remat"] = self.settings.model.remat
        return [f"{name}={value}" for name, value in values.items()]


class Found(NamedTuple):
    """A candidate and its plan."""

    candidate: Candidate
    plan: Plan


def candidates(settings: Settings, topology: Topology) -> list[Candidate]:
    """All ways to run a recipe: those that seem to fit, shortest step first; then the others.

    Tried are sizes of the mesh axes data, fsdp and tensor, rows of a microbatch on each device
    (powers of two) and remat policies; the rest is the recipe's. Of equal ones, as far as the
    estimate can tell, the one with the least memory comes first; so it does of those that do not
    seem to fit.

    Args:
        settings: the recipe.
        topology: the machine.

    Raises:
        UserError: nothing is known of the machine, or no mesh shares the batch's rows.
    """
    chip = topology.chip
    if chip is None:
        raise UserError(
            f"--search: nothing is known of the speed of {topology.name}: name a TPU or a GPU"
        )
    counts = parameter_counts(settings.model)
    found = [
        _estimated(made, chip, topology.count, counts)
        for made in _variants(settings, topology.count)
        if made.mesh.data % topology.slices == 0
    ]
    if not found:
        raise UserError(
            f"--search: no mesh of {topology.count} devices shares {settings.rows} rows evenly: "
            "change train.rows, or set mesh.context"
        )

    def key(candidate: Candidate) -> tuple[bool, float, float]:
        room, size = (1 - HEADROOM) * chip.hbm_bytes, candidate.bytes
        return (True, size, 0) if size > room else (False, candidate.seconds, size)

    return sorted(found, key=key)


def search(settings: Settings, topology: Topology, count: int, stage: Stage) -> list[Found]:
    """Plans of the candidates that the estimate puts first, the best plan first.

    Plans that fit with room to spare come before those that fit, and those before the others; among
    themselves by the time of a step, or by how much memory is missing.

    Args:
        settings: the recipe.
        topology: the machine.
        count: how many to plan.
        stage: shows what is being done, while it is.

    Raises:
        UserError: as `candidates` and `make_plan` do.
    """
    chosen = candidates(settings, topology)[:count]
    found = [Found(c, make_plan(c.settings, topology, stage)) for c in chosen]
    return sorted(found, key=_rank)


def estimate(settings: Settings, topology: Topology) -> Candidate:
    """What a recipe as it stands is worth; it names its mesh and its rows of a microbatch."""
    assert topology.chip is not None
    counts = parameter_counts(settings.model)
    return _estimated(settings, topology.chip, topology.count, counts)


def _rank(found: Found) -> tuple[int, float]:
    plan = found.plan
    if isinstance(plan.result, OutOfMemory):
        return 2, plan.result.needed
    assert plan.roofline is not None
    tight = plan.headroom is not None and plan.headroom < HEADROOM
    return int(tight), plan.roofline.in_turn


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


def _estimated(settings: Settings, chip: Chip, devices: int, counts: tuple[int, int]) -> Candidate:
    model, mesh, data = settings.model, settings.mesh, settings.data
    count = settings.train.rows_per_device
    assert count is not None
    turns = settings.rows // (mesh.data * mesh.fsdp * count)
    everything, trained = counts
    tokens = count * max(data.inputs_length, data.targets_length) // mesh.context
    both = count * (data.inputs_length + data.targets_length) // mesh.context
    width = jnp.dtype(model.dtype).itemsize
    kept, working = _elements(model, mesh.tensor)
    splits = mesh.fsdp * mesh.tensor * mesh.context
    state = _TRAINED_BYTES * trained + _FROZEN_BYTES * (everything - trained)
    # The table of the vocabulary, gathered, its float32 gradient, and a tile of logits, twice.
    head = (width + 4) * model.hidden_size + 2 * 4 * _TILE
    size = (
        state // splits
        + width * (model.num_layers * both * kept + 2 * tokens * working)
        + model.vocab_size // mesh.tensor * head
    )

    load = Load(rows=settings.rows, inputs=data.inputs_length, targets=data.targets_length)
    flops = model_flops(model, load)
    logits = load.rows * load.targets * head_flops(model)
    layers = sum(flops.trained.values()) - logits
    attended = sum(amount for part, amount in flops.trained.items() if "attention" in part)
    again = {"none": 0, "dots": 0, "attention": layers - attended, "full": layers}[model.remat]
    more = again + _ATTENTION_AGAIN * attended
    compute = (flops.total + more) / (devices * chip.flops)
    passes = weight_passes(model.remat)
    weights = width * trained / mesh.tensor
    memory = turns * passes * weights / chip.hbm_bandwidth
    # Rings: weights are gathered in each pass and their gradients scattered; sums of copies go
    # around twice, as do the sums of a layer's two blocks in each pass.
    shared = mesh.fsdp * mesh.context
    sent = turns * (passes + 1) * weights * (shared - 1) / shared
    sent += turns * 2 * 4 * trained / splits * (mesh.data - 1) / mesh.data
    blocks = 2 * passes * model.num_layers * both * model.hidden_size * width
    sent += turns * 2 * blocks * (mesh.tensor - 1) / mesh.tensor
    time = max(compute, memory) + sent / chip.link_bandwidth
    return Candidate(settings, int(size), time, flops.total)


def _elements(model: ModelConfig, tensor: int) -> tuple[int, int]:
    """Elements that a layer keeps of a token for the backward pass, and that it makes in all."""
    attended = model.num_heads * model.head_dim // tensor
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    products = (heads + 2 * model.mlp_dim) // tensor + attended + 2 * model.hidden_size
    # Beside products: norms, rotated queries and keys, the activated gate.
    everything = 2 * products
    kept = {"full": 0, "attention": attended, "dots": products, "none": everything}
    return model.hidden_size + kept[model.remat], everything
