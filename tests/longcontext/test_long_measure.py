"""Measuring a model: intervals worked by hand, a model that knows the answers, and the job."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx

from t5g2 import cli
from t5g2.longcontext.curves import Point, interval, plot, table
from t5g2.longcontext.families import FAMILIES
from t5g2.longcontext.haystack import Haystack
from t5g2.longcontext.material import Material, Question
from t5g2.longcontext.measure import measure
from t5g2.models.config import TINY
from t5g2.models.t5gemma2 import T5Gemma2, parameter_tree
from t5g2.pretrained import Pretrained
from t5g2.scoring import Score, Scorer


@pytest.mark.parametrize(
    ("right", "wrong", "low", "high"),
    # Wilson's interval, from Newcombe (Statistics in Medicine 17, 1998), table I, method 3.
    [
        (81, 182, 0.2553, 0.3662),
        (15, 133, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 28, 0.0061, 0.1718),
    ],
)
def test_the_interval_of_a_share_is_wilsons(right, wrong, low, high):
    assert interval([1.0] * right + [0.0] * wrong) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_of_other_scores_is_that_of_resampled_means():
    scores = [0.0, 0.25, 0.5, 0.75, 1.0] * 20
    low, high = interval(scores)
    # The mean's standard error: the variance is 0.125, of 100 scores.
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.0354, 0.5 + 1.96 * 0.0354), abs=0.01)
    assert interval(scores) == (low, high)
    assert interval([0.5] * 10) == (0.5, 0.5)


class Oracle:
    """In place of a `Scorer`: writes what the test says, for prompts as the model encodes them."""

    def __init__(self, tokenizer, answer):
        self.model = Pretrained.__new__(Pretrained)
        self.model.tokenizer, self.model.config = tokenizer, TINY
        self.answer, self.prompts = answer, []

    def score(self, examples):
        self.targets = [target for _, target in examples]
        return [Score(np.linspace(0, -1, len(target), dtype=np.float32)) for target in self.targets]

    def generate(self, prompts, room):
        self.prompts += prompts
        right = [target[1:] for target in self.targets]
        return [self.answer(ids)[:most] for ids, most in zip(right, room, strict=True)]


@pytest.fixture(scope="module")
def material(standard_library) -> Material:
    questions = (Question("Who?", ("Ann",), "It was Ann."), Question("When?", ("Noon",), "Noon."))
    text = "\n".join(standard_library(100_000))
    return Material(haystack=Haystack("library", text), questions=questions)


@pytest.mark.parametrize("family", FAMILIES)
def test_who_knows_every_answer_scores_one_and_who_is_silent_nothing(
    family, tiny_tokenizer, material
):
    sentinel = [tiny_tokenizer.sentinel_ids[0]]
    knowing = Oracle(tiny_tokenizer, lambda ids: np.concatenate([sentinel, ids]))
    point = measure(knowing, family, 1500, 3, material)
    assert (point.score, point.high) == (1.0, 1.0)
    assert [len(prompt.ids) for prompt in knowing.prompts] == pytest.approx([point.tokens] * 3, 0.1)
    assert all(len(prompt.ids) <= 1500 for prompt in knowing.prompts)
    # Of each answer the mean of its own tokens: 0 is the sentinel's, which does not count.
    means = [
        np.mean(np.linspace(0, -1, len(target), dtype=np.float32)[1:]) for target in knowing.targets
    ]
    assert point.log_likelihood == pytest.approx(np.mean(means))
    silent = Oracle(tiny_tokenizer, lambda ids: ids[:0])
    assert measure(silent, family, 1500, 3, material).score == 0.0


def test_charts_of_equal_curves_are_equal_files(tmp_path):
    points = [
        Point(
            family="vt", length=n, tokens=n, examples=9, score=1 / i, low=0.1, high=1.0,
            log_likelihood=-0.5,
        )
        for i, n in enumerate((1024, 2048, 4096), 1)
    ]  # fmt: skip
    for name in ("a.svg", "b.svg", "a.png"):
        plot({"vt": points, "vt, factor 8": points}, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.svg").read_bytes().count(b"<path") > 20
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"vt +2048 +0.500  0.100 to 1.000 +0.500 +9$", table(points), re.MULTILINE)


@pytest.fixture
def untrained(tiny_tokenizer, monkeypatch):
    """`t5g2 long_context` finds a model with random weights wherever it is told to look."""
    config = dataclasses.replace(TINY, vocab_size=1000, num_layers=2, global_every=2)
    params = jax.tree.map(np.asarray, parameter_tree(T5Gemma2(config, rngs=nnx.Rngs(0))))
    model = Pretrained(config, params, tiny_tokenizer, {})
    monkeypatch.setattr("t5g2.long_context.load", lambda path: model)
    return model


def job(*more: object) -> int:
    return cli.main(["long_context", "--checkpoint", "x", *map(str, more)])


@pytest.mark.slow
def test_the_job_prints_curves_and_writes_them(untrained, tmp_path, capsys):
    out = tmp_path / "curves"
    wanted = ["--families", "niah_single_1", "--lengths", 400, 256, "--examples", 2, "--out", out]
    assert job(*wanted) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[1:]] == [["niah_single_1", "256"], ["niah_single_1", "400"]]
    written = json.loads((out / "long_context.json").read_text())
    assert [point["length"] for point in written["curves"]] == [256, 400]
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4
    assert all(re.fullmatch(r"\d{7}", answer["references"][0]) for answer in answers)
    # Random weights know nothing: about ln 1000 nats a token.
    assert all(-9 < point["log_likelihood"] < -math.log(1000) / 2 for point in written["curves"])
    assert (out / "long_context.svg").stat().st_size > 1000
    # The same again, and with other positions something else.
    scores = []
    for factor in ((), (), ("--rope_factor_global", 8)):
        assert job(*wanted, *factor) == 0
        again = json.loads((out / "long_context.json").read_text())
        scores.append([point["log_likelihood"] for point in again["curves"]])
    assert scores[0] == scores[1] == [point["log_likelihood"] for point in written["curves"]]
    assert scores[2] != scores[0]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--families", "niah_singel_1"], "no niah_singel_1; did you mean 'niah_single_1'"),
        (["--families", "niah_single_2"], "niah_single_2: needs text to hide things in"),
        (["--families", "qa"], "qa: needs questions"),
        (["--families", "cwe", "--lengths", "64"], "cwe: needs at least"),
        (["--haystack", "corpus"], "does not say what it was trained on"),
        (["--haystack", "/nothing"], "haystack /nothing cannot be read"),
        (["--rope_factor_global", "0"], "must be above 0"),
        (["--examples", "0"], "must be at least 1"),
    ],
)
def test_mistakes_are_told_in_one_line(untrained, more, problem, capsys):
    assert job(*more) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_the_model_itself_scores_what_its_scorer_scores(untrained, tiny_tokenizer, material):
    point = measure(Scorer(untrained), "vt", 1200, 2, material, form="infill")
    assert point.score == 0.0
    assert point.log_likelihood < -3
