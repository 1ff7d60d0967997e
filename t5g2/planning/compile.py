"""The very step that training runs, compiled for machines that are not there."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from t5g2.data.batch import empty_batch
from t5g2.data.cached_corpus import open_cache
from t5g2.data.corpus import source_denoisers
from t5g2.data.image_examples import ImageSlot, pixel_slot
from t5g2.data.packing import ImageSlots
from t5g2.data.sources.mixture_file import ONE_TASK, read_mixture
from t5g2.data.tokenizer import load_tokenizer
from t5g2.errors import UserError
from t5g2.files import to_path
from t5g2.kernels.layout import Layout
from t5g2.models.t5gemma2 import abstract_model, logical_axes, parameter_tree
from t5g2.parallel.batch import BatchParts
from t5g2.parallel.mesh import make_mesh
from t5g2.parallel.rules import batch_shardings, check_room, make_layout, parameter_shardings
from t5g2.planning.collectives import Collective, collectives
from t5g2.planning.flops import Load
from t5g2.planning.placement import shard_bytes
from t5g2.planning.products import Products, device_products
from t5g2.planning.topologies import Topology
from t5g2.planning.traffic import hbm_traffic
from t5g2.pretrained import describe
from t5g2.settings import Settings
from t5g2.training.optimizer import make_optimizer
from t5g2.training.schedule import make_schedule
from t5g2.training.state import TrainState, state_shardings
from t5g2.training.step import trace_train_step
from t5g2.training.teacher import Teacher

# XLA counts in binary units.
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"\(?([\d.]+)([KMGT]?)\)?"
_OVER = (
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"total memory required for .*? {_SIZE} exceeds available HBM {_SIZE}",
)


class StateBytes(NamedTuple):
    """Bytes on each device of what a step is given.

    Attributes:
        parameters: float32.
        optimizer: its state.
        batch: a global batch's part.
        teacher: parameters of the teacher, if there is one.
    """

    parameters: int
    optimizer: int
    batch: int
    teacher: int = 0


class Memory(NamedTuple):
    """Bytes on each device, as XLA lays them out.

    Attributes:
        arguments: what the step is given (see `StateBytes`), filled up to whole tiles.
        outputs: results that do not take the place of an argument.
        temporaries: activations, gradients, gathered weights and all else that a step makes.
        code: the program; a GPU's compiler does not tell, 0.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class OutOfMemory(NamedTuple):
    """A step that does not fit.

    Attributes:
        needed: bytes on each device that XLA found no way around.
        available: bytes that a device has.
    """

    needed: int
    available: int


class CompiledStep(NamedTuple):
    """What the compiler makes of a step.

    Attributes:
        memory: bytes on each device.
        collectives: what each device sends.
        products: FLOPs of those that each device computes, kernels aside.
        traffic: bytes that the program's kernels read and write; None: not counted, as on a TPU,
            whose text does not tell what stays on the chip.
        text: the program, as XLA prints it.
    """

    memory: Memory
    collectives: list[Collective]
    products: Products
    traffic: int | None
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A recipe's train step on some devices, traced.

    Attributes:
        mesh: the devices.
        traced: the step.
        state: bytes of what it is given.
        load: what it works on.
        parts: how the devices share it.
        teacher: hyperparameters of the teacher, if there is one.
    """

    mesh: Mesh
    traced: jax.stages.Traced
    state: StateBytes
    load: Load
    parts: BatchParts
    teacher: Teacher | None


def trace_step(settings: Settings, devices: Sequence[jax.Device]) -> Step:
    """A recipe's step as `t5g2 train` would trace it on some devices; no document is read.

    Raises:
        UserError: as `t5g2 train` would, of the mesh, the batch or the mixture file.
    """
    mesh = make_mesh(settings.mesh, devices)
    train, data = settings.train, settings.data
    parts = settings.batch_parts(mesh)
    layout = make_layout(mesh, settings.mesh.rules)
    room = (data.inputs_length, data.targets_length)
    check_room(layout, settings.model, room)
    num_tasks, images = _tasks(settings)
    optimizer = make_optimizer(
        settings.optimizer, make_schedule(settings.schedule, train.total_steps)
    )
    shapes, shardings = state_shardings(settings.model, optimizer, layout)
    teacher = None if train.teacher is None else _teacher(to_path(train.teacher), layout)
    traced = trace_train_step(
        layout,
        shapes,
        shardings,
        rows=parts.rows,
        room=room,
        config=settings.model,
        optimizer=optimizer,
        num_tasks=num_tasks,
        accumulation=parts.accumulation,
        images=images,
        teacher=teacher,
        z_loss=train.z_loss,
    )
    batch = jax.eval_shape(lambda: empty_batch(parts.rows, *room, images))
    return Step(
        mesh=mesh,
        traced=traced,
        state=_state_bytes(shapes, shardings, batch, teacher, layout),
        load=Load(
            rows=parts.rows,
            inputs=data.inputs_length,
            targets=data.targets_length,
            images=0 if images is None else images.per_row,
            image_features=images is not None and images.slot.name == "image_features",
        ),
        parts=parts,
        teacher=teacher,
    )


def compile_step(step: Step, topology: Topology) -> CompiledStep | OutOfMemory:
    """Compiles a step and reads what the compiler says of it.

    TPU's compiler refuses what does not fit. A GPU's does not: what it needs is compared here.
    """
    try:
        compiled = step.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        over = out_of_memory(str(error))
        if over is None:
            raise
        return over
    sizes = compiled.memory_analysis()
    memory = Memory(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
    )
    if topology.chip is not None and memory.total > topology.chip.hbm_bytes:
        return OutOfMemory(memory.total, topology.chip.hbm_bytes)
    text = compiled.as_text()
    return CompiledStep(
        memory=memory,
        collectives=collectives(text, dict(step.mesh.shape)),
        products=device_products(text),
        traffic=hbm_traffic(text) if topology.platform == "gpu" else None,
        text=text,
    )


def out_of_memory(message: str) -> OutOfMemory | None:
    """What XLA's message says of memory; None: it speaks of something else."""
    for pattern in _OVER:
        if match := re.search(pattern, message):
            used, used_unit, limit, limit_unit = match.groups()
            return OutOfMemory(
                round(float(used) * _UNITS[used_unit]), round(float(limit) * _UNITS[limit_unit])
            )
    return None


def _tasks(settings: Settings) -> tuple[int, ImageSlots | None]:
    """How many tasks the recipe's mixture has, and its rows' room for images."""
    corpus, model = settings.corpus, settings.model
    slots: set[ImageSlot] = set()
    if corpus.cache is not None:
        cache = open_cache(corpus, model)
        specs = cache.spec.sources
        documents = {source.name: source.documents["train"] for source in cache.sources}
        slots = {d.slot for d in documents.values() if hasattr(d, "slot")}
        pictured = {name for name, found in documents.items() if hasattr(found, "slot")}
    else:
        specs = read_mixture(corpus).sources
        pictured = {spec.name for spec in specs if spec.format == "image_text"}
        if pictured:
            if model.vision is None:
                raise UserError(
                    f"corpus.mixture: source {min(pictured)} has images but model.vision is None"
                )
            slots = {pixel_slot(model)}
        pictured |= {spec.name for spec in specs if spec.format in ONE_TASK}
    count = sum(
        1 if spec.name in pictured else len(source_denoisers(spec, settings.data)) for spec in specs
    )
    if not slots:
        return count, None
    if settings.data.images_per_row < 1:
        raise UserError(
            "data.images_per_row is 0 but the mixture has images: set it to the number of images "
            "that a row has room for"
        )
    return count, ImageSlots(settings.data.images_per_row, slots.pop())


def _teacher(path: Path, layout: Layout) -> Teacher:
    """A teacher with shapes in place of its parameters."""
    config, tokenizer, _ = describe(path)
    shapes = parameter_tree(abstract_model(config))
    shardings = parameter_shardings(layout, logical_axes(config), shapes)

    def placed(array: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, jnp.dtype(config.dtype), sharding=sharding)

    params = jax.tree.map(placed, shapes, shardings)
    return Teacher(params, config, load_tokenizer(tokenizer).sentinel_ids)


def _state_bytes(
    shapes: TrainState, shardings: TrainState, batch: Any, teacher: Teacher | None, layout: Layout
) -> StateBytes:
    lies = batch_shardings(layout, batch)
    taught = [] if teacher is None else jax.tree.leaves(teacher.params)
    return StateBytes(
        parameters=_bytes(shapes.params, shardings.params),
        optimizer=_bytes(shapes.opt_state, shardings.opt_state),
        batch=sum(shard_bytes(array, lies[name]) for name, array in batch.items()),
        teacher=sum(shard_bytes(array, array.sharding) for array in taught),
    )


def _bytes(shapes: Any, shardings: Any) -> int:
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(shard_bytes(array, sharding) for array, sharding in pairs)
