"""Attention against loops over queries, heads and keys in plain numpy."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_rows import SCALE, long_rows, packed

from t5g2.kernels.attention import KeyValues, Window, attention, reference_attention


def looped(query, segments, positions, keys, memory, window):
    """What `attention` promises, one query, head and key at a time, in float64."""
    out = np.zeros(query.shape)
    batch, length, heads, _ = query.shape
    for b, t, h in itertools.product(range(batch), range(length), range(heads)):
        logits, values = [], []
        for source in (keys, memory):
            if source is None:
                continue
            kv_head = h // (heads // source.key.shape[2])
            for s in range(source.key.shape[1]):
                segment = source.segment_ids[b, s]
                ahead = source.positions[b, s] - positions[b, t]
                hidden = segment == 0 or segment != segments[b, t]
                if source is keys:
                    hidden |= window.left is not None and -ahead > window.left
                    hidden |= window.right is not None and ahead > window.right
                if not hidden:
                    logits.append(SCALE * float(query[b, t, h] @ source.key[b, s, kv_head]))
                    values.append(source.value[b, s, kv_head])
        if logits:
            weights = np.exp(np.array(logits) - max(logits))
            out[b, t, h] = weights @ np.array(values) / weights.sum()
    return out


# Two packed rows, with padding at the end, at the start, and in the encoder only.
DECODER = packed([[1, 1, 1, 1, 2, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]])
ENCODER = packed([[1, 1, 2, 2, 2, 3], [1, 1, 1, 1, 0, 0]])


def operands(heads, kv_heads, seed=0):
    rng = np.random.default_rng(seed)

    def random(shape):
        return rng.normal(size=shape).astype(np.float32)

    query = random((2, 9, heads, 4))
    keys = KeyValues(random((2, 9, kv_heads, 4)), random((2, 9, kv_heads, 4)), *DECODER)
    memory = KeyValues(random((2, 6, kv_heads, 4)), random((2, 6, kv_heads, 4)), *ENCODER)
    return query, keys, memory


@pytest.mark.parametrize(
    "window",
    [Window(None, None), Window(None, 0), Window(2, 0), Window(0, 0), Window(1, 2), Window(2, 1)],
)
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "self"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 3), (2, 2)])
def test_attention_equals_loops(window, merged, heads, kv_heads):
    query, keys, memory = operands(heads, kv_heads)
    memory = memory if merged else None
    out = attention(query, *DECODER, keys, memory, window=window, scale=SCALE)
    expected = looped(query, *DECODER, keys, memory, window)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_queries_that_are_padding_or_see_nothing_give_zeros_and_finite_gradients():
    query, keys, memory = operands(4, 2)
    # Segment 2 of the first row has no encoder side here, and its own keys are made padding.
    keys = keys._replace(segment_ids=np.where(DECODER[0] == 2, 0, DECODER[0]))
    memory = memory._replace(segment_ids=np.where(ENCODER[0] == 2, 0, ENCODER[0]))

    def run(query, keys, memory):
        return attention(query, *DECODER, keys, memory, window=Window(None, 0), scale=SCALE)

    blind = (DECODER[0] == 0) | ((DECODER[0] == 2) & (np.arange(2)[:, None] == 0))
    out = np.asarray(run(query, keys, memory))
    assert not out[blind].any()
    assert np.abs(out[~blind]).min(axis=(-1, -2)).min() > 0

    def total(query, key, value):
        return run(query, keys._replace(key=key, value=value), memory).sum()

    gradients = jax.grad(total, argnums=(0, 1, 2))(query, keys.key, keys.value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[0][blind].any()


def test_keys_of_another_segment_and_padding_have_no_influence():
    query, keys, memory = operands(4, 2)
    seen = DECODER[0] == 1

    def run(fill):
        def spoil(source, segments):
            other = (segments != 1)[..., None, None]
            return source._replace(
                key=np.where(other, fill, source.key), value=np.where(other, fill, source.value)
            )

        spoiled = spoil(keys, DECODER[0]), spoil(memory, ENCODER[0])
        return attention(query, *DECODER, *spoiled, window=Window(None, 0), scale=SCALE)

    np.testing.assert_array_equal(run(0.0)[seen], run(1e4)[seen])


def test_bfloat16_operands_keep_float32_logits_and_softmax():
    rng = np.random.default_rng(0)
    length = 256
    segments, positions = np.ones((1, length), int), np.arange(length)[None]
    query, key, value = (
        jnp.asarray(rng.normal(size=(1, length, 2, 8)), jnp.bfloat16) for _ in range(3)
    )
    keys = KeyValues(key, value, segments, positions)
    out = attention(query, segments, positions, keys, None, window=Window(None, 0), scale=4.0)
    assert out.dtype == jnp.bfloat16
    wide = KeyValues(key.astype(np.float32), value.astype(np.float32), segments, positions)
    exact = attention(
        query.astype(np.float32),
        segments,
        positions,
        wide,
        None,
        window=Window(None, 0),
        scale=4.0,
    )
    # Weights and result are rounded once each (2^-9); logits of about 30 in bfloat16 would be off
    # by a tenth each.
    assert jnp.abs(out.astype(np.float32) - exact).max() < 2**-6


BLOCKWISE = {
    "encoder, window of 512": (700, Window(255, 256), False),
    "encoder, odd window": (520, Window(3, 3), False),
    "encoder, global": (1100, Window(None, None), False),
    "decoder, window of 512": (1030, Window(511, 0), True),
    "decoder, window of one": (300, Window(0, 0), True),
    "decoder, causal": (1024, Window(None, 0), True),
}


@pytest.mark.parametrize("case", BLOCKWISE)
def test_long_rows_by_blocks_equal_one_piece_in_value_and_gradient(case):
    length, window, merged = BLOCKWISE[case]
    query, own, keys, memory = long_rows(length, 450)
    arrays = (query, keys.key, keys.value, memory.key, memory.value)
    weights = np.random.default_rng(1).normal(size=query.shape).astype(np.float32)

    def run(function):
        def total(query, key, value, memory_key, memory_value):
            crossed = memory._replace(key=memory_key, value=memory_value) if merged else None
            near = keys._replace(key=key, value=value)
            out = function(query, *own, near, crossed, window=window, scale=SCALE)
            return jnp.sum(out * weights), out

        return jax.jit(jax.grad(total, argnums=range(5 if merged else 3), has_aux=True))(*arrays)

    gradients, out = run(attention)
    expected_gradients, expected = run(reference_attention)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("window", [Window(255, 256), Window(511, 0), Window(None, 0)])
def test_no_array_of_all_queries_by_all_keys_is_ever_made(window):
    length = 4096
    query, own, keys, _ = long_rows(length, 450)

    def total(query, key, value):
        near = keys._replace(key=key, value=value)
        return attention(query, *own, near, None, window=window, scale=SCALE).sum()

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(query, keys.key, keys.value)
    text = compiled.compile().as_text()
    shapes = [
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"\b(?:f32|pred|s32)\[([\d,]+)\]", text)
    ]
    rows, heads, block = 2, 4, 512
    most = length if window.left is None else 2 * block
    assert max(np.prod(shape) for shape in shapes) <= rows * heads * block * most
