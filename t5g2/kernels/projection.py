"""Multiplying token states by a weight."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from t5g2.kernels.layout import LENGTH, current


def project(x: Float[Array, "B T *inputs"], weight: Float[Array, "*axes"]) -> Array:
    """Contracts the axes of `x` behind batch and length with the leading ones of `weight`.

    Args:
        x: [B, T, *inputs].
        weight: [*inputs, *outputs].

    Returns:
        [B, T, *outputs], in the dtype of `x`.
    """
    inputs = x.ndim - 2
    direct = functools.partial(jnp.tensordot, axes=inputs)

    def flattened(x: Array, weight: Array) -> Array:
        width = math.prod(x.shape[2:])
        out = x.reshape(-1, width) @ weight.reshape(width, -1)
        return out.reshape(*x.shape[:2], *weight.shape[inputs:])

    if (layout := current()) is not None and layout.size(LENGTH) > 1:
        return direct(x, weight)  # The flattened tokens of a device would not follow one another.
    # XLA's CPU back end multiplies matrices well, and contracts two axes at once, as the weight's
    # gradient would, at half that speed.
    return jax.lax.platform_dependent(x, weight, cpu=flattened, default=direct)
