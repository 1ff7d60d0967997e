"""Lists of words: RULER's two tasks of aggregation (arXiv:2404.06654, section 3.3)."""

import math
import string
from collections.abc import Sequence

from t5g2.longcontext.draws import Draws
from t5g2.longcontext.material import Material
from t5g2.longcontext.problems import Problem
from t5g2.longcontext.vocabulary import ADJECTIVES, NOUNS

COMMON = 10
# Below this length words are repeated less often.
SHORT = 4096
# The exponent of the distribution of coded words; and what its terms k ** -2 add up to.
_ALPHA, _ZETA = 2, math.pi**2 / 6
_CODED_LETTERS = 6
_MOST_PAIRS = len(ADJECTIVES) * len(NOUNS) // 2
NOISE_WORD = "..."


def common_words(key: Sequence[object], material: Material, length: int) -> Problem:
    """A numbered list in which ten words are repeated more than the others: which are they?

    Each common word stands in it 30 times and each other one 3 times; at lengths below 4096 6 times
    and once. A short list with its answer stands before. The size is the number of other words.
    """
    draws = Draws(*key, "words")
    singles = draws.shuffled((*ADJECTIVES, *NOUNS))
    shown_words, shown_often, shown_seldom = (40, 10, 3) if length >= SHORT else (20, 3, 1)
    often, seldom = (30, 3) if length >= SHORT else (6, 1)
    # The demonstration has words of its own.
    shown, common, others = (
        singles[:shown_words],
        singles[shown_words : shown_words + COMMON],
        dict.fromkeys(singles[shown_words + COMMON :]),
    )
    demonstration = _listed(
        shown[:COMMON] * shown_often + shown[COMMON:] * shown_seldom, Draws(*key, "demonstration")
    )
    pairs = Draws(*key, "pairs")

    def prompt(size: int) -> str:
        while len(others) < size:
            # Long lists need more words than there are pairs.
            more = f"{pairs.choice(ADJECTIVES)}-" if len(others) > _MOST_PAIRS else ""
            others.setdefault(f"{more}{pairs.choice(ADJECTIVES)}-{pairs.choice(NOUNS)}")
        words = common * often + list(others)[:size] * seldom
        listed = _listed(words, Draws(*key, "order"))
        return f"{demonstration}{_numbered(shown[:COMMON])}\n\n{listed}"

    return Problem(
        prompt=prompt,
        least=1,
        references=tuple(common),
        answer=_numbered(common),
        closing="\n",
    )


def _listed(words: Sequence[str], draws: Draws) -> str:
    return (
        "Some words of the numbered list below occur more often than the others. Remember them.\n"
        f"{_numbered(draws.shuffled(words)).lstrip()}\n"
        f"Which {COMMON} words are the most common in the list above? The {COMMON} words that "
        "occur most often in the list above are:"
    )


def _numbered(words: Sequence[str]) -> str:
    return "".join(f" {number}. {word}" for number, word in enumerate(words, 1))


def frequent_words(key: Sequence[object], material: Material, length: int) -> Problem:
    """A text of made-up words of Zipfian frequencies: which three are the most frequent?

    Of n words in all the k-th most frequent stands there floor(n k^-2 / zeta(2)) times. The first
    one is dots, which are noise; the next three are asked for. There are `length` // 50 different
    words. The size is n.
    """
    draws = Draws(*key, "words")
    vocabulary = [
        NOISE_WORD,
        *draws.distinct(
            lambda draws: draws.letters(string.ascii_lowercase, _CODED_LETTERS),
            max(length // 50, 5) - 1,
        ),
    ]
    asked = tuple(vocabulary[1:4])

    def prompt(size: int) -> str:
        words = [
            word
            for rank, word in enumerate(vocabulary, 1)
            for _ in range(int(size * rank**-_ALPHA / _ZETA))
        ]
        return (
            "Count how often each coded word occurs in the text below, and find the three most "
            f"frequent ones. The dots '{NOISE_WORD}' are no words.\n"
            f"{' '.join(Draws(*key, 'order').shuffled(words))}\n"
            "Which three coded words are the most frequent in the text above? The three most "
            "frequent coded words in the text above are:"
        )

    return Problem(
        prompt=prompt,
        # From here on the fourth and the fifth word, and so all before, differ in their numbers.
        least=math.ceil(_ZETA / (4**-_ALPHA - 5**-_ALPHA)),
        references=asked,
        answer=f" {' '.join(asked)}",
        closing="\n",
    )
