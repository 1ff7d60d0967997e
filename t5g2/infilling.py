"""Infillings: held-out passages with gaps, and what a model writes into them."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from t5g2.data.corpus import Corpus
from t5g2.data.image_examples import ImageExample, ImagePrefix
from t5g2.data.images import shortened
from t5g2.data.mixture import Source
from t5g2.data.packing import Content, is_sequential
from t5g2.data.sampling import Permutation, TaskChoice
from t5g2.data.ul2 import Bits, Denoiser, Example, SpecialTokens, philox
from t5g2.errors import UserError
from t5g2.files import append
from t5g2.pretrained import Pretrained, Prompt
from t5g2.reporting.pictures import data_url
from t5g2.reporting.samples import IN_TRAINING_FILE
from t5g2.settings import Settings


class Infillings:
    """Held-out passages, always the same ones, under the mixture's denoisers by their rates.

    Attributes:
        passages: of each, as a report shows it: task, input and target, as text with sentinels
            visible, and images, if it has some, as data URLs.
    """

    def __init__(self, corpus: Corpus, settings: Settings, count: int) -> None:
        """Draws at most `count` of them, of `finish.sample_tokens` tokens."""
        self._tokenizer = tokenizer = corpus.tokenizer
        mixture = corpus.mixture("heldout", settings.data)
        seed, choose = settings.data.seed, TaskChoice(mixture.rates, settings.data.seed)
        length = settings.finish.sample_tokens
        passages = [_passages(source, length, seed) for source in mixture.sources]
        self._prompts: list[Prompt] = []
        self._longest = 0
        self.passages: list[dict[str, Any]] = []
        for i in range(count):
            task = mixture.tasks[choose(0, i)]
            passage = next(passages[task.source], None)
            if passage is None:
                continue
            example = _denoised(task.denoiser, passage, philox(seed, i), mixture.special)
            self._prompts.append(Prompt(example.inputs, passage.images))
            self._longest = max(self._longest, len(example.targets))
            text = tokenizer.decode(example.inputs[mixture.special.bos_on_inputs :])
            shown: dict[str, Any] = {
                "task": task.name,
                "input": shortened(text),
                "target": tokenizer.decode(example.targets[:-1]),
            }
            if passage.images is not None:
                shown["images"] = [data_url(image) for image in passage.images]
            self.passages.append(shown)

    def predictions(self, model: Pretrained) -> list[str]:
        """What a model fills in greedily, for each passage, as text with sentinels visible."""
        if not self._prompts:
            return []
        made = model.generate_ids(self._prompts, self._longest)
        return [self._tokenizer.decode(ids) for ids in made]


def fill_in(model: Pretrained, infillings: Infillings) -> list[dict[str, Any]]:
    """The passages, each with the model's `prediction`."""
    predictions = infillings.predictions(model)
    return [
        passage | {"prediction": prediction}
        for passage, prediction in zip(infillings.passages, predictions, strict=True)
    ]


class InfillingsInTraining:
    """Appends to a file of the run directory what the weights of an evaluation fill in."""

    def __init__(self, run_dir: Path, corpus: Corpus, settings: Settings, step: int) -> None:
        """Draws `evaluation.samples` passages.

        Args:
            run_dir: where to write `IN_TRAINING_FILE`.
            corpus: the run's.
            settings: the run's.
            step: the step that the run goes on from; what was filled in later no longer counts.

        Raises:
            UserError: the run has several processes: one of them alone has not all weights.
        """
        self._path, self._corpus, count = run_dir / IN_TRAINING_FILE, corpus, 0
        # The kernels of training are for its packed rows.
        self._config = dataclasses.replace(settings.model, attention="auto")
        if count := settings.evaluation.samples:
            if jax.process_count() > 1:
                raise UserError(
                    f"evaluation.samples = {count} needs a run of one process, and this one has "
                    f"{jax.process_count()}: set it to 0"
                )
            self._infillings = Infillings(corpus, settings, count)
            self._append({"step": step, "passages": self._infillings.passages})
        self._wanted = count > 0

    def take(self, step: int, params: Any) -> None:
        """Fills in with these parameters, if the run is to."""
        if self._wanted:
            model = Pretrained(self._config, params, self._corpus.tokenizer, {})
            self._append({"step": step, "predictions": self._infillings.predictions(model)})

    def _append(self, record: dict[str, Any]) -> None:
        append(self._path, json.dumps(record) + "\n")


class _Passage(NamedTuple):
    """A stretch of a document, or a whole example with its images."""

    content: Content
    images: UInt8[np.ndarray, "M size size 3"] | None = None


def _denoised(
    denoiser: Denoiser | ImagePrefix, passage: _Passage, bits: Bits, special: SpecialTokens
) -> Example:
    if isinstance(denoiser, ImagePrefix):
        assert isinstance(passage.content, ImageExample)
        return denoiser(passage.content, special)
    assert isinstance(passage.content, np.ndarray)
    return denoiser(passage.content, bits, special)


def _passages(source: Source, length: int, seed: int) -> Iterator[_Passage]:
    """Of images each example once; of text stretches of `length` tokens.

    First of each document the first, then the second, and so on. Stored features are no images.
    """
    documents = source.documents
    size, shuffled = len(documents), not is_sequential(documents)

    def order() -> Iterator[int]:
        return map(Permutation(size, seed), range(size)) if shuffled else iter(range(size))

    if source.image_examples is not None:
        slot = source.image_examples.slot
        for number in order() if slot is None or slot.name == "images" else ():
            example = source.image_examples.example(number)
            if len(example.ids):
                images = source.image_examples.images(number) if example.images else None
                yield _Passage(example, images)
        return
    for start in itertools.count(0, length):
        found = False
        for number in order():
            passage = documents[number][start : start + length]
            if len(passage) == length:
                found = True
                yield _Passage(passage)
        if not found:
            return
