"""A corpus of several sources: counts, rates, tokenizer, rows, resuming, seqio Tasks."""

import contextlib
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from source_files import write_array_record, write_jsonl, write_mixture, write_parquet

from t5g2.data.corpus import (
    Corpus,
    TokenizerConfig,
    open_corpus,
    prepare_corpus,
    reopen_corpus,
    row_stream,
)
from t5g2.data.counting import tokenizer_sample
from t5g2.data.mixture import DataConfig
from t5g2.data.sources import CorpusConfig, open_sources
from t5g2.data.sources.mixture_file import read_mixture
from t5g2.errors import UserError

DATA = DataConfig(inputs_length=256, targets_length=128)
TOKENIZER = TokenizerConfig(vocab_size=360, sentinels=64)
# A language of their own each: what comes from where can be told.
TEXTS = {
    "alpha": [f"aa ab ba bb {i} " * 12 for i in range(400)],
    "beta": [f"cc cd dc dd {i} " * 6 for i in range(100)],
    "gamma": [f"ee ef fe ff {i} " * 6 for i in range(50)],
}
SOURCES = (
    {"name": "alpha", "path": "alpha.jsonl", "language": "xa"},
    {"name": "beta", "path": "beta.parquet", "denoisers": ["prefix_75", "span3_15"]},
    {"name": "gamma", "path": "gamma.jsonl.zst", "language": "xc"},
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("mixed")
    write_jsonl(home / "alpha.jsonl", TEXTS["alpha"])
    write_parquet(home / "beta.parquet", TEXTS["beta"])
    write_jsonl(home / "gamma.jsonl.zst", TEXTS["gamma"])
    return home


def config(home: Path, *sources: dict, temperature: float = 2.0, **settings) -> CorpusConfig:
    file = write_mixture(home / "mixture.toml", *(sources or SOURCES), temperature=temperature)
    return CorpusConfig(mixture=str(file), heldout_share=0.1, **settings)


def prepared(config: CorpusConfig, run: Path, tokenizer: TokenizerConfig = TOKENIZER) -> Corpus:
    return prepare_corpus(config, tokenizer, run, lambda _: contextlib.nullcontext())


@pytest.fixture(scope="module")
def corpus(home) -> Corpus:
    return prepared(config(home), home / "run")


def test_facts_are_of_each_source_and_of_all(corpus):
    assert list(corpus.facts["sources"]) == ["alpha", "beta", "gamma"]
    for name, facts in corpus.facts["sources"].items():
        (source,) = (source for source in corpus.sources if source.name == name)
        for split, documents in source.documents.items():
            texts = list(documents)
            assert facts[split] == {
                "documents": len(texts),
                "characters": sum(map(len, texts)),
                "tokens": sum(len(corpus.tokenizer.encode(text)) for text in texts),
            }
        assert sum(facts[split]["documents"] for split in source.documents) == len(TEXTS[name])
    assert [facts["language"] for facts in corpus.facts["sources"].values()] == ["xa", None, "xc"]
    for split in ("train", "heldout"):
        for what, total in corpus.facts[split].items():
            assert total == sum(f[split][what] for f in corpus.facts["sources"].values())
    assert corpus.counts()["documents"] == corpus.facts["train"]["documents"]
    assert json.loads(json.dumps(corpus.facts)) == corpus.facts


def test_rates_follow_the_training_tokens_and_the_temperature(corpus):
    tokens = [f["train"]["tokens"] for f in corpus.facts["sources"].values()]
    mixture = corpus.mixture("train", DATA)
    shares = Counter()
    for task, rate in zip(mixture.tasks, mixture.rates, strict=True):
        shares[mixture.sources[task.source].name] += rate
    expected = np.sqrt(tokens) / np.sqrt(tokens).sum()
    assert list(shares.values()) == pytest.approx(expected)
    assert [task.name for task in mixture.tasks if task.source == 1] == [
        "beta/prefix_75",
        "beta/span3_15",
    ]


def test_the_entropy_is_that_of_the_mixture(corpus):
    shares = Counter()
    for source, weight in corpus.weights().items():
        (found,) = (found for found in corpus.sources if found.name == source)
        counts = Counter(
            token
            for text in found.documents["train"]
            for token in corpus.tokenizer.encode(text).tolist()
        )
        for token, count in counts.items():
            shares[token] += weight / 3 * count / counts.total()
    entropy = -sum(share * math.log(share) for share in shares.values())
    assert corpus.facts["unigram_entropy"] == pytest.approx(entropy)


def test_rows_hold_every_source_at_its_rate(corpus):
    stream = row_stream(corpus, "train", DATA, rows=4)
    cursors, found = stream.start(), Counter()
    for _ in range(150):
        for row in range(4):
            pieces, cursors[row] = stream.next_row(row, cursors[row])
            for piece in pieces:
                source = stream.mixture.sources[stream.tasks[piece.task].source].name
                found[source] += 1
    weights = corpus.weights()
    for name, count in found.items():
        assert count / found.total() == pytest.approx(weights[name] / 3, abs=0.01)


@pytest.mark.parametrize("temperature", [1.0, 1e6])
def test_a_tokenizer_is_trained_on_the_sources_in_proportion_to_their_rates(home, temperature):
    chosen = config(home, temperature=temperature)
    mixture = read_mixture(chosen)
    sample = "".join(tokenizer_sample(open_sources(chosen), mixture, 6000))
    letters = {"alpha": "a", "beta": "c", "gamma": "e"}
    counts = {name: sample.count(letter) for name, letter in letters.items()}
    sizes = {name: sum(map(len, texts)) ** (1 / temperature) for name, texts in TEXTS.items()}
    for name in TEXTS:
        share = counts[name] / sum(counts.values())
        assert share == pytest.approx(sizes[name] / sum(sizes.values()), abs=0.04)
    assert 4500 < len(sample.encode()) <= 6000
    for piece in ("aa", "cd"):
        assert piece in sample


def test_a_run_is_reopened_with_what_it_knows(home, corpus, monkeypatch):
    monkeypatch.setattr("t5g2.data.corpus.count", lambda *_: pytest.fail("counted again"))
    again = reopen_corpus(config(home), home / "run")
    assert again.facts == corpus.facts
    assert again.weights() == corpus.weights()
    assert len(again.sources[2].documents["train"]) == len(corpus.sources[2].documents["train"])
    assert prepared(config(home), home / "run").facts == corpus.facts


def test_a_mixture_or_source_that_changed_is_refused_by_name(home, corpus, tmp_path):
    other = ({**SOURCES[0], "weight": 2.0}, {**SOURCES[1], "denoisers": ["prefix_75"]}, SOURCES[2])
    with pytest.raises(UserError) as error:
        reopen_corpus(config(home, *other, temperature=3.0), home / "run")
    message = str(error.value)
    assert (
        "the mixture file changed since this run began: mixture.temperature: 2.0 -> 3.0" in message
    )
    assert "source alpha.weight: None -> 2.0" in message
    assert "source beta.denoisers: ('prefix_75', 'span3_15') -> ('prefix_75',)" in message
    assert "gamma" not in message
    assert "\n" not in message
    more = write_jsonl(tmp_path / "gamma.jsonl.zst", [*TEXTS["gamma"], "more"])
    moved = {**SOURCES[2], "path": str(more)}
    with pytest.raises(UserError, match="source gamma changed since this run began"):
        reopen_corpus(config(home, *SOURCES[:2], moved), home / "run")


def test_outside_of_a_run_the_rates_are_the_same(home, corpus):
    assert open_corpus(config(home), corpus.tokenizer).weights() == corpus.weights()
    weighted = [{**source, "weight": i + 1.0} for i, source in enumerate(SOURCES)]
    found = open_corpus(config(home, *weighted), corpus.tokenizer)
    assert list(found.weights().values()) == [1.0, 2.0, 3.0]
    assert not found.facts  # nothing had to be counted


def test_bad_records_are_counted_by_source(home, tmp_path, corpus):
    write_jsonl(tmp_path / "alpha.jsonl", TEXTS["alpha"])
    with (tmp_path / "alpha.jsonl").open("a") as file:
        file.write("oops\n[]\n")
    write_array_record(tmp_path / "beta.array_record", TEXTS["beta"])
    (tmp_path / "half").write_bytes((tmp_path / "beta.array_record").read_bytes()[:70_000])
    (tmp_path / "half").rename(tmp_path / "beta2.array_record")
    sources = (
        {"name": "alpha", "path": "alpha.jsonl"},
        {"name": "beta", "path": "beta*.array_record"},
    )
    given = TokenizerConfig(path=str(corpus.tokenizer.path))
    lenient = config(tmp_path, *sources, max_bad_records=3)
    found = prepared(lenient, tmp_path / "run", given)
    assert [f["bad_records"] for f in found.facts["sources"].values()] == [2, 1]
    assert found.facts["bad_records"] == found.counts()["bad_records"] == 3
    with pytest.raises(UserError, match=r"brings the bad records to 3, and corpus.max_bad_records"):
        prepared(config(tmp_path, *sources, max_bad_records=2), tmp_path / "run2", given)


def test_a_source_without_held_out_documents_is_named(home, corpus, tmp_path):
    given = TokenizerConfig(path=str(corpus.tokenizer.path))
    few = write_jsonl(tmp_path / "few.jsonl.gz", TEXTS["gamma"][:2])
    small = {"name": "few", "path": str(few)}
    with pytest.raises(UserError, match=r"mixture.toml: source few: path: of 2 documents in"):
        prepared(config(home, *SOURCES, small), tmp_path / "run", given)


def test_a_long_count_says_how_far_it_is(home, corpus, monkeypatch):
    from t5g2.data import counting

    monkeypatch.setattr(counting, "_NEWS_EVERY", 0.0)
    monkeypatch.setattr(counting, "_BATCH_TEXTS", 50)
    lines: list[str] = []
    counts = counting.count(corpus.sources[0], "train", corpus.tokenizer, lines.append)
    assert lines[0].startswith("alpha: 50 documents, ")
    assert counts.facts() == corpus.facts["sources"]["alpha"]["train"]
