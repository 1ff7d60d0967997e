"""What a problem is, and fitting one to a length in tokens."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Literal

from t5g2.data.tokenizer import Tokenizer
from t5g2.errors import UserError

Form = Literal["prefix", "infill"]
FORMS: tuple[Form, ...] = ("prefix", "infill")
# Stands where the answer is to be written; `t5g2.pretrained.Pretrained.encode` reads it.
SENTINEL = "<sentinel_0>"
# How many units further a size is looked for that comes closer to a length.
_NEAR = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A question about a context that can be made as long as one likes.

    Attributes:
        prompt: of a size (characters, words, documents or rounds, from `least` on) the
            text up to where the answer begins. The same question with the same answer at any size.
        least: the smallest size.
        references: what an answer is compared to.
        answer: the text that the decoder should write, beginning with its space.
        closing: what follows the answer where the encoder sees what is behind it.
    """

    prompt: Callable[[int], str]
    least: int
    references: tuple[str, ...]
    answer: str
    closing: str = ".\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongExample:
    """A problem at one length.

    Attributes:
        family: name of its kind.
        index: its number in the family.
        length: encoder tokens that it may have.
        tokens: that it has, bos and sentinel included.
        size: of the problem.
        inputs: what the encoder reads, with `SENTINEL` where the answer is.
        answer: as a problem's.
        references: as a problem's.
    """

    family: str
    index: int
    length: int
    tokens: int
    size: int
    inputs: str
    answer: str
    references: tuple[str, ...]


def encoder_text(prompt: str, closing: str, form: Form) -> str:
    """What the encoder reads.

    As "prefix" the prompt and then the sentinel, as UL2's prefix language modelling has it; as
    "infill" the sentinel stands in the text, which goes on behind it, as in span corruption. In
    both the decoder writes the sentinel, the answer and eos.
    """
    return f"{prompt}{SENTINEL}{closing if form == 'infill' else ''}"


def count_tokens(tokenizer: Tokenizer, inputs: str) -> int:
    """Encoder tokens of a text with `SENTINEL` in it: bos, both parts, and the sentinel."""
    parts = re.split(re.escape(SENTINEL), inputs)
    return 1 + sum(len(tokenizer.encode(part)) for part in parts) + len(parts) - 1


def fit(problem: Problem, tokenizer: Tokenizer, length: int, form: Form) -> tuple[str, int, int]:
    """The problem as long as it gets in `length` encoder tokens.

    One more unit of filler would be too long. Where filler is measured in characters, the length is
    hit exactly, or where a character is several tokens, rarely, missed by one.

    Returns:
        What the encoder reads, its tokens, and the size.

    Raises:
        UserError: even without filler it is longer.
    """

    def made(size: int) -> tuple[str, int]:
        text = encoder_text(problem.prompt(size), problem.closing, form)
        return text, count_tokens(tokenizer, text)

    low, (best, tokens) = problem.least, made(problem.least)
    if tokens > length:
        raise UserError(f"needs at least {tokens} tokens, more than the length {length}")
    # Tokens grow nearly in proportion to the size: from each size that was tried, guess the one
    # that hits the length, until a size fits and the next one does not.
    high: int | None = None
    rate = 1.0
    while high is None or high - low > 1:
        guess = low + max(round((length - tokens) / rate), 1)
        if high is None:
            # The rate is not known yet, and a size far too large would take long to make.
            guess = min(guess, 2 * low + 64)
        else:
            # Halving now and then ends the search where the guesses creep.
            guess = min(max(guess, low + (high - low) // 8, low + 1), high - 1)
        text, count = made(guess)
        if count > length:
            high = guess
            rate = max((count - tokens) / (guess - low), rate)
        else:
            if guess > low and count > tokens:
                rate = (count - tokens) / (guess - low)
            low, best, tokens = guess, text, count
    # A character may add two tokens, and the next one take one back.
    chosen, size = low, low + 1
    while tokens < length and size - low <= _NEAR:
        text, count = made(size)
        if tokens < count <= length:
            best, tokens, chosen = text, count, size
        elif count > length + _NEAR:
            break
        size += 1
    return best, tokens, chosen


def joined(values: Sequence[str]) -> str:
    """Values as a list in a sentence: "a", "a and b", "a, b, and c"."""
    if len(values) < 3:
        return " and ".join(values)
    return f"{', '.join(values[:-1])}, and {values[-1]}"
