"""Kernels' products are those of the blocks that run, whatever lies around the kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu.splash_attention import MultiHeadMask, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import (
    process_mask_dkv,
)
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from t5g2.kernels.attention import RESULTS, KeyValues, Window, visibility
from t5g2.kernels.splash import MergedMask, _kernel, splash
from t5g2.kernels.triton import _Blocks, _Sizes, triton_attention
from t5g2.planning.executed import executed

HEADS, WIDTH, BLOCK, LAYERS, ROWS = 4, 64, 512, 3, 4
FORWARD, BACKWARD = 2, 3 + 4  # products of a block: scores and values; dq; dk, dv
CASES = {
    "encoder, all": (2048, None, Window(None, None)),
    "encoder, window": (2560, None, Window(255, 256)),
    "decoder, window": (2048, 1024, Window(511, 0)),
    "decoder, causal": (2048, 1536, Window(None, 0)),
}


def running_blocks(length, memory_length, window, queries=BLOCK, keys=BLOCK):
    """Blocks in which a query sees a key, of the mask as the reference attention makes it."""
    tokens = np.ones((1, length), np.int32), np.arange(length)[None]
    visible = np.asarray(visibility(*tokens, KeyValues(None, None, *tokens), window))[0]
    visible = np.pad(visible, ((0, 0), (0, memory_length or 0)), constant_values=True)
    return visible.reshape(length // queries, queries, -1, keys).any((1, 3)).sum()


def layers(case, keep, kernel=splash):
    """The gradient of layers of attention in a loop, on two devices.

    Args:
        case: of `CASES`.
        kernel: that attends.
        keep: what of a layer, for the backward pass: "all" or a policy of `jax.checkpoint`.
    """
    length, memory_length, window = CASES[case]

    def attend(query, keys, memory):
        tokens = jnp.ones(query.shape[:2], jnp.int32)
        memory = memory and KeyValues(*memory, *[jnp.ones(memory[0].shape[:2], jnp.int32)] * 2)
        return kernel(
            query, tokens, KeyValues(*keys, tokens, tokens), memory, window=window, scale=1.0
        )

    mesh = AbstractMesh((2,), ("data",), (AxisType.Auto,))
    split = jax.shard_map(
        attend, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )

    def total(query, keys, memory):
        def one(x):
            return split(x, keys, memory)

        one = one if keep == "all" else jax.checkpoint(one, policy=keep)
        out, _ = jax.lax.scan(lambda x, _: (x + one(jnp.sin(x)), None), query, length=LAYERS)
        return out.astype(jnp.float32).sum()

    def states(length, heads):
        return jax.ShapeDtypeStruct((ROWS, length, heads, WIDTH), jnp.bfloat16)

    keys = [states(length, 1)] * 2
    memory = None if memory_length is None else [states(memory_length, 1)] * 2
    gradient = jax.grad(total, argnums=(0, 1) if memory is None else (0, 1, 2))
    return jax.jit(gradient).trace(states(length, HEADS), keys, memory).jaxpr


@pytest.mark.parametrize("case", CASES)
def test_blocks_that_a_mask_hides_do_not_count(case):
    blocks = running_blocks(*CASES[case])
    product = LAYERS * ROWS * HEADS * blocks * 2 * BLOCK * BLOCK * WIDTH
    work = executed(layers(case, None))
    assert work.in_kernels == (2 * FORWARD + BACKWARD) * product
    for keep in ("all", jax.checkpoint_policies.save_only_these_names(RESULTS)):
        work = executed(layers(case, keep))
        assert work.in_kernels == (FORWARD + BACKWARD) * product
    assert type(work.flops) is int  # As JSON has it.


@pytest.mark.parametrize("case", CASES)
def test_of_the_kernel_for_gpu_blocks_count_that_a_whole_row_sees(case, monkeypatch):
    sizes = _Sizes(_Blocks(128, 64, 8, 2), _Blocks(64, 64, 8, 2), _Blocks(64, 32, 8, 2))
    monkeypatch.setattr("t5g2.kernels.triton._sizes", lambda query: sizes)
    forward, to_queries, to_keys = (
        LAYERS
        * ROWS
        * HEADS
        * running_blocks(*CASES[case], b.queries, b.keys)
        * 2
        * (b.queries * b.keys * WIDTH)
        for b in sizes
    )
    kept = layers(case, jax.checkpoint_policies.save_only_these_names(RESULTS), triton_attention)
    assert executed(kept).in_kernels == 2 * forward + 3 * to_queries + 4 * to_keys
    anew = executed(layers(case, None, triton_attention))
    assert anew.in_kernels == 4 * forward + 3 * to_queries + 4 * to_keys
    assert type(anew.flops) is int


def test_shares_of_the_grid_at_16k_are_those_counted_by_hand():
    # 32 blocks of queries; of keys as many on either side. Each of the decoder's own sees itself
    # and, but for the last, the next: 63 of 32 x 32 in a window of 512. Causal: 32 x 33 / 2.
    for window, own in ((Window(511, 0), 63), (Window(None, 0), 528)):
        heads = MultiHeadMask([MergedMask(16384, 32768, window)])
        mask, _ = process_mask_dkv(heads, (BLOCK, BLOCK))
        assert np.count_nonzero(mask.block_mask) == own + 32 * 32


def test_a_mask_that_is_no_constant_is_refused():
    kernel = _kernel(MergedMask(512, 512, Window(None, 0)), 1, (512, 512), False)
    states = jax.ShapeDtypeStruct((1, 512, WIDTH), jnp.bfloat16)

    def attend(kernel, x):
        return kernel(x, x, x, SegmentIds(*[jnp.ones(512, jnp.int32)] * 2))

    with pytest.raises(NotImplementedError, match=r"^splash_mha_fwd\w+ with a mask that is"):
        executed(jax.jit(attend).trace(kernel, states).jaxpr)


def test_products_that_nothing_needs_do_not_count():
    def run(x):
        _ = x @ x
        return x @ x

    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    assert executed(jax.jit(run).trace(x).jaxpr).flops == 2 * 8**3


def test_a_kernel_may_say_itself_what_it_multiplies():
    def kernel(bound, x, out):
        # As many turns as the data says.
        out[...] = jax.lax.fori_loop(0, bound[0], lambda _, y: y @ y, x[...])

    def run(bound, x, cost):
        return pl.pallas_call(kernel, out_shape=x, cost_estimate=cost)(bound, x)

    bound = jax.ShapeDtypeStruct((1,), jnp.int32)
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    said = pl.CostEstimate(flops=5 * 2 * 16**3, transcendentals=0, bytes_accessed=0)
    work = executed(jax.jit(functools.partial(run, cost=said)).trace(bound, x).jaxpr)
    assert work.flops == work.in_kernels == 5 * 2 * 16**3
    assert work.bytes == 2 * 16 * 16 * 4 + 4
    with pytest.raises(NotImplementedError, match="number of turns is not known"):
        executed(jax.jit(functools.partial(run, cost=None)).trace(bound, x).jaxpr)
