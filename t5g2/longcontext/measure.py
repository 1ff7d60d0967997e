"""A model's answers to problems of long context, and how right they are."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from t5g2.longcontext.curves import Point, interval
from t5g2.longcontext.families import FAMILIES, make_example
from t5g2.longcontext.material import Material
from t5g2.longcontext.problems import Form, LongExample
from t5g2.pretrained import Prompt
from t5g2.scoring import Scorer

# Room for an answer: the right one's tokens, and these more.
_SPARE_TOKENS = 8


def measure(
    scorer: Scorer,
    family: str,
    length: int,
    count: int,
    material: Material,
    *,
    seed: int = 0,
    form: Form = "prefix",
    record: Callable[[dict[str, Any]], None] = lambda answer: None,
) -> Point:
    """Scores the greedy answers to the first examples of a family at a length.

    Args:
        scorer: runs the model.
        family: one of `FAMILIES`.
        length: encoder tokens that an example may have.
        count: how many examples.
        material: what they are made of.
        seed: of the examples.
        form: see `problems.encoder_text`.
        record: told each example and its answer, as JSON values.

    Raises:
        UserError: no example of this family is as short, or material is missing.
    """
    tokenizer = scorer.model.tokenizer
    examples = [
        make_example(family, index, length, tokenizer, material, seed=seed, form=form)
        for index in range(count)
    ]
    prompts = [scorer.model.encode(example.inputs) for example in examples]
    right = [tokenizer.encode(example.answer) for example in examples]
    likelihoods = _log_likelihoods(scorer, prompts, right)
    room = [len(ids) + _SPARE_TOKENS for ids in right]
    made = scorer.generate(prompts, room)
    answers = [tokenizer.decode(ids, skip_special=True) for ids in made]
    scores = [
        FAMILIES[family].score(answer, example.references)
        for answer, example in zip(answers, examples, strict=True)
    ]
    for example, answer, score in zip(examples, answers, scores, strict=True):
        record(_recorded(example, answer, score))
    low, high = interval(scores)
    return Point(
        family=family,
        length=length,
        tokens=statistics.fmean(example.tokens for example in examples),
        examples=count,
        score=statistics.fmean(scores),
        low=low,
        high=high,
        log_likelihood=statistics.fmean(likelihoods),
    )


def _log_likelihoods(
    scorer: Scorer, prompts: Sequence[Prompt], right: Sequence[np.ndarray]
) -> list[float]:
    """Of each right answer, in nats a token: of its own tokens, given the sentinel before them."""
    sentinel = [scorer.model.tokenizer.sentinel_ids[0]]
    targets = [np.concatenate([sentinel, ids]).astype(np.int32) for ids in right]
    scores = scorer.score(list(zip(prompts, targets, strict=True)))
    return [float(np.mean(score.token_log_likelihoods[1:])) for score in scores]


def _recorded(example: LongExample, answer: str, score: float) -> dict[str, Any]:
    kept = dataclasses.asdict(example)
    # The text is as long as asked for, and (seed, family, index, length) make it again.
    del kept["inputs"]
    return {**kept, "said": answer, "score": score}
