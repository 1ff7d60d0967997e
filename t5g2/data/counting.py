"""What a corpus holds: counts of its documents, and a sample of its text for a tokenizer."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from t5g2.data.images import image_tokens
from t5g2.data.sentencepiece_trainer import sample_chunks
from t5g2.data.sources.documents import LONGEST_ENCODED, encode
from t5g2.data.sources.image_text import ImageDocuments, ImageTexts
from t5g2.data.sources.mixture_file import MixtureSpec
from t5g2.data.sources.opening import SPLITS, AnyDocuments, TextSource
from t5g2.data.tokenizer import Tokenizer

# Texts are tokenised together, on all cores: up to so many, of about so many characters.
_BATCH_TEXTS, _BATCH_CHARACTERS = 256, 1 << 20
# Seconds between two lines on how far the counting is.
_NEWS_EVERY = 30.0


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a split of a source holds.

    Attributes:
        documents: how many.
        characters: of their text.
        ids: how often each token occurs.
        image_tokens: places of images, which are no text.
    """

    documents: int
    characters: int
    ids: Int64[np.ndarray, " vocabulary"]
    image_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.ids.sum()) + self.image_tokens

    def facts(self) -> dict[str, int]:
        """As JSON values."""
        return {
            "documents": self.documents,
            "characters": self.characters,
            "tokens": self.tokens,
        }


def count(
    source: TextSource, split: str, tokenizer: Tokenizer, message: Callable[[str], None]
) -> Counts:
    """Reads and tokenises all documents of a split once, in their order.

    Args:
        source: whose documents.
        split: "train" or "heldout".
        tokenizer: what counts the tokens.
        message: told now and then how far it is.

    Raises:
        UserError: what reading them raises.
    """
    documents = characters = 0
    ids = np.zeros(tokenizer.vocab_size, np.int64)
    last_news = time.monotonic()
    for more_documents, more_characters, batches in _tokenised(source.documents[split], tokenizer):
        documents, characters = documents + more_documents, characters + more_characters
        for tokens in batches:
            ids += np.bincount(tokens, minlength=len(ids))
        if time.monotonic() - last_news > _NEWS_EVERY:
            last_news = time.monotonic()
            message(f"{source.name}: {documents:,} documents, {ids.sum():,} tokens so far")
    return Counts(documents, characters, ids, _taken_out(ids, source.documents[split]))


def _tokenised(
    documents: AnyDocuments, tokenizer: Tokenizer
) -> Iterator[tuple[int, int, Iterable[Int[np.ndarray, " n"]]]]:
    """Of some documents at a time their number, their characters and their tokens."""
    if isinstance(documents, ImageDocuments):
        examples = ImageTexts(documents, tokenizer)
        for start in range(0, len(documents), _BATCH_TEXTS):
            numbers = range(start, min(start + _BATCH_TEXTS, len(documents)))
            ids = np.concatenate([examples[i] for i in numbers])
            yield len(numbers), sum(len(documents[i]) for i in numbers), [ids]
        return
    for texts in _batches(documents.iterate()):
        yield len(texts), sum(map(len, texts)), _encoded(texts, tokenizer)


def _taken_out(ids: Int64[np.ndarray, " vocabulary"], documents: AnyDocuments) -> int:
    """How often the image token occurs; in `ids` it does not any more."""
    if not isinstance(documents, ImageDocuments):
        return 0
    image_id = image_tokens(documents.model).image_id
    count, ids[image_id] = int(ids[image_id]), 0
    return count


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == _BATCH_TEXTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[Int[np.ndarray, " n"]]:
    """The tokens of the texts: of all short ones together, then of each long one."""
    short = [text for text in texts if len(text) <= LONGEST_ENCODED]
    if short:
        yield np.concatenate(tokenizer.encode_batch(short))
    for text in texts:
        if len(text) > LONGEST_ENCODED:
            yield encode(text, tokenizer)


def unigram_entropy(counts: Sequence[Counts], weights: Sequence[float]) -> float:
    """Entropy of a token drawn from sources by their weights, in nats."""
    shares = np.zeros(len(counts[0].ids))
    for of_source, weight in zip(counts, weights, strict=True):
        shares += weight * of_source.ids / max(of_source.ids.sum(), 1)
    if not shares.sum():
        return 0.0
    shares = shares[shares > 0] / shares.sum()
    return abs(-float(np.sum(shares * np.log(shares))))


def tokenizer_sample(
    sources: Sequence[TextSource], mixture: MixtureSpec, max_bytes: int
) -> Iterable[str]:
    """Training text of all sources in proportion to their rates, for a tokenizer.

    There are no tokens to weigh by yet: characters stand for them. A source that has less text
    than its share gives all it has. One pass, holding at most twice `max_bytes`.
    """
    if len(sources) == 1:
        return sources[0].documents["train"].iterate()
    chunks: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for source in sources:
        sizes[source.name] = 0

        def measured(source: TextSource = source) -> Iterator[str]:
            for text in source.documents["train"].iterate():
                sizes[source.name] += len(text)
                yield text

        chunks[source.name] = sample_chunks(measured(), max_bytes)
        weights = mixture.weights({spec.name: 0 for spec in mixture.sources} | sizes)
        total = sum(weights[name] for name in chunks)
        # A sample of a sample is one: each source's share only gets smaller.
        chunks = {
            name: sample_chunks(own, int(max_bytes * weights[name] / total))
            for name, own in chunks.items()
        }
    return [chunk for own in chunks.values() for chunk in own]


def corpus_facts(
    mixture: MixtureSpec, by_source: Mapping[str, dict[str, Any]], train: Sequence[Counts]
) -> dict[str, Any]:
    """What a run keeps of all sources together, as JSON values.

    Args:
        mixture: how they are mixed.
        by_source: of each source what `facts_of` gives, in the order of the mixture.
        train: counts of their training documents, in the same order.
    """
    totals = {
        split: {
            what: sum(facts[split][what] for facts in by_source.values())
            for what in ("documents", "characters", "tokens")
        }
        for split in SPLITS
    }
    weights = mixture.weights({name: facts["train"]["tokens"] for name, facts in by_source.items()})
    return {
        **totals,
        "bad_records": sum(facts["bad_records"] for facts in by_source.values()),
        "unigram_entropy": unigram_entropy(train, [weights[name] for name in by_source]),
        "sources": dict(by_source),
    }


def facts_of(source: TextSource, counts: dict[str, Counts]) -> dict[str, Any]:
    """What a run keeps of a source, as JSON values."""
    return {
        "language": source.spec.language,
        **{split: of_split.facts() for split, of_split in counts.items()},
        "bad_records": source.bad.count(source.name),
    }
