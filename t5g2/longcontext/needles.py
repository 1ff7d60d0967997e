"""Needles in a haystack: RULER's eight retrieval tasks (arXiv:2404.06654, section 3.1, table 2)."""

import dataclasses
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Literal

from t5g2.longcontext.draws import Draws
from t5g2.longcontext.haystack import NOISE, sentences
from t5g2.longcontext.material import Material
from t5g2.longcontext.problems import Problem, joined
from t5g2.longcontext.vocabulary import ADJECTIVES, NOUNS

Kind = Literal["words", "numbers", "uuids"]
# Where RULER hides needles in prose: 40 depths, evenly spread, in percent of the sentences.
DEPTHS = tuple(round(100 * i / 39) for i in range(40))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles:
    """One of the retrieval tasks.

    Attributes:
        hay: "text": the haystack; "noise": `NOISE` line by line; "needles": other needles.
        keys: what keys are.
        values: what values are.
        num_keys: keys that are hidden.
        num_values: values of each key.
        num_queries: keys that are asked for.
        digits: of a number.
    """

    hay: Literal["text", "noise", "needles"]
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    digits: int = 7

    def __call__(self, key: Sequence[object], material: Material, length: int) -> Problem:
        """See `families.Maker`; the length changes nothing."""
        draws = Draws(*key)
        count = max(self.num_keys, self.num_queries)
        keys = draws.distinct(partial(self._made, self.keys), count)
        values = [draws.distinct(partial(self._made, self.values), self.num_values) for _ in keys]
        needles = draws.shuffled(
            [self.needle(k, v) for k, own in zip(keys, values, strict=True) for v in own]
        )
        asked = draws.sample(range(len(keys)), self.num_queries)
        answers = tuple(value for i in asked for value in values[i])
        one = len(answers) == 1
        what = self.values.removesuffix("s") if one else self.values
        of = joined([keys[i] for i in asked])
        intro = (
            f"Hidden in the text below {'is a' if one else 'are some'} special magic {what}. "
            f"Remember {'it' if one else 'them'}: a question about the {what} follows the text.\n"
        )
        question = (
            f"\nWhat {'is' if one else 'are all'} the special magic {what} for {of} in the text "
            f"above? The special magic {what} for {of} in the text above {'is' if one else 'are'}"
        )
        text = material.text() if self.hay == "text" else None
        start = 0 if text is None else draws.below(len(text))
        hay: list[str] = []
        others = Draws(*key, "hay")

        def context(size: int) -> str:
            places = Draws(*key, "places")
            if text is not None:
                return among_sentences(text.text(start, size), needles, places)
            if self.hay == "noise":
                return "\n".join(among_lines(noise_lines(size), needles, places))
            while len(hay) < size:
                other = self._made(self.keys, others)
                if other not in keys:
                    hay.append(self.needle(other, self._made(self.values, others)))
            return "\n".join(among_lines(hay[:size], needles, places))

        # As many lines as needles: no two stand at the same place.
        least = {"text": 0, "noise": len(NOISE) * len(needles), "needles": len(needles)}
        return Problem(
            prompt=lambda size: intro + context(size) + question,
            least=least[self.hay],
            references=answers,
            answer=f" {joined(answers)}",
        )

    def needle(self, key: str, value: str) -> str:
        """The sentence that is hidden."""
        return f"One of the special magic {self.values} for {key} is: {value}."

    def _made(self, kind: Kind, draws: Draws) -> str:
        if kind == "words":
            return f"{draws.choice(ADJECTIVES)}-{draws.choice(NOUNS)}"
        if kind == "uuids":
            digits = draws.letters("0123456789abcdef", 32)
            return str(uuid.UUID(int=int(digits, 16), version=4))
        return draws.letters("123456789", 1) + draws.letters("0123456789", self.digits - 1)


def noise_lines(size: int) -> list[str]:
    """`NOISE` over and over, cut after `size` characters, line by line."""
    return (NOISE * (size // len(NOISE) + 1))[:size].splitlines()


def among_sentences(text: str, needles: Sequence[str], draws: Draws) -> str:
    """Hides needles in prose, in their order, at depths that are drawn from `DEPTHS`."""
    found = sentences(text)
    count = len(found)
    depths = sorted(draws.sample(DEPTHS, len(needles)))
    for depth, needle in reversed(list(zip(depths, needles, strict=True))):
        found.insert(count * depth // 100, needle)
    return " ".join(found)


def among_lines(lines: Sequence[str], needles: Sequence[str], draws: Draws) -> list[str]:
    """Hides needles, in their order, before as many different lines."""
    places = sorted(draws.sample(range(len(lines)), len(needles)))
    made = list(lines)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        made.insert(place, needle)
    return made


NEEDLE_TASKS = {
    "niah_single_1": Needles(hay="noise"),
    "niah_single_2": Needles(hay="text"),
    "niah_single_3": Needles(hay="text", values="uuids"),
    "niah_multikey_1": Needles(hay="text", num_keys=4),
    "niah_multikey_2": Needles(hay="needles"),
    "niah_multikey_3": Needles(hay="needles", keys="uuids", values="uuids"),
    "niah_multivalue": Needles(hay="text", num_values=4),
    "niah_multiquery": Needles(hay="text", num_queries=4),
}
