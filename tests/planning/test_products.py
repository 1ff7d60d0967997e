"""Products are read from XLA's text: dots, and the convolutions that TPUs have in their place."""

import jax
import jax.numpy as jnp
import pytest

from t5g2.planning.executed import executed
from t5g2.planning.products import device_products

MODULE = """HloModule jit_step

ENTRY %main.9 (a: f32[8,4]) -> f32[8,4] {{
  %a = bf16[{left}]{{1,0}} parameter(0)
  %b = bf16[{right}]{{1,0}} parameter(1)
  ROOT %c = bf16[{out}]{{1,0:T(8,128)}} convolution(%a, %b), {window}
}}
"""


# As libtpu prints products of [1024, 256] x [256, 512], of 8 x [1024, 256] x [256, 128], and of
# [8 x 1024, 32] x [32, 4 x 128], whose four heads slide over padding.
@pytest.mark.parametrize(
    ("left", "right", "out", "window", "flops"),
    [
        ("1024,256", "256,512", "1024,512", "dim_labels=bf_io->bf", 2 * 1024 * 256 * 512),
        (
            "8,1024,256",
            "1,256,128",
            "8,1024,128",
            "window={size=1}, dim_labels=0bf_0io->0bf",
            2 * 8 * 1024 * 256 * 128,
        ),
        (
            "8,1024,32,1",
            "32,4,128,1",
            "8,1024,4,128",
            "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f",
            2 * 8 * 1024 * 32 * 4 * 128,
        ),
    ],
)
def test_convolutions_are_products(left, right, out, window, flops):
    text = MODULE.format(left=left, right=right, out=out, window=window)
    assert device_products(text).flops == flops


AGAIN = """HloModule jit_step

%fused.1 (a: f32[8,4]) -> f32[8,8] {
  %a = bf16[8,4]{1,0} parameter(0)
  ROOT %c = bf16[8,8]{1,0} convolution(%a, %a), dim_labels=bf_oi->bf
}

ENTRY %main.9 (a: f32[8,4]) -> f32[8,8] {
  %a = bf16[8,4]{1,0} parameter(0)
  %fusion.2 = bf16[8,8]{1,0} fusion(%a), kind=kOutput, calls=%fused.1
  %fusion.2.remat3 = bf16[8,8]{1,0} fusion(%a), kind=kOutput, calls=%fused.1, metadata={}
  %dot.5 = bf16[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %dot.5.remat = bf16[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
"""


def test_what_xla_makes_again_is_told():
    one = 2 * 8 * 8 * 4
    assert device_products(AGAIN) == (4 * one, 2 * one)
    # Where the first is gone, the second is the only one.
    moved = AGAIN.replace("%dot.5 =", "%other.5 =")
    assert device_products(moved) == (4 * one, one)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x @ y,
        lambda x, y: jnp.einsum("ab,cb->ac", x, y.T),
        lambda x, y: jax.lax.scan(lambda c, _: ((c @ y) @ y.T, None), x, None, length=7)[0],
        lambda x, y: jax.vmap(jnp.dot)(jnp.stack([x] * 5), jnp.stack([y] * 5)),
    ],
)
def test_dots_of_a_compiled_program_are_all_found(function):
    x, y = jax.ShapeDtypeStruct((48, 40), jnp.float32), jax.ShapeDtypeStruct((40, 24), jnp.float32)
    traced = jax.jit(function).trace(x, y)
    assert (
        device_products(traced.lower().compile().as_text()).flops
        == executed(traced.jaxpr).flops
        > 0
    )
