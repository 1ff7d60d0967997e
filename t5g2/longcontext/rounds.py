"""Multi-round reference: Michelangelo's MRCR (arXiv:2409.12640, section 3.2), as OpenAI asks it."""

import dataclasses
import string
from collections.abc import Sequence

from t5g2.longcontext.draws import Draws
from t5g2.longcontext.haystack import sentences
from t5g2.longcontext.material import Material
from t5g2.longcontext.problems import Problem
from t5g2.longcontext.vocabulary import ADJECTIVES, NOUNS

KINDS = ("poem", "letter", "speech", "riddle", "recipe", "story", "report", "song")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
# Characters of a reply, about.
_REPLY = 300
_MARK = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiRound:
    """A conversation in which the same is asked for several times: give back the n-th reply.

    Each round asks for a kind of text about a topic. `needles` rounds ask for the same kind and
    topic, in random places among rounds that ask for other pairs of these. The answer is one of
    their replies, behind a random mark that shows whether the instruction was followed.

    Attributes:
        needles: rounds that ask for the same.
    """

    needles: int

    def __call__(self, key: Sequence[object], material: Material, length: int) -> Problem:
        """See `families.Maker`; replies are stretches of the haystack, the size is the rounds."""
        text = material.text()
        draws = Draws(*key)
        kind, topic = draws.choice(KINDS), draws.choice(NOUNS)
        wanted = draws.below(self.needles)
        mark = draws.letters(string.ascii_letters + string.digits, _MARK)
        replies = Draws(*key, "replies")

        def reply(kind: str, topic: str) -> str:
            found = sentences(text.text(replies.below(len(text)), _REPLY))
            body = " ".join(found[:-1] or found).rstrip()
            return f"{replies.choice(ADJECTIVES).capitalize()} {topic}, a {kind}.\n{body}"

        needles = draws.distinct(lambda _: reply(kind, topic), self.needles)
        others: list[str] = []

        def prompt(size: int) -> str:
            while len(others) < size:
                other = replies.choice(KINDS), replies.choice(NOUNS)
                if other != (kind, topic):
                    others.append(_round(*other, reply(*other)))
            rounds = others[: size - self.needles]
            places = sorted(Draws(*key, "places").sample(range(size), self.needles))
            for place, needle in zip(places, needles, strict=True):
                rounds.insert(place, _round(kind, topic, needle))
            return (
                f"{''.join(rounds)}User: Put {mark} before the {ORDINALS[wanted]} {kind} about "
                f"{topic}, and give nothing else.\nAssistant:"
            )

        answer = f"{mark}{needles[wanted]}"
        return Problem(
            prompt=prompt,
            least=self.needles,
            references=(answer, mark),
            answer=f" {answer}",
            closing="\n",
        )


def _round(kind: str, topic: str, reply: str) -> str:
    return f"User: Write a {kind} about {topic}.\nAssistant: {reply}\n\n"


ROUND_TASKS = {f"mrcr_{needles}": MultiRound(needles=needles) for needles in (2, 4, 8)}
