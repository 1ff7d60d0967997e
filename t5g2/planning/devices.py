"""Devices that are not there, to compile for: TPUs and GPUs as their compilers know them."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from t5g2.errors import UserError
from t5g2.parallel.mesh import configure_devices
from t5g2.planning.topologies import Chip, Topology
from t5g2.settings import Settings

# libtpu asks the network and the environment what machine it is on. It is on none, and takes any
# answer.
_LIBTPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
# "CUDA C++ Programming Guide", technical specifications per compute capability: of all GPUs here.
_LIMITS: dict[str, Any] = {
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "registers_per_core_limit": 2**16,
    "registers_per_block_limit": 2**16,
    "shared_memory_per_block": 48 * 2**10,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Gpu:
    """What a GPU's compiler wants to know of it, beside what `Chip` says.

    Attributes:
        kind: what jax calls it.
        capability: compute capability.
        accelerated: whether products take instructions that other capabilities lack (sm_90a).
        cores: streaming multiprocessors.
        lanes: of a core, for float32.
        clock: GHz, at most.
        shared: KiB of memory that a core's threads share. A block of them has one less.
        cache: MiB of L2.
    """

    kind: str
    capability: tuple[int, int]
    accelerated: bool
    cores: int
    lanes: int
    clock: float
    shared: int
    cache: int


# NVIDIA's white papers "A100 Tensor Core GPU Architecture" and "H100 Tensor Core GPU Architecture",
# and the programming guide.
_GPUS = {
    "NVIDIA A100 80GB": _Gpu(
        kind="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        accelerated=False,
        cores=108,
        lanes=64,
        clock=1.41,
        shared=164,
        cache=40,
    ),
    "NVIDIA H100 SXM": _Gpu(
        kind="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        accelerated=True,
        cores=132,
        lanes=128,
        clock=1.98,
        shared=228,
        cache=50,
    ),
}
_GPUS["NVIDIA H200 SXM"] = dataclasses.replace(_GPUS["NVIDIA H100 SXM"], kind="NVIDIA H200")


def planning_devices(topology: Topology, settings: Settings) -> Sequence[jax.Device]:
    """Devices of a topology, to compile for and to compute nothing on.

    Raises:
        UserError: the compiler is missing, or the recipe wants CPU devices of its own.
    """
    wanted = settings.mesh.cpu_devices
    if wanted is not None and (topology.platform, topology.count) != ("cpu", wanted):
        raise UserError(
            f"mesh.cpu_devices = {wanted} contradicts --topology {topology.name}: leave it None"
        )
    jax.config.update("jax_platforms", "cpu")
    match topology.platform:
        case "cpu":
            configure_devices(dataclasses.replace(settings.mesh, cpu_devices=topology.count))
            return jax.devices()
        case "tpu":
            for name, value in _LIBTPU.items():
                os.environ.setdefault(name, value)
            # A host has four chips or eight, unless the slice has one.
            host = {"chips_per_host_bounds": (1, 1, 1)} if topology.count == 1 else {}
            return _described(
                topology,
                "tpu",
                topology_name=topology.one_slice,
                num_slices=topology.slices,
                **host,
            )
        case "gpu":
            assert topology.chip is not None
            return _described(
                topology,
                "cuda",
                # Groups behind one switch, hosts of a group, GPUs of a host.
                topology=f"1x1x{topology.count}",
                target_config=target_config(topology.chip),
            )


def _described(machine: Topology, plugin: str, /, **options: Any) -> list[jax.Device]:
    """Devices as one of jax's plug-ins, tpu or cuda, describes them."""
    try:
        return list(topologies.get_topology_desc(platform=plugin, **options).devices)
    except (NotImplementedError, RuntimeError) as error:
        # What jax says where there is no libtpu, or no plug-in for CUDA.
        if not any(words in str(error) for words in ("not installed", "not implemented for")):
            raise
    raise UserError(
        f"--topology {machine.name} needs {plugin.upper()}'s compiler: pip install 't5g2[{plugin}]'"
    )


def target_config(chip: Chip) -> str:
    """A GPU as XLA wants it described: the text of its message `GpuTargetConfigProto`."""
    gpu = _GPUS[chip.name]
    extension = "ACCELERATED_FEATURES" if gpu.accelerated else "NONE"
    major, minor = gpu.capability
    device = _LIMITS | {
        "cuda_compute_capability": {
            "major": major,
            "minor": minor,
            "feature_extension": extension,
        },
        "core_count": gpu.cores,
        "fpus_per_core": gpu.lanes,
        "clock_rate_ghz": gpu.clock,
        "shared_memory_per_core": gpu.shared * 2**10,
        "shared_memory_per_block_optin": (gpu.shared - 1) * 2**10,
        "l2_cache_size": gpu.cache * 2**20,
        "memory_bandwidth": int(chip.hbm_bandwidth),
        "device_memory_size": chip.hbm_bytes,
    }
    return _message(
        {
            "platform_name": '"CUDA"',
            "device_description_str": f'"{gpu.kind}"',
            "gpu_device_info": device,
        }
    )


def _message(fields: Mapping[str, Any]) -> str:
    """A protocol buffer as text."""
    return " ".join(
        f"{name} {{ {_message(value)} }}" if isinstance(value, Mapping) else f"{name}: {value}"
        for name, value in fields.items()
    )
