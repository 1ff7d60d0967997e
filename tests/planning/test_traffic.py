"""What a GPU's kernels read and write, and what its program multiplies and sends."""

import re

import jax
import jax.numpy as jnp
import pytest

from t5g2.planning.collectives import Collective, collectives
from t5g2.planning.products import device_products
from t5g2.planning.traffic import hbm_traffic

# In the notation of XLA's compiler for GPUs: a loop of three turns over stacked weights, in which a
# fusion takes a turn's weights from the stack, a collective gathers them, a product is a fusion, a
# library multiplies, and another fusion puts what is to be kept where it belongs.
MODULE = """HloModule jit_step, is_scheduled=true

%taken (stack: f32[3,16,32], turn: s32[]) -> bf16[16,32] {
  %stack = f32[3,16,32]{2,1,0} parameter(0)
  %turn = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,16,32]{2,1,0} dynamic-slice(%stack, %turn, %zero, %zero), dynamic_slice_sizes={1,16,32}
  %flat = f32[16,32]{1,0} bitcast(%one)
  ROOT %cast = bf16[16,32]{1,0} convert(%flat)
}

%multiplied (x: bf16[8,64], w: bf16[64,32]) -> bf16[8,32] {
  %x = bf16[8,64]{1,0} parameter(0)
  %w = bf16[64,32]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%kept (all: bf16[3,8,32], turn.1: s32[], y: bf16[8,32]) -> (bf16[3,8,32], bf16[8,32]) {
  %all = bf16[3,8,32]{2,1,0} parameter(0)
  %y = bf16[8,32]{1,0} parameter(2)
  %row = bf16[1,8,32]{2,1,0} bitcast(%y)
  %turn.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %put = bf16[3,8,32]{2,1,0} dynamic-update-slice(%all, %row, %turn.1, %zero.1, %zero.1)
  %twice = bf16[8,32]{1,0} add(%y, %y)
  ROOT %both = (bf16[3,8,32]{2,1,0}, bf16[8,32]{1,0}) tuple(%put, %twice)
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%body (s: (s32[], f32[3,16,32], bf16[3,8,32], bf16[8,64])) -> (s32[], f32[3,16,32], bf16[3,8,32], bf16[8,64]) {
  %s = (s32[], f32[3,16,32]{2,1,0}, bf16[3,8,32]{2,1,0}, bf16[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %stacked = f32[3,16,32]{2,1,0} get-tuple-element(%s), index=1
  %stored = bf16[3,8,32]{2,1,0} get-tuple-element(%s), index=2
  %h = bf16[8,64]{1,0} get-tuple-element(%s), index=3
  %f.1 = bf16[16,32]{1,0} fusion(%stacked, %i), kind=kLoop, calls=%taken
  %g = (bf16[16,32]{1,0}, bf16[64,32]{1,0}) all-gather-start(%f.1), channel_id=1, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}
  %gathered = bf16[64,32]{1,0} all-gather-done(%g)
  %gemm_fusion_dot.1 = bf16[8,32]{1,0} fusion(%h, %gathered), kind=kCustom, calls=%multiplied, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  %f.2 = (bf16[3,8,32]{2,1,0}, bf16[8,32]{1,0}) fusion(%stored, %i, /*index=2*/%gemm_fusion_dot.1), kind=kLoop, calls=%kept
  %next = bf16[3,8,32]{2,1,0} get-tuple-element(%f.2), index=0
  %doubled = bf16[8,32]{1,0} get-tuple-element(%f.2), index=1
  %custom-call.1 = (bf16[8,64]{1,0}, s8[4096]{0}) custom-call(%doubled, %gathered), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[]}}}
  %out = bf16[8,64]{1,0} get-tuple-element(%custom-call.1), index=0
  ROOT %t = (s32[], f32[3,16,32]{2,1,0}, bf16[3,8,32]{2,1,0}, bf16[8,64]{1,0}) tuple(%i, %stacked, %next, %out)
}

%condition (q: (s32[], f32[3,16,32], bf16[3,8,32], bf16[8,64])) -> pred[] {
  %q = (s32[], f32[3,16,32]{2,1,0}, bf16[3,8,32]{2,1,0}, bf16[8,64]{1,0}) parameter(0)
  ROOT %compared = pred[] constant(true)
}

ENTRY %main (w0: f32[3,16,32], x0: bf16[8,64]) -> bf16[8,64] {
  %w0 = f32[3,16,32]{2,1,0} parameter(0)
  %x0 = bf16[8,64]{1,0} parameter(1)
  %state = (s32[], f32[3,16,32]{2,1,0}, bf16[3,8,32]{2,1,0}, bf16[8,64]{1,0}) tuple(%w0, %x0)
  %loop = (s32[], f32[3,16,32]{2,1,0}, bf16[3,8,32]{2,1,0}, bf16[8,64]{1,0}) while(%state), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %scattered = f32[64]{0} constant(0)
  %r = ((f32[64]{0}, bf16[8,64]{1,0}), (f32[16]{0}, bf16[2,64]{1,0})) reduce-scatter-start(%scattered, %x0), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%sum
  %r.done = (f32[16]{0}, bf16[2,64]{1,0}) reduce-scatter-done(%r)
  %s.1 = ((bf16[8,64]{1,0}), bf16[8,64]{1,0}) all-to-all-start(%x0), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
  %s.2 = bf16[8,64]{1,0} all-to-all-done(%s.1)
  %n = f32[5]{0} all-reduce-start(%scattered), channel_id=4, replica_groups={}, to_apply=%sum
  %n.done = f32[5]{0} all-reduce-done(%n)
  ROOT %y0 = bf16[8,64]{1,0} get-tuple-element(%loop), index=3
}
"""  # noqa: E501


def test_fused_products_and_those_of_a_library_count_in_every_turn():
    assert device_products(MODULE).flops == 3 * (2 * 8 * 64 * 32 + 2 * 8 * 32 * 64)


def test_several_arrays_in_one_collective_are_what_it_sends():
    assert set(collectives(MODULE, {"data": 1, "fsdp": 4})) == {
        # Three of four parts come from other devices.
        Collective("all-gather", "fsdp", 3, 3 * 64 * 32 * 2 * 3 // 4),
        Collective("reduce-scatter", "fsdp", 1, (64 * 4 + 8 * 64 * 2) * 3 // 4),
        Collective("all-to-all", "fsdp", 1, 8 * 64 * 2 * 3 // 4),
        Collective("all-reduce", "fsdp", 1, 2 * 5 * 4 * 3 // 4),
    }


def test_kernels_read_and_write_what_they_touch():
    weights, states = 16 * 32, 8 * 64 * 2
    turn = [
        weights * 4 + 4 + weights * 2,  # One of the stack, its number; half as wide.
        weights * 2 + 4 * weights * 2,  # A part, and all of it.
        states + 4 * weights * 2 + 8 * 32 * 2,
        # Of what is kept nothing is read, and a row is written.
        4 + 8 * 32 * 2 + 2 * 8 * 32 * 2,
        8 * 32 * 2 + 4 * weights * 2 + states + 4096,
    ]
    once = [
        (64 * 4 + states) * 5 // 4,
        2 * states,
        5 * 4 + 64 * 4,
    ]
    assert hbm_traffic(MODULE) == 3 * sum(turn) + sum(once)


@pytest.mark.parametrize("length", [1, 5])
def test_a_real_programs_loops_count_as_often_as_they_turn(length):
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def run(x, y):
        return jax.lax.scan(lambda c, _: (jnp.sin(c @ y), None), x, None, length=length)[0]

    text = jax.jit(run).lower(x, x).compile().as_text()
    # A product reads two factors and a sine one; each writes its result.
    turn = (3 + 2) * 64 * 64 * 4
    moved = hbm_traffic(text)
    assert moved >= length * turn
    # Beside it copies, at most, of what goes round.
    assert moved <= (length + 1) * turn + 1000
    assert re.search(r" while\(", text) or length == 1


def test_without_loops_and_slices_it_is_what_xlas_own_analysis_says():
    x = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    weights = jax.ShapeDtypeStruct((128, 512), jnp.float32)

    def loss(w, x):
        hidden = jax.nn.gelu(x @ w)
        return jnp.square(jax.nn.softmax(hidden @ w.T)).sum()

    compiled = jax.jit(jax.grad(loss)).lower(weights, x).compile()
    said = compiled.cost_analysis()["bytes accessed"]
    assert hbm_traffic(compiled.as_text()) == pytest.approx(said, rel=1e-3)


def test_of_a_table_what_is_looked_up_counts_which_xlas_analysis_takes_for_all():
    ids = jax.ShapeDtypeStruct((64,), jnp.int32)
    table = jax.ShapeDtypeStruct((5000, 512), jnp.float32)
    compiled = jax.jit(lambda table, ids: jnp.tanh(table[ids])).lower(table, ids).compile()
    unseen = (5000 - 64) * 512 * 4
    said = compiled.cost_analysis()["bytes accessed"] - unseen
    assert hbm_traffic(compiled.as_text()) == pytest.approx(said, rel=1e-2)
