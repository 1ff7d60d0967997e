"""All kinds of problems by name, and making an example of one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from t5g2.data.tokenizer import Tokenizer
from t5g2.errors import UserError
from t5g2.longcontext.answering import question_answering
from t5g2.longcontext.material import Material
from t5g2.longcontext.needles import NEEDLE_TASKS
from t5g2.longcontext.problems import Form, LongExample, Problem, fit
from t5g2.longcontext.rounds import ROUND_TASKS
from t5g2.longcontext.scores import match_all, match_part, ratio_after_mark
from t5g2.longcontext.tracking import VariableTracking
from t5g2.longcontext.words import common_words, frequent_words


class Maker(Protocol):
    """Makes a problem: the same from equal arguments.

    Args:
        key: determines all choices.
        material: what it is made of.
        length: encoder tokens that it will be fitted to, on which some definitions depend.

    Raises:
        UserError: material is missing.
    """

    def __call__(self, key: Sequence[object], material: Material, length: int) -> Problem: ...


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of problem.

    Attributes:
        make: makes one.
        score: how right an answer is, from 0 to 1, given the references.
    """

    make: Maker
    score: Callable[[str, Sequence[str]], float] = match_all


FAMILIES: dict[str, Family] = {
    **{name: Family(make) for name, make in NEEDLE_TASKS.items()},
    "vt": Family(VariableTracking()),
    "cwe": Family(common_words),
    "fwe": Family(frequent_words),
    "qa": Family(question_answering, match_part),
    **{name: Family(make, ratio_after_mark) for name, make in ROUND_TASKS.items()},
}


def make_example(
    family: str,
    index: int,
    length: int,
    tokenizer: Tokenizer,
    material: Material,
    *,
    seed: int = 0,
    form: Form = "prefix",
) -> LongExample:
    """The `index`-th example of a family at a length.

    Args:
        family: one of `FAMILIES`.
        index: its number.
        length: encoder tokens that it may have, bos, prompt and sentinel included.
        tokenizer: counts the tokens.
        material: what it is made of.
        seed: (seed, family, index, length) determine all choices.
        form: see `problems.encoder_text`.

    Raises:
        UserError: no example of this family is as short, or material is missing.
    """
    try:
        problem = FAMILIES[family].make((seed, family, index, length), material, length)
        inputs, tokens, size = fit(problem, tokenizer, length, form)
    except UserError as error:
        raise UserError(f"{family}: {error}") from None
    return LongExample(
        family=family,
        index=index,
        length=length,
        tokens=tokens,
        size=size,
        inputs=inputs,
        answer=problem.answer,
        references=problem.references,
    )
