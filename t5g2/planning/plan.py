"""A plan: all that is known of a recipe's step on a topology before it runs."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp

from t5g2.kernels.attention import Backend, choose_backend
from t5g2.models.config import ModelConfig, RematPolicy
from t5g2.models.t5gemma2 import abstract_model, parameter_tree, split_frozen
from t5g2.parallel.batch import BatchParts
from t5g2.planning.compile import (
    CompiledStep,
    OutOfMemory,
    StateBytes,
    compile_step,
    trace_step,
)
from t5g2.planning.devices import planning_devices
from t5g2.planning.executed import Executed, executed
from t5g2.planning.flops import Load, ModelFlops, model_flops
from t5g2.planning.roofline import Budget, Roofline, budget, roofline, utilization
from t5g2.planning.topologies import Topology
from t5g2.settings import Settings

# The tokens of the released models' pretraining (arXiv:2512.14856).
RUN_TOKENS = 2e12
# A plan with less room than this share of the memory is none to rely on.
HEADROOM = 0.05

Stage = Callable[[str], AbstractContextManager[None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step needs and how fast it can be.

    Attributes:
        topology: the machine.
        settings: the recipe.
        mesh: sizes of the mesh axes.
        load: what a step works on.
        parts: how the devices share it.
        parameters: number of all parameters, and of those that train.
        flops: that the model needs.
        teacher_flops: that the teacher's forward pass needs.
        executed: what the step multiplies.
        recomputed: FLOPs of it that `model.remat` adds.
        attention: what it attends with.
        state: bytes that the step is given, on each device.
        result: what the compiler says.
        roofline: the shortest time of a step; None: of a CPU, or a step that does not fit.
    """

    topology: Topology
    settings: Settings
    mesh: dict[str, int]
    load: Load
    parts: BatchParts
    parameters: tuple[int, int]
    flops: ModelFlops
    teacher_flops: int
    executed: Executed
    recomputed: int
    attention: Backend
    state: StateBytes
    result: CompiledStep | OutOfMemory
    roofline: Roofline | None

    @property
    def masked(self) -> int:
        """FLOPs of attention to keys that a mask hides, of its recomputed blocks, of padding."""
        return self.executed.flops - (self.flops.total + self.teacher_flops + self.recomputed)

    @property
    def made_again(self) -> int:
        """FLOPs of products that XLA itself makes again to spare memory; 0 if that is not known."""
        if not isinstance(self.result, CompiledStep):
            return 0
        return self.topology.count * self.result.products.again

    @property
    def repeated(self) -> int:
        """FLOPs that more than one device spends on the same products; 0 if that is not known.

        Less than nothing where XLA spares products that the traced step has.
        """
        if not isinstance(self.result, CompiledStep):
            return 0
        by_xla = self.executed.flops - self.executed.in_kernels
        return self.topology.count * self.result.products.flops - self.made_again - by_xla

    @property
    def fits(self) -> bool | None:
        """Whether the step fits into the devices' memory; None: of a CPU, it is not known."""
        if isinstance(self.result, OutOfMemory):
            return False
        return None if self.topology.chip is None else True

    @property
    def headroom(self) -> float | None:
        """Share of a device's memory that is left; None: not known."""
        if self.topology.chip is None or not isinstance(self.result, CompiledStep):
            return None
        return 1 - self.result.memory.total / self.topology.chip.hbm_bytes

    def utilization(self, seconds: float) -> float:
        """MFU of a step of so many seconds."""
        assert self.topology.chip is not None
        count = self.topology.count
        return utilization(self.topology.chip, count, self.flops.total, seconds)

    def budget(self, seconds: float) -> Budget:
        """What `RUN_TOKENS` take in steps of so many seconds."""
        return budget(RUN_TOKENS, self.load.tokens, seconds, self.topology.count)

    def advice(self) -> str | None:
        """What to change so that the step fits; None: it does, or nobody knows."""
        chip = self.topology.chip
        if chip is None or self.fits is not False:
            return None
        state, fsdp = sum(self.state), self.mesh["fsdp"]
        if state > (1 - HEADROOM) * chip.hbm_bytes:
            more = fsdp < self.topology.count // self.mesh["tensor"]
            what = "raise mesh.fsdp" if more else "take a larger slice"
            return f"parameters, optimizer and batch alone fill a device: {what}"
        remat = self.settings.model.remat
        if remat != "full":
            less = "full" if remat == "attention" else "attention"
            return f"set model.remat = '{less}' (now '{remat}')"
        if self.parts.rows_per_device > 1:
            return f"set train.rows_per_device = {self.parts.rows_per_device // 2}"
        if self.mesh["data"] > 1:
            return f"raise mesh.fsdp (now {fsdp})"
        return "shorten data.inputs_length and data.targets_length, or take a larger slice"

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; bytes are those of each device, FLOPs those of all."""
        return {
            "topology": dataclasses.asdict(self.topology),
            "mesh": self.mesh,
            "batch": dataclasses.asdict(self.load) | {"tokens": self.load.tokens},
            "accumulation": self.parts.accumulation,
            "rows_per_device": self.parts.rows_per_device,
            "remat": self.settings.model.remat,
            "attention": self.attention,
            "config_hash": self.settings.hash(),
            "parameters": {"all": self.parameters[0], "trained": self.parameters[1]},
            "flops": {
                "forward": self.flops.trained,
                "forward_frozen": self.flops.frozen,
                "model": self.flops.total,
                "teacher": self.teacher_flops,
                "recomputed_by_remat": self.recomputed,
                "masked_attention_and_padding": self.masked,
                "executed": self.executed.flops,
                "recomputed_by_xla": self.made_again,
                "repeated_by_devices": self.repeated,
            },
            "given_bytes": self.state._asdict(),
            "fits": self.fits,
            "advice": self.advice(),
            **self._compiled_json(),
            **self._time_json(),
        }

    def _compiled_json(self) -> dict[str, Any]:
        if isinstance(self.result, OutOfMemory):
            return {"out_of_memory": self.result._asdict()}
        memory = self.result.memory
        return {
            "memory_bytes": memory._asdict() | {"total": memory.total},
            "headroom": self.headroom,
            "collectives": [exchange._asdict() for exchange in self.result.collectives],
        }

    def _time_json(self) -> dict[str, Any]:
        if self.roofline is None:
            return {}
        bounds = {"overlapped": self.roofline.overlapped, "in_turn": self.roofline.in_turn}
        return {
            "roofline_seconds": self.roofline._asdict(),
            "step": {
                name: {
                    "seconds": seconds,
                    "mfu": self.utilization(seconds),
                    **self.budget(seconds)._asdict(),
                }
                for name, seconds in bounds.items()
            },
        }


def make_plan(settings: Settings, topology: Topology, stage: Stage) -> Plan:
    """Traces and compiles a recipe's step for a topology and works out what follows.

    Args:
        settings: the recipe.
        topology: the machine.
        stage: shows what is being done, while it is.

    Raises:
        UserError: the recipe does not suit the topology, or a compiler is missing.
    """
    devices = planning_devices(topology, settings)
    with stage("tracing"):
        step = trace_step(settings, devices)
        work = executed(step.traced.jaxpr)
        recomputed = 0
        if settings.model.remat != "none":
            model = dataclasses.replace(settings.model, remat="none")
            kept = trace_step(dataclasses.replace(settings, model=model), devices)
            recomputed = work.flops - executed(kept.traced.jaxpr).flops
    with stage(f"compiling for {topology.name}"):
        result = compile_step(step, topology)
    mesh = dict(step.mesh.shape)
    counts = parameter_counts(settings.model)
    bound = None
    if topology.chip is not None and isinstance(result, CompiledStep):
        passes = weight_passes(settings.model.remat) * step.parts.accumulation
        bound = roofline(
            topology.chip,
            topology.count,
            work,
            parameters=counts[1],
            weight_bytes=jnp.dtype(settings.model.dtype).itemsize,
            passes=passes,
            splits=mesh["fsdp"] * mesh["tensor"],
            tensor=mesh["tensor"],
            compiled=result,
        )
    taught = 0 if step.teacher is None else model_flops(step.teacher.config, step.load).forward
    return Plan(
        topology=topology,
        settings=settings,
        mesh=mesh,
        load=step.load,
        parts=step.parts,
        parameters=counts,
        flops=model_flops(settings.model, step.load),
        teacher_flops=taught,
        executed=work,
        recomputed=recomputed,
        attention=choose_backend(settings.model.attention, step.mesh.abstract_mesh),
        state=step.state,
        result=result,
        roofline=bound,
    )


def weight_passes(remat: RematPolicy) -> int:
    """How often a microbatch multiplies with the weights: forward, backward, to recompute."""
    return 3 if remat in ("attention", "full") else 2


def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """Number of all parameters of a model, and of those that pretraining changes."""
    params = parameter_tree(abstract_model(config))
    trained, _ = split_frozen(params)
    everything, changed = (
        sum(array.size for array in jax.tree.leaves(tree)) for tree in (params, trained)
    )
    return everything, changed
