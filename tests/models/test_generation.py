"""Generation: against transformers, against the model without a cache, against its own contract."""

import dataclasses
import itertools
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from flax import nnx

from t5g2.errors import UserError
from t5g2.interop.hf import export_hf
from t5g2.models import generation
from t5g2.models.config import ModelConfig
from t5g2.models.generation import Sampling, filter_logits, generate, stream
from t5g2.models.t5gemma2 import T5Gemma2, abstract_model, parameter_tree

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=64,
    mlp_dim=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    sliding_window=8,
    global_every=2,
    query_pre_attn_scalar=32.0,
    eoi_id=298,
)
PROMPT_LENGTHS = (13, 21, 5, 17)
# Never said by the models here when greedy; as many as other tests use, to share their programs.
NEVER = (1, 297, 298, 299)
TOP_K = 20


def randomised(config: ModelConfig, seed: int = 4) -> T5Gemma2:
    """A model that does not repeat itself at once, and of which no parameter is zero."""
    rng = np.random.default_rng(seed)

    def draw(path, parameter):
        std = {"scale": 0.3, "eoi_embedding": 0.3, "table": 0.02}.get(path[-1], 0.15)
        return parameter.replace(jnp.asarray(rng.normal(0, std, parameter.shape), jnp.float32))

    graph, shapes = nnx.split(abstract_model(config))
    return nnx.merge(graph, nnx.map_state(draw, shapes))


@pytest.fixture(scope="module")
def model():
    return randomised(CONFIG)


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf") / "model"
    export_hf(parameter_tree(model), model.config, directory)
    return transformers.T5Gemma2ForConditionalGeneration.from_pretrained(directory)


def prompts() -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of four prompts, padded right and left in turn."""
    rng = np.random.default_rng(1)
    ids = np.zeros((len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)), np.int32)
    mask = np.zeros_like(ids)
    for row, length in enumerate(PROMPT_LENGTHS):
        where = slice(0, length) if row % 2 == 0 else slice(ids.shape[1] - length, None)
        ids[row, where] = rng.integers(3, 297, length)
        mask[row, where] = 1
    return ids, mask


def generated_by_transformers(reference, ids, mask, max_new_tokens, eos_ids) -> np.ndarray:
    reference.generation_config.eos_token_id = list(eos_ids)
    out = reference.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return out[:, 1:].numpy()


@pytest.fixture(scope="module")
def greedy(model):
    ids, mask = prompts()
    return generate(model, ids, mask, max_new_tokens=200, eos_ids=NEVER)


def test_greedy_is_transformers_token_for_token_far_past_the_window(reference, greedy):
    ids, mask = prompts()
    theirs = generated_by_transformers(reference, ids, mask, 200, NEVER)
    assert theirs.shape == (4, 200)
    np.testing.assert_array_equal(greedy, theirs)
    assert len(np.unique(greedy)) > 50  # not a model that says one thing forever


def test_each_row_ends_at_eos_as_in_transformers(model, reference, greedy):
    ids, mask = prompts()
    eos_ids = (int(greedy[0, 3]), int(greedy[1, 12]), int(greedy[2, 7]), int(greedy[3, 25]))
    ours = generate(model, ids, mask, max_new_tokens=200, eos_ids=eos_ids)
    theirs = generated_by_transformers(reference, ids, mask, 200, eos_ids)
    ends = [next(t for t in range(200) if ours[row, t] in eos_ids) for row in range(4)]
    assert len(set(ends)) > 2
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(ours[row, end + 1 :], CONFIG.pad_id)


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        ({"sliding_window": 7, "num_layers": 5, "final_logit_softcap": 2.0}, 1e-5),
        ({"sliding_window": 100, "num_kv_heads": 1}, 1e-5),
        ({"dtype": "bfloat16", "num_layers": 2}, 0.1),
    ],
    ids=str,
)
def test_cached_logits_equal_those_of_the_whole_sequence_at_once(change, tolerance):
    config = dataclasses.replace(CONFIG, **change)
    model = randomised(config, seed=2)
    ids, mask = prompts()
    decoder_ids = np.random.default_rng(3).integers(3, 297, (4, 30))
    whole = np.asarray(jax.jit(lambda m: m(ids, decoder_ids, mask))(model))

    @jax.jit
    def stepped(model):
        decoder, cache = generation.prefill(model, jnp.asarray(ids), jnp.asarray(mask), 30)

        def step(cache, at):
            logits, cache = generation.next_logits(decoder, at[1], at[0], cache)
            return cache, logits

        return jax.lax.scan(step, cache, (jnp.arange(30), jnp.asarray(decoder_ids).T))[1]

    cached = np.swapaxes(np.asarray(stepped(model)), 0, 1)
    assert np.abs(cached - whole).max() / whole.std() < tolerance


def test_a_sliding_layer_keeps_its_window_and_a_global_one_everything(model):
    ids, mask = prompts()
    _, cache = jax.eval_shape(lambda *given: generation.prefill(*given, 64), model, ids, mask)
    assert [layer.key.shape[1] for layer in cache] == [8, 64, 8]


def test_weights_are_cast_before_the_first_step_and_norms_stay_float32():
    half = abstract_model(dataclasses.replace(CONFIG, dtype="bfloat16"))
    ids, mask = prompts()
    decoder, _ = jax.eval_shape(lambda *given: generation.prefill(*given, 64), half, ids, mask)
    weights = decoder.embedder, decoder.layers, decoder.final_norm
    for path, leaf in jax.tree.leaves_with_path(weights):
        is_norm = "scale" in jax.tree_util.keystr(path)
        assert leaf.dtype == ("float32" if is_norm else "bfloat16"), path


def test_nothing_is_computed_once_every_row_is_done(model, greedy):
    def seconds(eos_ids):
        ids, mask = prompts()
        start = time.perf_counter()
        generate(model, ids, mask, max_new_tokens=200, eos_ids=eos_ids)
        return time.perf_counter() - start

    at_once = tuple(int(token) for token in greedy[:, 0])
    assert min(seconds(at_once) for _ in range(5)) < 0.5 * min(seconds(NEVER) for _ in range(5))


def test_a_row_is_unmoved_by_the_batch_it_is_in(model, greedy):
    ids, _ = prompts()
    for row in (0, 2):
        length = PROMPT_LENGTHS[row]
        alone = generate(model, ids[row : row + 1, :length], max_new_tokens=200, eos_ids=NEVER)
        np.testing.assert_array_equal(alone[0], greedy[row])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=TOP_K, seed=5)])
def test_streaming_yields_what_generate_returns_and_then_stops(model, greedy, sampling):
    ids, mask = prompts()
    free = generate(model, ids, mask, max_new_tokens=200, sampling=sampling, eos_ids=NEVER)
    eos_ids = tuple(int(token) for token in free[:, 9])
    whole = generate(model, ids, mask, max_new_tokens=200, sampling=sampling, eos_ids=eos_ids)
    columns = list(stream(model, ids, mask, max_new_tokens=200, sampling=sampling, eos_ids=eos_ids))
    assert len(columns) <= 10
    np.testing.assert_array_equal(np.stack(columns, axis=1), whole[:, : len(columns)])
    assert np.all(whole[:, len(columns) :] == CONFIG.pad_id)
    unending = stream(model, ids, mask, max_new_tokens=200, sampling=sampling, eos_ids=NEVER)
    np.testing.assert_array_equal(np.stack(list(unending), axis=1), free)


def test_the_top_token_alone_is_greedy_at_any_temperature(model, greedy):
    ids, mask = prompts()
    sampling = Sampling(temperature=3.0, top_k=1, seed=9)
    ours = stream(model, ids, mask, max_new_tokens=200, sampling=sampling, eos_ids=NEVER)
    np.testing.assert_array_equal(np.stack(list(ours), axis=1), greedy)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    itertools.product([0.3, 1.0, 2.5], [None, 1, 7, 50], [None, 0.05, 0.5, 0.95]),
)
def test_filters_are_those_of_transformers(temperature, top_k, top_p):
    logits = np.random.default_rng(4).normal(0, 2, (6, 50)).astype(np.float32)
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    if top_k is not None:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    expected = torch.tensor(logits)
    for warper in warpers:
        expected = warper(None, expected)
    ours = filter_logits(jnp.asarray(logits), temperature=temperature, top_k=top_k, top_p=top_p)
    np.testing.assert_allclose(np.asarray(ours), expected.numpy(), rtol=1e-6)


def test_sampled_frequencies_are_the_probabilities_at_every_step():
    config = dataclasses.replace(
        CONFIG, vocab_size=24, hidden_size=16, mlp_dim=16, num_layers=2, head_dim=8, eoi_id=23
    )
    model, rows = randomised(config), 8192
    prompt = np.full((1, 3), 5)
    sampling = Sampling(temperature=0.8, top_p=0.9)
    drawn = generate(
        model, np.repeat(prompt, rows, axis=0), max_new_tokens=2, sampling=sampling, eos_ids=()
    )
    first = np.bincount(drawn[:, 0]).argmax()
    then = drawn[drawn[:, 0] == first, 1]
    logits = jax.jit(lambda m: m(prompt, jnp.asarray([[config.bos_id, first]])))(model)[0]
    kept = filter_logits(logits, temperature=sampling.temperature, top_p=sampling.top_p)
    for tokens, probabilities in zip((drawn[:, 0], then), jax.nn.softmax(kept), strict=True):
        expected = np.asarray(probabilities, np.float64) * len(tokens)
        counts = np.bincount(tokens, minlength=config.vocab_size)
        assert np.all(counts[expected == 0] == 0)
        possible = expected > 5  # what the chi-square approximation wants
        assert 3 < possible.sum() < config.vocab_size
        counts, expected = counts[possible], expected[possible]
        test = scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum())
        assert test.pvalue > 1e-3


def test_samples_follow_the_seed_and_the_row_not_the_neighbours(model):
    ids, mask = prompts()

    def sample(rows, streams=None, seed=0):
        return generate(
            model,
            ids[rows],
            mask[rows],
            max_new_tokens=200,
            sampling=Sampling(temperature=1.0, top_k=TOP_K, seed=seed),
            eos_ids=NEVER,
            streams=streams,
        )

    together = sample([0, 1, 2, 3])
    np.testing.assert_array_equal(sample([0, 1, 2, 3]), together)
    np.testing.assert_array_equal(sample([0, 3, 2])[[0, 2]], together[[0, 2]])
    np.testing.assert_array_equal(sample([3, 1, 2], streams=[3, 1, 2]), together[[3, 1, 2]])
    same_prompt = sample([0, 0, 0])
    assert np.any(same_prompt[0] != same_prompt[1])
    assert np.any(sample([0, 1, 2, 3], seed=1) != together)


def test_prompts_of_one_bucket_share_one_program(model, caplog):
    def run(rows, length, max_new_tokens, temperature, seed):
        ids = np.random.default_rng(length).integers(3, 297, (rows, length))
        sampling = Sampling(temperature=temperature, top_k=TOP_K, seed=seed)
        arguments = {"max_new_tokens": max_new_tokens, "sampling": sampling, "eos_ids": NEVER}
        generate(model, ids, **arguments)
        list(stream(model, ids, **arguments))

    run(3, 20, 140, 1.0, 0)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        run(4, 31, 200, 0.5, 7)
        assert not [r.message for r in caplog.records if r.message.startswith("Compiling")]
        jax.jit(lambda x: x + 1)(0)  # the log does show what is compiled
        assert [r.message for r in caplog.records if r.message.startswith("Compiling")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": np.array([[3, 300]])}, "input_ids: 300 is no token"),
        ({"input_ids": np.array([[3, -1]])}, "input_ids: -1 is no token"),
        ({"input_ids": np.array([3, 4])}, r"input_ids must be integers \[batch, length\]"),
        ({"input_ids": np.array([[3.5]])}, "input_ids must be integers"),
        ({"input_ids": np.zeros((0, 4), int)}, "not empty"),
        ({"attention_mask": np.ones((1, 3))}, "attention_mask"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"eos_ids": (1, 999)}, "eos_ids: 999 is no token"),
        ({"sampling": Sampling(temperature=1.0, top_k=301)}, r"top_k \(301\) exceeds"),
        ({"streams": np.arange(2)}, "streams must have one number for each of 1 rows"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream])
def test_a_wrong_argument_is_named(model, function, arguments, message):
    good = {"input_ids": np.array([[3, 4]]), "max_new_tokens": 4, "eos_ids": (1,)}
    with pytest.raises(UserError, match=message):
        function(model, **(good | arguments))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p must be above 0"),
        ({"seed": -1}, "seed must be between"),
        ({"top_k": 5}, "set temperature"),
        ({"top_p": 0.5}, "set temperature"),
    ],
)
def test_a_wrong_sampling_value_is_named(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(**values)
