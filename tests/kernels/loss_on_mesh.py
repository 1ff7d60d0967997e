"""Run by test_vocabulary_loss.py with eight CPU devices: the loss as steps on meshes trace it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from t5g2.kernels.layout import installed
from t5g2.kernels.vocabulary_loss import summed_losses
from t5g2.parallel.mesh import MeshConfig, make_mesh
from t5g2.parallel.rules import make_layout
from t5g2.planning.collectives import collectives

VOCABULARY, WIDTH, ROWS, LENGTH, TILE = 512, 16, 8, 40, 20

rng = np.random.default_rng(0)
table = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
hidden = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
targets = rng.integers(0, VOCABULARY, (ROWS, LENGTH))


def total(table, hidden, targets):
    return summed_losses(hidden, table, targets, jnp.ones(targets.shape), rows=TILE)[0]


loss = jax.value_and_grad(total, argnums=(0, 1))
expected, gradients = jax.jit(loss)(table, hidden, targets)
for sizes in (
    {"data": 1, "fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 2, "tensor": 2, "context": 2},
):
    mesh = make_mesh(MeshConfig(**sizes))
    layout = make_layout(mesh)
    tokens = layout.sharding("rows", "length")
    split = NamedSharding(mesh, PartitionSpec("tensor", ("fsdp", "context")))
    parts = [split, tokens, tokens]

    def on_mesh(*arguments, layout=layout):
        with installed(layout):
            return loss(*arguments)

    outs = (NamedSharding(mesh, PartitionSpec()), tuple(parts[:2]))
    jitted = jax.jit(on_mesh, in_shardings=parts, out_shardings=outs)
    compiled = jitted.lower(table, hidden, targets).compile()
    value, found = compiled(*jax.device_put((table, hidden, targets), tuple(parts)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(found, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    # The table comes once, its gradient is summed once; between the parts of the vocabulary a few
    # numbers a token are exchanged.
    sent = sum(exchange.bytes for exchange in collectives(compiled.as_text(), dict(mesh.shape)))
    print(sent / (table.nbytes / sizes.get("tensor", 1)))
