"""Multiplying token states by a weight."""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from t5g2.kernels.layout import LENGTH, current
from t5g2.kernels.on_mesh import current_mesh, target_platform

# What `jax.checkpoint`'s policies know the products of states and weights by.
PRODUCTS = "product"


def project(x: Float[Array, "B T *inputs"], weight: Float[Array, "*axes"]) -> Array:
    """Contracts the axes of `x` behind batch and length with the leading ones of `weight`.

    Args:
        x: [B, T, *inputs].
        weight: [*inputs, *outputs].

    Returns:
        [B, T, *outputs], in the dtype of `x`.
    """
    inputs = x.ndim - 2
    layout = current()
    # XLA's CPU back end multiplies matrices well, and contracts two axes at once, as the weight's
    # gradient would, at half that speed. Where the length is split, the flattened tokens of a
    # device would not follow one another.
    whole_rows = layout is None or layout.size(LENGTH) == 1
    if whole_rows and target_platform(current_mesh()) == "cpu":
        width = math.prod(x.shape[2:])
        flat = _multiply(x.reshape(-1, width), weight.reshape(width, -1))
        out = flat.reshape(*x.shape[:2], *weight.shape[inputs:])
    else:
        out = jnp.tensordot(x, weight, axes=inputs)
    return checkpoint_name(out, PRODUCTS)


def _product(equation: str, a: Array, b: Array) -> Array:
    # Asked for bfloat16, XLA's CPU back end multiplies in float32, at half the speed of processors
    # that multiply bfloat16.
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32).astype(a.dtype)


@jax.custom_vjp
def _multiply(x: Float[Array, "N A"], weight: Float[Array, "A B"]) -> Float[Array, "N B"]:
    """`x @ weight`, whose gradients are products of the same dtype, too."""
    return _product("na,ab->nb", x, weight)


def _forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _multiply(x, weight), (x, weight)


def _backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = kept
    return _product("nb,ab->na", gradient, weight), _product("na,nb->ab", x, gradient)


_multiply.defvjp(_forward, _backward)
