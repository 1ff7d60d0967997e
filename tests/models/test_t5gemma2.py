"""What the model may and may not depend on, and that execution options do not change it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5g2.models.config import TINY, ModelConfig
from t5g2.models.stack import Stack, Tokens
from t5g2.models.t5gemma2 import T5Gemma2, abstract_model, logical_axes, parameter_tree

SMALL = dataclasses.replace(
    TINY,
    vocab_size=61,
    hidden_size=32,
    mlp_dim=48,
    head_dim=8,
    num_layers=5,
    global_every=2,
    sliding_window=5,
    query_pre_attn_scalar=8.0,
    rope_factor_global=8.0,
    eoi_id=7,
    final_logit_softcap=3.0,
)
# Same shapes, but no layer is global.
LOCAL = dataclasses.replace(SMALL, num_layers=1, global_every=2)


def model_of(config: ModelConfig, seed: int = 0) -> T5Gemma2:
    """A model whose every parameter is random, also those that start as zeros."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(abstract_model(config))
    random = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), state
    )
    return nnx.merge(graph, random)


def ids(seed, *shape):
    return np.random.default_rng(seed).integers(8, 61, shape)


def whole(length, rows=1):
    shape = (rows, length)
    return Tokens(jnp.ones(shape, jnp.int32), jnp.broadcast_to(jnp.arange(length), shape))


# Compiling is most of what these tests do; the function is the same without optimisation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def encode_decode(model, encoder_ids, encoder_tokens, decoder_ids, decoder_tokens):
    memory = model.encode(encoder_ids, encoder_tokens)
    return memory.states, model.decode(decoder_ids, decoder_tokens, memory)


hidden = quick_jit(encode_decode)


def run(model, encoder_ids, decoder_ids):
    return hidden(
        model,
        encoder_ids,
        whole(encoder_ids.shape[1]),
        decoder_ids,
        whole(decoder_ids.shape[1]),
    )


def affected(function, tokens, position):
    """Output positions that change when the token at `position` does."""
    other = tokens.copy()
    other[0, position] = 8 + (other[0, position] - 7) % 53
    assert other[0, position] != tokens[0, position]
    difference = np.abs(np.asarray(function(other)) - np.asarray(function(tokens)))
    return np.flatnonzero(difference[0].max(axis=-1) > 1e-6).tolist()


@pytest.mark.parametrize(("window", "left", "right"), [(5, 2, 2), (6, 2, 3), (1, 0, 0), (2, 0, 1)])
def test_a_local_encoder_layer_sees_half_its_window_on_either_side(window, left, right):
    model = model_of(dataclasses.replace(LOCAL, sliding_window=window))
    tokens = ids(0, 1, 12)
    # Seen from the token that is looked at: queries to its right look left, and vice versa.
    seen_by = affected(lambda x: run(model, x, ids(1, 1, 3))[0], tokens, 6)
    assert seen_by == list(range(6 - right, 6 + left + 1))


@pytest.mark.parametrize("window", [1, 4, 5])
def test_a_local_decoder_layer_sees_its_last_window_of_positions(window):
    model = model_of(dataclasses.replace(LOCAL, sliding_window=window))
    seen_by = affected(lambda y: run(model, ids(0, 1, 6), y)[1], ids(1, 1, 12), 3)
    assert seen_by == list(range(3, 3 + window))


def test_every_decoder_position_of_a_local_layer_sees_all_of_the_encoder():
    model = model_of(LOCAL)
    seen_by = affected(lambda x: run(model, x, ids(1, 1, 12))[1], ids(0, 1, 20), 19)
    assert seen_by == list(range(12))


def test_a_global_layer_sees_everything_and_the_decoder_never_its_future():
    model = model_of(dataclasses.replace(SMALL, num_layers=2))
    encoder_ids, decoder_ids = ids(0, 1, 20), ids(1, 1, 16)
    assert affected(lambda x: run(model, x, decoder_ids)[0], encoder_ids, 19) == list(range(20))
    assert affected(lambda y: run(model, encoder_ids, y)[1], decoder_ids, 5) == list(range(5, 16))


@functools.cache
def value_and_gradient(config):
    """Loss of a batch, and its gradient, with the parameters of `model_of(config)`."""
    encoder_ids, decoder_ids, targets = ids(0, 2, 11), ids(1, 2, 9), ids(2, 2, 9)
    encoder_ids[:, 3] = config.eoi_id

    def loss(model):
        states = encode_decode(model, encoder_ids, whole(11, 2), decoder_ids, whole(9, 2))[1]
        return model.token_losses(states, targets).mean()

    value, gradient = quick_jit(jax.value_and_grad(loss))(model_of(config))
    return value, parameter_tree(gradient)


@functools.cache
def encoder_value_and_gradient(config):
    """The same of something that needs the encoder only, which compiles faster."""
    encoder_ids = ids(0, 2, 11)
    encoder_ids[:, 3] = config.eoi_id

    def loss(model):
        return jnp.square(model.encode(encoder_ids, whole(11, 2)).states[..., 0]).sum()

    value, gradient = quick_jit(jax.value_and_grad(loss))(model_of(config))
    tree = parameter_tree(gradient)
    return value, {"encoder": tree["encoder"], "embedder": tree["embedder"]}


EXECUTIONS = [
    {"scan_layers": scan_layers, "remat": remat}
    for scan_layers in (True, False)
    for remat in ("none", "dots", "attention", "full")
][1:]


@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
@pytest.mark.parametrize(
    ("compute", "config"),
    [
        pytest.param(
            encoder_value_and_gradient,
            dataclasses.replace(SMALL, num_layers=2, global_every=1),
            id="two encoder layers",
        ),
        pytest.param(value_and_gradient, SMALL, id="whole model", marks=pytest.mark.slow),
    ],
)
def test_execution_options_change_neither_values_nor_gradients(compute, config, execution):
    expected, expected_gradient = compute(config)
    value, gradient = compute(dataclasses.replace(config, **execution))
    np.testing.assert_allclose(value, expected, rtol=1e-6)

    def assert_same(ours, theirs):
        size = np.linalg.norm(theirs)
        assert size > 0
        assert np.linalg.norm(ours - theirs) < 1e-5 * size

    jax.tree.map(assert_same, gradient, expected_gradient)


def test_packed_examples_equal_the_same_examples_alone():
    model = model_of(SMALL)
    examples = [(ids(2 * i, n), ids(2 * i + 1, m)) for i, (n, m) in enumerate([(9, 7), (4, 11)])]
    examples.append((ids(8, 12), ids(9, 3)))

    def pack(rows, length):
        """One row that holds `rows` one after the other, then padding."""
        pad = np.zeros(length - sum(map(len, rows)), int)
        segments = [np.full(len(row), i + 1) for i, row in enumerate(rows)]
        positions = [np.arange(len(row)) for row in rows]
        tokens, segments, positions = (
            jnp.asarray(np.concatenate([*parts, pad])[None])
            for parts in (rows, segments, positions)
        )
        return tokens, Tokens(segments, positions)

    def run_packed(examples):
        inputs, outputs = zip(*examples, strict=True)
        return hidden(model, *pack(inputs, 28), *pack(outputs, 24))

    packed = run_packed(examples)
    start = [0, 0]
    for example in examples:
        alone = run_packed([example])
        for side in range(2):
            length = len(example[side])
            part = packed[side][:, start[side] : start[side] + length]
            np.testing.assert_allclose(part, alone[side][:, :length], atol=2e-5, rtol=0)
            start[side] += length


def test_padding_of_the_encoder_changes_nothing():
    model = model_of(dataclasses.replace(SMALL, num_layers=2))
    inputs, outputs = ids(0, 1, 9), ids(1, 1, 7)
    call = quick_jit(lambda model, *arguments: model(*arguments))
    expected = call(model, inputs, outputs)
    mask = np.ones_like(inputs)
    right = [np.pad(x, ((0, 0), (0, 6))) for x in (inputs, mask)]
    np.testing.assert_allclose(call(model, right[0], outputs, right[1]), expected, atol=2e-5)


def test_the_end_of_image_token_has_its_own_embedding_and_others_are_scaled():
    model = model_of(SMALL)
    embedded = model.embedder(jnp.array([[7, 8]]))
    np.testing.assert_array_equal(embedded[0, 0], model.embedder.eoi_embedding[...])
    np.testing.assert_allclose(embedded[0, 1], model.embedder.table[8] * 32**0.5, rtol=1e-6)


def test_logits_are_soft_capped_and_losses_are_theirs():
    model = model_of(SMALL)
    states = 10 * np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    logits = model.logits(states)
    assert 2.9 < jnp.abs(logits).max() <= 3.0
    targets = ids(1, 2, 5)
    expected = -np.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(model.token_losses(states, targets), expected, rtol=1e-5)


def test_every_parameter_names_one_logical_axis_per_dimension():
    tree, axes = parameter_tree(abstract_model(SMALL)), logical_axes(SMALL)
    flat, structure = jax.tree.flatten(tree)
    for leaf, names in zip(flat, structure.flatten_up_to(axes), strict=True):
        assert len(names) == len(leaf.shape)
        assert (names[0] == "layers") == (leaf.shape[0] == SMALL.num_layers)


def test_new_layers_are_independent_draws_with_the_configured_deviation():
    gate = quick_jit(lambda: Stack(SMALL, rngs=nnx.Rngs(0)).layers.mlp.gate[...])()
    assert gate.shape == (5, 32, 48)
    np.testing.assert_allclose(gate.std(axis=(1, 2)), SMALL.initializer_range, rtol=0.1)
    assert jnp.abs(jnp.corrcoef(gate.reshape(5, -1)) - jnp.eye(5)).max() < 0.1


@pytest.mark.parametrize(
    "settings", [{"num_kv_heads": 3}, {"head_dim": 7}, {"sliding_window": 0}, {"global_every": 0}]
)
def test_impossible_shapes_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        dataclasses.replace(SMALL, **settings)
