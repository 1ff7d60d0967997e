"""What a fused kernel must compute: operands, and the reference's values and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from packed_rows import SCALE, long_rows

from t5g2.kernels.attention import RESULTS, Window, reference_attention

# Lengths of both sides (no multiples of a block), heads, key and value heads.
CASES = {
    "encoder, odd window": (150, None, (4, 1), Window(3, 3)),
    "encoder, window over blocks": (700, None, (2, 2), Window(127, 128)),
    "decoder, window": (300, 200, (8, 4), Window(40, 0)),
    "decoder, causal, longer encoder": (130, 600, (4, 2), Window(None, 0)),
}


def both(case, kernel, dtype=jnp.float32):
    """Values, and gradients by all states, of a kernel and of the reference; and the segment ids.

    Args:
        case: of `CASES`.
        kernel: a fused kernel.
        dtype: of the kernel's states; the reference gets them as float32.
    """
    length, memory_length, heads, window = CASES[case]
    query, own, keys, memory = long_rows(length, memory_length or 8, heads=heads)
    arrays = [query, keys.key, keys.value]
    arrays += [] if memory_length is None else [memory.key, memory.value]
    arrays = [array.astype(dtype) for array in arrays]
    weights = np.random.default_rng(1).normal(size=query.shape).astype(np.float32)

    def run(function, arrays):
        def total(query, key, value, *crossed):
            near = keys._replace(key=key, value=value)
            far = memory._replace(key=crossed[0], value=crossed[1]) if crossed else None
            out = function(query, near, far)
            return jnp.sum(out * weights), out

        gradient = jax.grad(total, argnums=range(len(arrays)), has_aux=True)
        gradients, out = jax.jit(gradient)(*arrays)
        return [np.asarray(array, np.float32) for array in (out, *gradients)]

    ours = run(
        lambda q, near, far: kernel(q, own[0], near, far, window=window, scale=SCALE), arrays
    )
    exact = [array.astype(jnp.float32) for array in arrays]

    def reference(query, near, far):
        return reference_attention(query, *own, near, far, window=window, scale=SCALE)

    return ours, run(reference, exact), own[0]


def gradients_with(policy, kernel):
    """A kernel's gradients by query, key and value where a layer is made again by a policy."""
    query, own, keys, memory = long_rows(130, 200, heads=(4, 2))

    def attend(query, near, far):
        return kernel(query, own[0], near, far, window=Window(40, 0), scale=SCALE)

    def total(query, key, value):
        near = keys._replace(key=key, value=value)
        return jnp.sin(jax.checkpoint(attend, policy=policy)(query, near, memory)).sum()

    return jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(query, keys.key, keys.value)


def is_the_same_where_results_are_kept(kernel):
    """Gradients of a kernel are those without recomputation."""
    query, _, keys, _ = long_rows(130, 200, heads=(4, 2))
    policies = jax.checkpoint_policies
    expected, kept = (
        gradients_with(policy, kernel).lower().compile()(query, keys.key, keys.value)
        for policy in (policies.everything_saveable, policies.save_only_these_names(RESULTS))
    )
    for ours, theirs in zip(kept, expected, strict=True):
        assert np.abs(theirs).max() > 0.01
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def attends_alone_on_each_device(backend):
    """On a mesh each device attends for its rows and heads, without collectives."""
    script = Path(__file__).with_name("fused_on_mesh.py")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, script, backend]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["equal", "no-collectives"]
