"""What a run is trained on: sources, their denoisers and the rates at which they are mixed."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import numpy as np
from jaxtyping import Float64, Int

from t5g2.data.image_examples import ImageExamples, ImagePrefix, ImageSlot
from t5g2.data.ul2 import T5GEMMA2_UL2, Denoiser, SpecialTokens, denoisers_from
from t5g2.errors import UserError


class TokenSource(Protocol):
    """Documents by number, as token ids; reading one twice gives the same.

    A source that cannot be read at random, only forward, says so by an attribute
    `sequential = True`: its documents then come in its own order.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Int[np.ndarray, " n"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Documents and the denoisers that examples of them may get.

    Attributes:
        name: what it is called in metrics.
        documents: its tokenised documents, or examples with prompts of their own.
        denoisers: with their weights relative to one another; of
            examples with a prompt of their own one `ImagePrefix`.
        weight: the source's rate relative to the other sources'.
    """

    name: str
    documents: TokenSource | ImageExamples
    denoisers: tuple[Denoiser, ...] | tuple[ImagePrefix] = T5GEMMA2_UL2
    weight: float = 1.0

    @property
    def image_examples(self) -> ImageExamples | None:
        """The documents, if they are examples with prompts, such as images."""
        return cast(ImageExamples, self.documents) if hasattr(self.documents, "slot") else None


@dataclasses.dataclass(frozen=True)
class Task:
    """One source (by number) under one denoiser: what the mixture's rates speak of."""

    name: str
    source: int
    denoiser: Denoiser | ImagePrefix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Sources mixed by rate. Its tasks are the pairs of a source and one of its denoisers."""

    sources: tuple[Source, ...]
    special: SpecialTokens

    @property
    def tasks(self) -> list[Task]:
        """All pairs of source and denoiser; of a lone source the denoiser's name is enough."""
        alone = len(self.sources) == 1
        return [
            Task(denoiser.name if alone else f"{source.name}/{denoiser.name}", number, denoiser)
            for number, source in enumerate(self.sources)
            for denoiser in source.denoisers
        ]

    @property
    def rates(self) -> Float64[np.ndarray, " tasks"]:
        """Share of each task in the examples; they add up to 1."""
        shares = [
            source.weight * denoiser.weight / sum(d.weight for d in source.denoisers)
            for source in self.sources
            for denoiser in source.denoisers
        ]
        return np.array(shares) / sum(shares)

    @property
    def image_slot(self) -> ImageSlot | None:
        """What a batch holds of an image; None: no source has images.

        Raises:
            UserError: sources have images in different forms.
        """
        examples = [source.image_examples for source in self.sources]
        slots = {example.slot for example in examples if example is not None and example.slot}
        if len(slots) > 1:
            raise UserError(f"the sources' images differ in kind: {sorted(slots)}")
        return slots.pop() if slots else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How documents become rows.

    Attributes:
        inputs_length: encoder tokens in a row (S).
        targets_length: decoder tokens in a row (T).
        images_per_row: images that a row has room for, where the mixture has a source of them (I).
        denoisers: the name of a preset ("t5gemma2": T5Gemma 2's five; "ul2": UL2's seven;
            "ul2_with_modes": these with the mode tokens [R], [S] and [X]), or dictionaries with the
            settings of `Denoiser`.
        bos_on_inputs: whether each example's encoder input starts with bos, as Gemma's tokenizer
            does at inference.
        seed: of the order of documents, the choice of denoisers and the noise.
        workers: processes that make the rows of a host (at most one for each of its rows), whose
            number changes nothing else; 0: a thread of the training process makes them.
    """

    inputs_length: int
    targets_length: int
    images_per_row: int = 0
    denoisers: str | tuple[Mapping[str, Any], ...] = "t5gemma2"
    bos_on_inputs: bool = True
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("images_per_row", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")

    def made_denoisers(self) -> tuple[Denoiser, ...]:
        """The denoisers that the settings name."""
        return denoisers_from(self.denoisers)


def check_lengths(mixture: Mixture, inputs_length: int, targets_length: int) -> None:
    """Refuses sequence lengths that no example fits in or that need sentinels that do not exist.

    Raises:
        UserError: naming the denoiser.
    """
    for task in mixture.tasks:
        denoiser = task.denoiser
        if denoiser.mode is not None and not denoiser.mode_ids:
            raise UserError(
                f"denoiser {denoiser.name}: the tokens of mode {denoiser.mode!r} are not known; "
                "make the mixture with t5g2.data.ul2.with_mode_ids"
            )
        if isinstance(denoiser, ImagePrefix):
            continue
        longest = denoiser.longest(inputs_length, targets_length, mixture.special)
        wanted = 1 if denoiser.mean_span is None else round(denoiser.mean_span)
        shortest = max(int(wanted / denoiser.corruption_rate), 2)
        if longest < shortest:
            needs = denoiser.lengths(shortest, mixture.special)
            raise UserError(
                f"data.inputs_length = {inputs_length}, data.targets_length = {targets_length}: "
                f"too short for denoiser {denoiser.name}, one span of which needs at least "
                f"{needs[0]} inputs and {needs[1]} targets"
            )
        spans, sentinels = denoiser.counts(longest)[1], len(mixture.special.sentinel_ids)
        if spans > sentinels:
            raise UserError(
                f"denoiser {denoiser.name} needs {spans} sentinels at lengths {inputs_length} and "
                f"{targets_length} but the vocabulary has {sentinels}: shorten data.inputs_length "
                "or data.targets_length, or use a tokenizer with more sentinels"
            )


def iterate_documents(source: TokenSource | ImageExamples) -> Iterator[Int[np.ndarray, " n"]]:
    """All documents of a source once, in its own order."""
    return (source[i] for i in range(len(source)))
