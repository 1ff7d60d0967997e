"""The kernel for GPU, compiled by XLA and Triton for GPUs that are not there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5g2.kernels.attention import KeyValues, Window, attention
from t5g2.planning.buffers import attention_kernels

pytestmark = pytest.mark.slow

# What XLA has to know of a device (its gpu_device_info), by data sheets and by the tables of
# compute capabilities in the CUDA C++ Programming Guide.
GPU = """
platform_name: "CUDA"
device_description_str: "{name}"
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: 0 feature_extension: {features} }}
  core_count: {cores}
  fpus_per_core: {units}
  clock_rate_ghz: 1.5
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {shared_core}
  l2_cache_size: 41943040
  memory_bandwidth: 2000000000000
  device_memory_size: 85000000000
}}
"""
TARGETS = {
    "NVIDIA H100 80GB HBM3": {
        "major": 9,
        "features": "ACCELERATED_FEATURES",
        "cores": 132,
        "units": 128,
        "shared": 232448,
        "shared_core": 233472,
    },
    "NVIDIA A100-SXM4-80GB": {
        "major": 8,
        "features": "NONE",
        "cores": 108,
        "units": 64,
        "shared": 166912,
        "shared_core": 167936,
    },
}
# Length, heads, key and value heads, window.
CASES = {
    "270M, local": (2048, (4, 1), Window(511, 0)),
    "4B, global": (8192, (8, 4), Window(None, 0)),
}


def mesh_of(name):
    """Two devices of a kind."""
    if not any(map(pytest.importorskip("importlib.util").find_spec, PLUGINS)):
        pytest.skip("needs jax's CUDA plugin: pip install 'jax[cuda13]'")
    target = GPU.format(name=name, **TARGETS[name])
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x2", target_config=target)
    return Mesh(np.array(topology.devices).reshape(2, 1, 1), ("data", "fsdp", "tensor"))


PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TARGETS)
def test_the_kernels_compile_forward_and_backward(name, case, dtype):
    length, (heads, kv_heads), window = CASES[case]
    mesh = mesh_of(name)
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def states(heads):
        return jax.ShapeDtypeStruct((2, length, heads, 256), dtype, sharding=rows)

    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32, sharding=rows)
    keys = KeyValues(states(kv_heads), states(kv_heads), tokens, tokens)

    def total(query, near, far, own, other):
        keys, memory = KeyValues(*near, *own), KeyValues(*far, *other)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out = attention(query, *own, keys, memory, window=window, scale=1 / 16)
        return out.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    ids = (tokens, tokens)
    compiled = gradient.lower(states(heads), keys[:2], keys[:2], ids, ids).compile()
    text = compiled.as_text()
    assert attention_kernels(text) == {"fwd": 1, "dq": 1, "dkv": 2}
    assert not re.search("all-(gather|reduce|to-all)", text)
