"""Scoring and generating in batches by length: the numbers of one example at a time."""

import logging

import jax
import numpy as np
import pytest
from gemma_images import gemma_with_images, model_with_images
from PIL import Image

from t5g2.errors import UserError
from t5g2.models.generation import Sampling
from t5g2.models.vision import normalised
from t5g2.pretrained import Prompt
from t5g2.scoring import Scorer


@pytest.fixture(scope="module")
def model(tiny_tokenizer, tmp_path_factory):
    return model_with_images(
        gemma_with_images(tiny_tokenizer, tmp_path_factory.mktemp("gemma")), 28
    )


@pytest.fixture(scope="module")
def examples(model, tmp_path_factory):
    """Of many lengths, in no order; two with images."""
    rng = np.random.default_rng(3)
    lengths = [(20, 3), (5, 17), (31, 1), (16, 16), (17, 9), (7, 2), (3, 8)]
    made = [(Prompt(rng.integers(20, 900, n)), rng.integers(20, 900, m)) for n, m in lengths]
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    one, two = model.encode("A cat", [path]), model.encode("Cats, two", [path, path])
    return [*made[:4], (one, made[0][1]), *made[4:], (two, made[1][1])]


def alone(model, prompt, target):
    """Log-likelihoods of a target's tokens from logits of this example alone."""
    pixels = None
    if prompt.images is not None:
        pixels = np.moveaxis(np.asarray(normalised(prompt.images)), -1, 1)
    ids, mask, shifted = (np.zeros((1, 32), np.int32) for _ in range(3))  # one program for all
    ids[0, : len(prompt.ids)], mask[0, : len(prompt.ids)] = prompt.ids, 1
    shifted[0, : len(target)] = [model.config.bos_id, *target[:-1]]
    logits = model.logits(ids, shifted, mask, pixel_values=pixels)[0, : len(target)]
    logs = np.asarray(logits, np.float64)
    logs -= np.log(np.exp(logs).sum(axis=-1, keepdims=True))
    return logs[np.arange(len(target)), target]


@pytest.mark.parametrize("tokens_per_batch", [1, 16_384])
def test_scores_are_those_of_each_example_alone(model, examples, tokens_per_batch):
    told = []
    scorer = Scorer(model, tokens_per_batch=tokens_per_batch)
    scores = scorer.score(examples, told.append)
    assert told[-1] == len(examples)
    for (prompt, target), score in zip(examples, scores, strict=True):
        expected = alone(model, prompt, target)
        np.testing.assert_allclose(score.token_log_likelihoods, expected, atol=2e-5)
        assert score.log_likelihood == pytest.approx(expected.sum(), abs=1e-4)


def test_generations_are_those_of_each_prompt_alone_up_to_its_own_limit(model, examples):
    prompts = [prompt for prompt, _ in examples]
    limits = [3 + number for number in range(len(prompts))]  # one bucket
    made = Scorer(model).generate(prompts, limits)
    for prompt, limit, ids in zip(prompts, limits, made, strict=True):
        np.testing.assert_array_equal(ids, model.generate_ids([prompt], limit)[0])
    assert {len(ids) for ids in made} > {3, 4, 5}


def test_samples_do_not_depend_on_the_batches(model, examples):
    prompts = [prompt for prompt, _ in examples[1:4:2]] * 4
    sampling = Sampling(temperature=1.0, seed=5)
    made = Scorer(model).generate(prompts, 12, sampling)
    fewer = Scorer(model, most_rows=2).generate(prompts, 12, sampling)
    assert [ids.tolist() for ids in made] == [ids.tolist() for ids in fewer]
    assert made[0].tolist() != made[2].tolist()


def test_a_data_set_of_similar_lengths_compiles_once(model, caplog):
    def some(seed):
        rng = np.random.default_rng(seed)
        return [
            (Prompt(rng.integers(20, 900, n)), rng.integers(20, 900, n % 13 + 1))
            for n in rng.integers(33, 65, 11)
        ]

    scorer = Scorer(model, tokens_per_batch=400)
    scorer.score(some(0))
    scorer.generate([prompt for prompt, _ in some(0)], 9)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for seed in range(1, 4):
            scorer.score(some(seed))
            scorer.generate([prompt for prompt, _ in some(seed)], 16)
        assert not [r.message for r in caplog.records if r.message.startswith("Compiling")]


def test_what_cannot_be_scored_is_refused(model):
    scorer, prompt = Scorer(model), Prompt(np.array([2, 30]))
    with pytest.raises(UserError, match="a target has no tokens"):
        scorer.score([(prompt, np.array([], np.int32))])
    with pytest.raises(UserError, match="a prompt has token 5000, but the vocabulary has"):
        scorer.generate([Prompt(np.array([2, 5000]))], 4)
    with pytest.raises(UserError, match="max_new_tokens must be at least 1"):
        scorer.generate([prompt], 0)
    with pytest.raises(UserError, match="must be at least 1"):
        Scorer(model, tokens_per_batch=0)
