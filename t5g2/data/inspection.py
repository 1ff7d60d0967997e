"""What a model is shown: a summary of a run's first batches, for people to look at."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Int

from t5g2.data.image_examples import ImagePrefix
from t5g2.data.mixture import Mixture, TokenSource
from t5g2.data.oddities import Oddity, find_oddities
from t5g2.data.packing import Piece, RowStream
from t5g2.data.sampling import TaskChoice
from t5g2.data.tokenizer import Tokenizer
from t5g2.data.ul2 import Denoiser
from t5g2.data.watched import Note, WatchedDocuments, byte_pieces
from t5g2.errors import UserError

# One id so often in a row is an image, where there are images.
_IMAGE_RUN = 16


class Lengths(NamedTuple):
    """Tokens on both sides of an example."""

    inputs: int
    targets: int


class Part(NamedTuple):
    """A stretch of an example as text.

    Attributes:
        kind: "sentinel" of a hidden span; "special": bos or eos; "image": the places of one.
        text: its text or the name of its piece.
        number: of the sentinel, or of the image in the example.
    """

    kind: Literal["text", "sentinel", "special", "image"]
    text: str
    number: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """An example to look at.

    Attributes:
        source: the name of its source.
        denoiser: and of its denoiser.
        document: number of its document.
        start: its first token there.
        length: how many it takes.
        tokens: on both sides.
        inputs: as text.
        targets: as text.
        images: as a batch has them, uint8 pixels [I, size, size, 3] or features [I, N, W]; None: it
            has none.
    """

    source: str
    denoiser: str
    document: int
    start: int
    length: int
    tokens: Lengths
    inputs: tuple[Part, ...]
    targets: tuple[Part, ...]
    images: np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The examples of a task, denoiser, source or language.

    Attributes:
        name: of the group.
        rate: which share of the examples it should have.
        share: which it has.
        tokens: of documents in its examples.
        lengths: tokens on both sides of each example.
        sentinels: of each example.
    """

    name: str
    rate: float
    share: float
    tokens: int
    lengths: Int[np.ndarray, "examples 2"]
    sentinels: Int[np.ndarray, " examples"]

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self.lengths)


class SourceFacts(NamedTuple):
    """What is known of a source apart from the batches.

    Attributes:
        language: of its text.
        tokens: of all its documents in the split; None: they were not counted.
        bad_records: how many of its records were passed over.
    """

    language: str | None = None
    tokens: int | None = None
    bad_records: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSummary:
    """A source.

    Attributes:
        group: its examples.
        facts: what else is known of it.
        documents: how many it has in the split.
        read: notes on those that were read for the batches, by number.
        epochs: how often the whole run shows each of its documents, at the pace of these batches;
            None if that cannot be said.
    """

    group: Group
    facts: SourceFacts
    documents: int
    read: dict[int, Note]
    epochs: float | None

    @property
    def byte_share(self) -> float:
        """Share of the tokens read that stand for single bytes."""
        tokens = sum(note.tokens for note in self.read.values())
        return sum(note.byte_tokens for note in self.read.values()) / max(tokens, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """The first batches of a run.

    Attributes:
        batches: how many.
        rows: rows of them together.
        room: inputs and targets that a row has room for.
        total_steps: length of the run; None: not known.
        describe: of each denoiser a phrase on what it hides.
        shown: the examples to look at.
        denoisers: examples by denoiser.
        sources: the sources.
        languages: examples by language, of sources that have one.
        packed: mean shares of the rows that hold tokens or padding.
        unpacked: the same if every example had a row to itself.
        examples_in_row: on average.
        documents_in_row: different ones, on average and at most.
        oddities: what may be wrong, and what was looked for and is not.
    """

    batches: int
    rows: int
    room: Lengths
    total_steps: int | None
    describe: dict[str, str]
    shown: tuple[Shown, ...]
    denoisers: tuple[Group, ...]
    sources: tuple[SourceSummary, ...]
    languages: tuple[Group, ...]
    packed: dict[str, float]
    unpacked: dict[str, float]
    examples_in_row: float
    documents_in_row: tuple[float, int]
    oddities: tuple[Oddity, ...]

    @property
    def examples(self) -> int:
        """Examples in all batches."""
        return sum(group.examples for group in self.denoisers)


def summarise(
    mixture: Mixture,
    tokenizer: Tokenizer,
    *,
    rows: int,
    inputs_length: int,
    targets_length: int,
    seed: int,
    examples: int,
    batches: int,
    images_per_row: int = 0,
    total_steps: int | None = None,
    about: Callable[[str], SourceFacts] = lambda name: SourceFacts(),
    cursors: Int[np.ndarray, "rows cursor"] | None = None,
) -> Summary:
    """Makes the first batches of a run, or some later ones, and says what they are like.

    Args:
        mixture: what the run is trained on.
        tokenizer: what its documents were tokenised with.
        rows: rows of a global batch.
        inputs_length: encoder tokens in a row.
        targets_length: decoder tokens in a row.
        seed: the run's data seed.
        examples: how many examples of each denoiser, and of each source, to show.
        batches: how many batches the figures are taken from.
        images_per_row: images that a row has room for.
        total_steps: steps of the whole run.
        about: what else is known of a source, by name; asked when the batches have been made.
        cursors: of the rows before these batches; None: the beginning.

    Raises:
        UserError: `rows` or `batches` below 1, or data that no row can be made of.
    """
    for name, value in (("rows", rows), ("batches", batches)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    is_byte = byte_pieces(tokenizer)
    watched = [WatchedDocuments(s.documents, tokenizer, is_byte) for s in mixture.sources]
    mixture = dataclasses.replace(
        mixture,
        sources=tuple(
            dataclasses.replace(source, documents=cast(TokenSource, documents))
            for source, documents in zip(mixture.sources, watched, strict=True)
        ),
    )
    stream = RowStream(mixture, rows, inputs_length, targets_length, seed, images_per_row)
    packed = list(_rows(stream, stream.start() if cursors is None else cursors.copy(), batches))
    read = [dict(documents.notes) for documents in watched]  # reading for other ends adds more
    pieces = list(itertools.chain(*packed))
    facts = [about(source.name) for source in mixture.sources]
    names = [mixture.sources[task.source].name for task in stream.tasks]
    languages = {
        source.name: known.language for source, known in zip(mixture.sources, facts, strict=True)
    }
    by_source = _groups(stream, pieces, names)
    sources = tuple(
        SourceSummary(
            group=by_source[source.name],
            facts=known,
            documents=len(source.documents),
            read=notes,
            epochs=_epochs(by_source[source.name].tokens / batches, known.tokens, total_steps),
        )
        for source, known, notes in zip(mixture.sources, facts, read, strict=True)
    )
    by_denoiser = _groups(stream, pieces, [task.denoiser.name for task in stream.tasks])
    documents = [len({(stream.tasks[p.task].source, p.document) for p in row}) for row in packed]
    used = [[sum(len(p.example[side]) for p in row) for side in (0, 1)] for row in packed]
    return Summary(
        batches=batches,
        rows=len(packed),
        room=Lengths(*stream.room),
        total_steps=total_steps,
        describe={task.denoiser.name: describe_denoiser(task.denoiser) for task in stream.tasks},
        shown=tuple(
            _shown(stream, piece, tokenizer) for piece in _chosen(stream, pieces, examples)
        ),
        denoisers=tuple(by_denoiser.values()),
        sources=sources,
        languages=tuple(_groups(stream, pieces, [languages[name] for name in names]).values()),
        packed=_filling(used, stream.room),
        unpacked=_filling(_unpacked(stream, len(pieces), seed), stream.room),
        examples_in_row=len(pieces) / len(packed),
        documents_in_row=(float(np.mean(documents)), max(documents)),
        oddities=tuple(
            find_oddities(
                stream,
                packed,
                dict(zip(languages, read, strict=True)),
                {name: known.bad_records for name, known in zip(languages, facts, strict=True)},
            )
        ),
    )


def describe_denoiser(denoiser: Denoiser | ImagePrefix) -> str:
    """What a denoiser hides."""
    if isinstance(denoiser, ImagePrefix):
        return "the text behind the prompt hidden"
    hidden = f"{denoiser.corruption_rate:.0%} hidden"
    if denoiser.mean_span is None:
        return f"{hidden}, one span at the end"
    return f"{hidden}, spans of {denoiser.mean_span:g} tokens on average"


def histogram(
    lengths: Int[np.ndarray, " n"], room: int, bins: int
) -> tuple[list[int], list[float]]:
    """Counts of lengths from 0 to `room` in bins of one width, and the bins' edges."""
    counts, edges = np.histogram(lengths, bins, (0, room))
    return counts.tolist(), edges.tolist()


def _rows(
    stream: RowStream, cursors: Int[np.ndarray, "rows cursor"], batches: int
) -> Iterator[list[Piece]]:
    for _ in range(batches):
        for row in range(stream.rows):
            pieces, cursors[row] = stream.next_row(row, cursors[row])
            yield pieces


def _groups(
    stream: RowStream, pieces: Sequence[Piece], names: Sequence[str | None]
) -> dict[str, Group]:
    """Examples by a name that each task has, or lacks."""
    own: dict[str, list[Piece]] = {name: [] for name in names if name is not None}
    for piece in pieces:
        if (name := names[piece.task]) is not None:
            own[name].append(piece)
    rates = stream.mixture.rates
    return {
        name: Group(
            name=name,
            rate=float(sum(rates[i] for i, other in enumerate(names) if other == name)),
            share=len(found) / len(pieces),
            tokens=sum(piece.length for piece in found),
            lengths=np.array([list(map(len, p.example)) for p in found], int).reshape(-1, 2),
            sentinels=np.array([_sentinels(stream, piece) for piece in found], int),
        )
        for name, found in own.items()
    }


def _sentinels(stream: RowStream, piece: Piece) -> int:
    block, targets = stream.mixture.special.sentinel_ids, piece.example.targets
    return int(((targets >= block.start) & (targets < block.stop)).sum())


def _epochs(tokens_a_step: float, tokens: int | None, total_steps: int | None) -> float | None:
    if not tokens or total_steps is None:
        return None
    return tokens_a_step * total_steps / tokens


def _chosen(stream: RowStream, pieces: Sequence[Piece], count: int) -> list[Piece]:
    """The first examples, so that there are `count` of each denoiser and of each source."""
    seen: dict[object, int] = {}
    chosen = []
    for piece in pieces:
        task = stream.tasks[piece.task]
        keys = (task.denoiser.name, task.source)
        if any(seen.get(key, 0) < count for key in keys):
            chosen.append(piece)
            for key in keys:
                seen[key] = seen.get(key, 0) + 1
    return chosen


def _shown(stream: RowStream, piece: Piece, tokenizer: Tokenizer) -> Shown:
    task = stream.tasks[piece.task]
    inputs, targets = (_parts(stream, piece, ids, tokenizer) for ids in piece.example)
    return Shown(
        source=stream.mixture.sources[task.source].name,
        denoiser=task.denoiser.name,
        document=piece.document,
        start=piece.start,
        length=piece.length,
        tokens=Lengths(*map(len, piece.example)),
        inputs=inputs,
        targets=targets,
        images=stream.piece_images(piece.task, piece.document) if piece.images else None,
    )


def _parts(
    stream: RowStream, piece: Piece, ids: Int[np.ndarray, " n"], tokenizer: Tokenizer
) -> tuple[Part, ...]:
    """An example's side as text, divided at what is none: by ids, whatever the text spells out."""
    special = stream.mixture.special
    parts: list[Part] = []
    text: list[int] = []
    images = 0

    def end_text() -> None:
        if text:
            parts.append(Part("text", tokenizer.decode(text)))
            text.clear()

    for token, run in itertools.groupby(ids.tolist()):
        count = sum(1 for _ in run)
        if token in special.sentinel_ids:
            end_text()
            parts.append(
                Part("sentinel", tokenizer.decode([token]), token - special.sentinel_ids.start)
            )
        elif token in (special.bos_id, special.eos_id):
            end_text()
            parts.append(Part("special", tokenizer.decode([token])))
        elif piece.images and count >= _IMAGE_RUN:
            end_text()
            parts.append(Part("image", f"{tokenizer.decode([token])} × {count}", images))
            images += 1
        else:
            text += [token] * count
    end_text()
    return tuple(parts)


def _unpacked(stream: RowStream, count: int, seed: int) -> list[Lengths]:
    """Lengths of as many examples of row 0 if each had a row to itself."""
    mixture, choose = stream.mixture, TaskChoice(stream.mixture.rates, seed)
    draws = [itertools.count() for _ in mixture.sources]
    remaining = [0] * len(mixture.sources)
    lengths = []
    for j in range(count):
        task = stream.tasks[choose(0, j)]
        source = mixture.sources[task.source]
        while not remaining[task.source]:
            number = stream.document_number(task.source, 0, next(draws[task.source]))
            remaining[task.source] = len(source.documents[number])
        if isinstance(task.denoiser, ImagePrefix):
            assert source.image_examples is not None
            remaining[task.source] = 0
            example = source.image_examples.example(number)
            lengths.append(Lengths(*task.denoiser.lengths(example, mixture.special)))
            continue
        longest = task.denoiser.longest(*stream.room, mixture.special)
        length = min(remaining[task.source], longest)
        remaining[task.source] -= length
        lengths.append(Lengths(*task.denoiser.lengths(length, mixture.special)))
    return lengths


def _filling(used: Sequence[Sequence[int]], room: tuple[int, int]) -> dict[str, float]:
    """Mean shares of rows that hold tokens, or padding."""
    lengths = np.array(used)
    shares = lengths / np.array(room)
    inputs, targets = shares.mean(0).tolist()
    both = float(lengths.sum(1).mean()) / sum(room)
    return {
        "inputs filled": inputs,
        "targets filled": targets,
        "both sides filled": both,
        "fuller side filled": float(shares.max(1).mean()),
        "padding in inputs": 1 - inputs,
        "padding in targets": 1 - targets,
        "padding in both": 1 - both,
    }
