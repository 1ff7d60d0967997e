"""Variable tracking: RULER's multi-hop task (arXiv:2404.06654, section 3.2)."""

import dataclasses
import string
from collections.abc import Callable, Sequence
from itertools import pairwise

from t5g2.longcontext.draws import Draws
from t5g2.longcontext.haystack import NOISE
from t5g2.longcontext.material import Material
from t5g2.longcontext.needles import among_lines, noise_lines
from t5g2.longcontext.problems import Problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableTracking:
    """Chains of assignments X1 = value, X2 = X1, ... in noise: which variables hold the value?

    A small problem with its answer stands before, as RULER has it, for models that only continue
    text.

    Attributes:
        chains: how many, of which the first is asked for.
        hops: assignments of a chain after its first.
    """

    chains: int = 1
    hops: int = 4

    def __call__(self, key: Sequence[object], material: Material, length: int) -> Problem:
        """See `families.Maker`; noise stands for the haystack, and the length changes nothing."""
        least = len(NOISE) * self.chains * (self.hops + 1)
        # Names of another length, so that none of the demonstration's is an answer.
        shown, shown_names = self._posed((*key, "demonstration"), 3)
        posed, names = self._posed((*key, "problem"), 5)
        demonstration = f"{shown(least)} {' '.join(shown_names)}\n\n"
        return Problem(
            prompt=lambda size: demonstration + posed(size),
            least=least,
            references=tuple(names),
            answer=f" {' '.join(names)}",
            closing="\n",
        )

    def _posed(
        self, key: Sequence[object], letters: int
    ) -> tuple[Callable[[int], str], Sequence[str]]:
        """A problem's prompt by size, and the names that are its answer."""
        draws = Draws(*key)
        hold = self.hops + 1
        every = draws.distinct(
            lambda draws: draws.letters(string.ascii_uppercase, letters), self.chains * hold
        )
        values = draws.distinct(
            lambda draws: draws.letters("123456789", 1) + draws.letters(string.digits, 4),
            self.chains,
        )
        names = [every[hold * chain : hold * (chain + 1)] for chain in range(self.chains)]
        statements = [
            iter(
                [f"VAR {own[0]} = {value}"]
                + [f"VAR {name} = VAR {before}" for before, name in pairwise(own)]
            )
            for own, value in zip(names, values, strict=True)
        ]
        # Each chain in its order, among those of the others.
        turns = draws.shuffled([chain for chain in range(self.chains) for _ in range(hold)])
        lines = [next(statements[chain]) for chain in turns]
        question = (
            f"\nWhich variables are assigned the value {values[0]} in the text above, directly or "
            f"through other variables? By the assignments in the text above, {hold} variables "
            f"hold the value {values[0]}:"
        )

        def prompt(size: int) -> str:
            hidden = among_lines(noise_lines(size), lines, Draws(*key, "places"))
            return (
                "Follow the assignments of variables that are hidden in the text below.\n"
                + "\n".join(hidden)
                + question
            )

        return prompt, names[0]
