"""Run by tests with eight CPU devices: `attention` as a step traces it for a mesh.

Argument: a back end, whose kernel is interpreted.
"""

import functools
import sys
from unittest import mock

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from packed_rows import SCALE, long_rows

from t5g2.kernels import attention, on_mesh, splash, triton
from t5g2.parallel.mesh import MeshConfig, make_mesh

backend = sys.argv[1]
module, name = {"splash": (splash, "splash"), "triton": (triton, "triton_attention")}[backend]
interpreted = functools.partial(getattr(module, name), interpret=True)
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
query, own, keys, memory = long_rows(140, 100, heads=(4, 2), rows=4)
window = attention.Window(9, 0)


def sharded(array):
    axes = [("data", "fsdp"), None, *["tensor"][: max(array.ndim - 2, 0)]]
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))


def attend(query, segments, positions, keys, memory):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return attention.attention(
            query, segments, positions, keys, memory, window=window, scale=SCALE
        )


arguments = (query, *own, keys, memory)
with (
    mock.patch.object(attention, "target_platform", return_value=attention.FUSED[backend]),
    mock.patch.object(module, name, interpreted),
):
    compiled = jax.jit(attend).lower(*jax.tree.map(sharded, arguments)).compile()
out = compiled(*jax.tree.map(sharded, arguments))
expected = attention.reference_attention(*arguments, window=window, scale=SCALE)
np.testing.assert_allclose(out, expected, atol=1e-5)
assert out.sharding.spec == PartitionSpec(on_mesh.ROW_AXES, None, on_mesh.HEAD_AXIS)
print("equal")
collective = [
    kind for kind in ("all-gather", "all-reduce", "all-to-all") if kind in compiled.as_text()
]
print(" ".join(collective) or "no-collectives")
