"""Tokens that are there already, written and read as t5g2 caches documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from rows import Documents

from t5g2.data.cache import CachedDocuments
from t5g2.data.cache_format import PARTIAL_DIR, to_record, token_dtype
from t5g2.data.cache_writing import CacheWriter, Part, Written


class Tokenised(Part):
    """Documents that are tokens instead of text."""

    def written(self, documents: range, tokenizer: Any, bad: Any) -> Iterator[Written]:
        """As `Part.written`, without tokenising."""
        dtype = token_dtype(tokenizer.vocab_size)
        for index in documents:
            ids = self.texts[index]
            yield Written(to_record(ids, dtype), len(ids), 0, ids)


class _Vocabulary:
    """All that a writer asks of a tokenizer that has nothing to do."""

    vocab_size = 262_144


def cached(documents: Documents, directory: Path) -> CachedDocuments:
    """Writes the shards of documents to a new directory and opens them as a run does."""
    (directory / PARTIAL_DIR).mkdir(parents=True)
    part = Tokenised(split="train", source="text", texts=documents)
    tokenizer = cast(Any, _Vocabulary())
    writer = CacheWriter(directory=directory, parts=(part,), tokenizer=tokenizer)
    shards = []
    for todo in writer.todo():
        writer.write(todo, lambda documents, tokens: None)
        note = writer.note(todo)
        assert note is not None
        shards.append(note[0])
    return CachedDocuments(directory, shards, token_dtype(tokenizer.vocab_size))
