"""Many examples through one model: log-likelihoods of targets, and generations, in batches.

Examples are batched with others of similar length, padded to powers of two, so that a data set of
any size needs a handful of compiled programs. Results come in the order of the examples.

    scorer = Scorer(t5g2.load("runs/mine/export"))
    scores = scorer.score([(prompt, answer_ids), ...])
    answers = scorer.generate(prompts, max_new_tokens=32)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Shaped

from t5g2.errors import UserError
from t5g2.models.generation import GREEDY, SHORTEST, Sampling, bucket
from t5g2.models.stack import Tokens
from t5g2.models.t5gemma2 import T5Gemma2
from t5g2.models.vision import images_by_row
from t5g2.pretrained import Pretrained, Prompt, right_padded


class Score(NamedTuple):
    """How likely a target is.

    Attributes:
        token_log_likelihoods: of each of its tokens, given those before it, in nats.
    """

    token_log_likelihoods: Float32[np.ndarray, " n"]

    @property
    def log_likelihood(self) -> float:
        """Of the whole target, in nats, added up in float64."""
        return float(np.sum(self.token_log_likelihoods, dtype=np.float64))


class Scorer:
    """Scores and generates with one model, in batches by length.

    Attributes:
        model: the model.
    """

    def __init__(
        self, model: Pretrained, *, tokens_per_batch: int = 16_384, most_rows: int = 64
    ) -> None:
        """Takes a model.

        Args:
            model: it.
            tokens_per_batch: padded encoder and decoder tokens of a batch; an example that has
                more is a batch of its own.
            most_rows: examples of a batch, at most.

        Raises:
            UserError: either number is below 1.
        """
        if tokens_per_batch < 1 or most_rows < 1:
            raise UserError("tokens_per_batch and most_rows must be at least 1")
        self.model = model
        self._tokens_per_batch = tokens_per_batch
        self._most_rows = most_rows

    def score(
        self,
        examples: Sequence[tuple[Prompt, Int[np.ndarray, " n"]]],
        done: Callable[[int], None] = lambda count: None,
    ) -> list[Score]:
        """Teacher-forced log-likelihoods.

        Args:
            examples: what the encoder reads, and the target's token ids, which are those of
                `Tokenizer.encode` with eos behind them if the end is to count; the decoder's bos is
                added here.
            done: told how many examples are done, after each batch.

        Raises:
            UserError: an empty prompt or target, a token that the vocabulary lacks, or images that
                the model cannot read.
        """
        for prompt, target in examples:
            self._check("a prompt", prompt.ids)
            self._check("a target", target)
        sizes = [(len(prompt.ids), len(target)) for prompt, target in examples]
        scores: dict[int, Score] = {}
        for numbers, rows in self._batches(sizes):
            batch = [examples[number] for number in numbers]
            logs = self._score_batch(batch, rows)
            for number, (_, target), row in zip(numbers, batch, logs, strict=False):
                scores[number] = Score(row[: len(target)])
            done(len(scores))
        return [scores[number] for number in range(len(examples))]

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int | Sequence[int],
        sampling: Sampling = GREEDY,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[Int[np.ndarray, " n"]]:
        """Generates after each prompt until eos, which is left out.

        Args:
            prompts: what the encoder reads.
            max_new_tokens: of all, or of each.
            sampling: how tokens are chosen; the n-th prompt's draws are those of stream n, however
                the prompts are batched.
            done: told how many prompts are done, after each batch.

        Raises:
            UserError: as `score`; a limit below 1.
        """
        for prompt in prompts:
            self._check("a prompt", prompt.ids)
        limits = (
            [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        )
        sizes = [(len(p.ids), limit) for p, limit in zip(prompts, limits, strict=True)]
        made: dict[int, Int[np.ndarray, " n"]] = {}
        for numbers, _ in self._batches(sizes):
            rows = self.model.generate_ids(
                [prompts[number] for number in numbers],
                max(limits[number] for number in numbers),
                sampling,
                streams=np.array(numbers),
            )
            for number, row in zip(numbers, rows, strict=True):
                made[number] = row[: limits[number]]
            done(len(made))
        return [made[number] for number in range(len(prompts))]

    def _batches(self, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[list[int], int]]:
        """Numbers of the examples of each batch, shortest first; and the rows that it is to have.

        Args:
            sizes: encoder and decoder tokens of each example.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for number, (inputs, targets) in enumerate(sizes):
            lengths = bucket(inputs, SHORTEST), bucket(targets, SHORTEST)
            groups.setdefault(lengths, []).append(number)
        for lengths, members in sorted(groups.items()):
            fit = max(min(self._tokens_per_batch // sum(lengths), self._most_rows), 1)
            rows = min(1 << (fit.bit_length() - 1), bucket(len(members), 1))
            for start in range(0, len(members), rows):
                yield members[start : start + rows], rows

    def _score_batch(
        self, batch: Sequence[tuple[Prompt, Int[np.ndarray, " n"]]], rows: int
    ) -> Float32[np.ndarray, "B T"]:
        """Log-likelihoods of the targets' tokens, of padding as well."""
        config, pad_id = self.model.config, self.model.tokenizer.pad_id
        spare = [np.array([config.bos_id], np.int32)] * (rows - len(batch))
        inputs, mask = right_padded([p.ids for p, _ in batch] + spare, pad_id, SHORTEST)
        targets, target_mask = right_padded([t for _, t in batch] + spare, pad_id, SHORTEST)
        images = [prompt.images for prompt, _ in batch if prompt.images is not None]
        by_row: Shaped[np.ndarray, "B I size size 3"] | None = None
        if images:
            by_row = images_by_row(config, inputs, np.concatenate(images))
            extra = bucket(by_row.shape[1], 1) - by_row.shape[1]
            by_row = np.pad(by_row, ((0, 0), (0, extra), (0, 0), (0, 0), (0, 0)))
        return np.asarray(
            _log_likelihoods(self.model.model, inputs, mask, targets, target_mask, by_row)
        )

    def _check(self, what: str, ids: Int[np.ndarray, " n"]) -> None:
        if not len(ids):
            raise UserError(f"{what} has no tokens")
        size = self.model.config.vocab_size
        if min(ids) < 0 or max(ids) >= size:
            outside = next(token for token in ids if not 0 <= token < size)
            raise UserError(f"{what} has token {outside}, but the vocabulary has {size}")


@jax.jit
def _log_likelihoods(
    model: T5Gemma2,
    inputs: Int[Array, "B S"],
    mask: Int[Array, "B S"],
    targets: Int[Array, "B T"],
    target_mask: Int[Array, "B T"],
    images: Shaped[Array, "B I size size 3"] | None,
) -> Float[Array, "B T"]:
    """Of each target token, given the inputs and the targets before it, in nats, float32."""

    def places(mask: Int[Array, "B n"]) -> Tokens:
        return Tokens(mask, jnp.broadcast_to(jnp.arange(mask.shape[1]), mask.shape))

    visual = None if images is None else model.visual_tokens(images)
    memory = model.encode(inputs, places(mask), visual)
    shifted = jnp.roll(targets, 1, axis=1).at[:, 0].set(model.config.bos_id)
    hidden = model.decode(shifted, places(target_mask), memory)
    return -model.token_losses(hidden, targets)
