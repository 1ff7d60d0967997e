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
from t5g2.planning.devices import target_config
from t5g2.planning.topologies import find_topology

pytestmark = pytest.mark.slow

# Length, heads, key and value heads, window.
CASES = {
    "270M, local": (2048, (4, 1), Window(511, 0)),
    "4B, global": (8192, (8, 4), Window(None, 0)),
}


def mesh_of(name):
    """Two devices of a machine."""
    pytest.importorskip("jax_cuda13_plugin", reason="needs CUDA's compiler: 't5g2[cuda]'")
    target = target_config(find_topology(f"{name}:2").chip)
    topology = topologies.get_topology_desc(platform="cuda", topology="1x1x2", target_config=target)
    return Mesh(np.array(topology.devices).reshape(2, 1, 1), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["h100", "a100"])
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
