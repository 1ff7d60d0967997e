import contextlib
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_parts import paragraphs

from t5g2 import cache
from t5g2.data.cache_format import read_manifest
from t5g2.data.corpus import (
    TokenizerConfig,
    open_corpus,
    prepare_corpus,
    reopen_corpus,
    row_stream,
)
from t5g2.data.loader import RowBatches
from t5g2.data.mixture import DataConfig
from t5g2.data.sources.config import CorpusConfig
from t5g2.errors import UserError

TOKENIZER = TokenizerConfig(vocab_size=500, sentinels=32)
DATA = DataConfig(inputs_length=256, targets_length=128)
MIXTURE = """
temperature = 2.0
[[source]]
name = "prose"
path = "prose.jsonl"
language = "en"
denoisers = ["span3_15", "prefix_75"]
[[source]]
name = "code"
path = "code"
weight = 0.5
"""


@pytest.fixture
def mixture(tmp_path) -> Path:
    """A mixture file of a file of JSON Lines and a directory of text."""
    (tmp_path / "code").mkdir()
    for number, text in enumerate(paragraphs(60)):
        (tmp_path / "code" / f"{number:02}.py").write_text(text, encoding="utf-8")
    lines = [json.dumps({"text": text}) for text in paragraphs(300, 1)]
    (tmp_path / "prose.jsonl").write_text("\n".join(lines) + "\n")
    path = tmp_path / "mixture.toml"
    path.write_text(MIXTURE)
    return path


def config_of(mixture: Path, **more) -> CorpusConfig:
    return CorpusConfig(mixture=str(mixture), heldout_share=0.1, **more)


def cached(mixture: Path, tokenizer=TOKENIZER, out="cache", tasks=(), **more) -> CorpusConfig:
    """Makes a cache and returns the settings that train from it alone."""
    out = mixture.parent / out
    cache.make_cache(config_of(mixture, **more), tokenizer, out, tasks=list(tasks), workers=1)
    return CorpusConfig(cache=str(out))


def prepared(config: CorpusConfig, run_dir: Path, tokenizer=TOKENIZER):
    return prepare_corpus(config, tokenizer, run_dir, lambda _: contextlib.nullcontext())


def steps(corpus, split: str = "train", count: int = 12) -> list:
    rows = row_stream(corpus, split, DATA, 4)
    iterator = iter(RowBatches(rows, rows.start(), 0, 4))
    return [next(iterator) for _ in range(count)]


def refusal(function, *arguments, **more) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rows_from_a_cache_are_those_of_the_text(mixture, tmp_path):
    from_text = prepared(config_of(mixture), tmp_path / "text")
    from_cache = prepared(cached(mixture), tmp_path / "cached")
    for split in ("train", "heldout"):
        np.testing.assert_equal(steps(from_cache, split), steps(from_text, split))
    assert from_cache.mixture("train", DATA).tasks == from_text.mixture("train", DATA).tasks
    np.testing.assert_array_equal(
        from_cache.mixture("train", DATA).rates, from_text.mixture("train", DATA).rates
    )
    assert from_cache.tokenizer.fingerprint == from_text.tokenizer.fingerprint
    own = {"made_for", "fingerprint"}
    assert {k: v for k, v in from_cache.facts.items() if k not in own} == {
        k: v for k, v in from_text.facts.items() if k not in own
    }


def test_training_from_a_cache_needs_no_text_no_seqio_and_no_tensorflow(mixture, tmp_path):
    expected = steps(prepared(config_of(mixture), tmp_path / "text"))[-1].batch["row_digest"]
    config = cached(mixture)
    for path in (mixture, mixture.parent / "prose.jsonl"):
        path.unlink()
    script = f"""
import contextlib, sys
import t5g2.train
from pathlib import Path
from t5g2.data.corpus import CorpusConfig, TokenizerConfig, prepare_corpus, row_stream
from t5g2.data.loader import RowBatches
from t5g2.data.mixture import DataConfig
corpus = prepare_corpus(
    CorpusConfig(cache={config.cache!r}), TokenizerConfig(vocab_size=500, sentinels=32),
    Path({str(tmp_path / "run")!r}), lambda _: contextlib.nullcontext(),
)
rows = row_stream(corpus, "train", DataConfig(inputs_length=256, targets_length=128), 4)
batches = RowBatches(rows, rows.start(), 0, 4).prefetched()
for _ in range(12):
    batch = next(batches).batch
print(batch["row_digest"].tolist())
loaded = [name for name in ("seqio", "tensorflow", "tensorflow_datasets", "pyarrow")
          if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected.tolist()


def test_a_mixture_file_still_says_how_cached_sources_are_mixed(mixture, tmp_path):
    config = cached(mixture)
    other = tmp_path / "other.toml"
    other.write_text(MIXTURE.replace("weight = 0.5", "weight = 3.0"))
    from_text = prepared(config_of(other), tmp_path / "text")
    (tmp_path / "prose.jsonl").unlink()
    from_cache = prepared(CorpusConfig(cache=config.cache, mixture=str(other)), tmp_path / "cached")
    assert from_cache.facts["unigram_entropy"] == from_text.facts["unigram_entropy"]
    assert from_cache.weights() == from_text.weights() == {"prose": 1.0, "code": 3.0}
    other.write_text(MIXTURE.replace('"prose"', '"poetry"'))
    message = refusal(
        prepared, CorpusConfig(cache=config.cache, mixture=str(other)), tmp_path / "refused"
    )
    assert "source poetry" in message
    assert "it has prose, code" in message


def test_one_source_can_be_cached_alone_under_the_tokenizer_of_all(mixture, tmp_path):
    whole = prepared(config_of(mixture), tmp_path / "text")
    alone = prepared(cached(mixture, tasks=["code"]), tmp_path / "cached")
    assert [source.name for source in alone.sources] == ["code"]
    assert alone.tokenizer.fingerprint == whole.tokenizer.fingerprint
    assert alone.facts["train"] == whole.facts["sources"]["code"]["train"]
    message = refusal(cached, mixture, tasks=["cod"], out="other")
    assert "--task: no source cod; did you mean 'code'" in message
    assert not (tmp_path / "other").exists()


def test_a_source_that_is_read_in_its_own_order_is_cached_in_that_order(mixture, tmp_path):
    lines = (tmp_path / "prose.jsonl").read_text()
    with gzip.open(tmp_path / "prose.jsonl.gz", "wt") as file:
        file.write(lines * 3)
    mixture.write_text(MIXTURE.replace("prose.jsonl", "prose.jsonl.gz"))
    from_text = prepared(config_of(mixture), tmp_path / "text")
    from_cache = prepared(cached(mixture), tmp_path / "cached")
    for split in ("train", "heldout"):
        one, other = (
            list(corpus.mixture(split, DATA).sources[0].documents)
            for corpus in (from_text, from_cache)
        )
        np.testing.assert_equal(other, one)


def test_a_run_s_tokenizer_must_be_the_cache_s(mixture, tmp_path, tiny_tokenizer):
    config = cached(mixture)
    given = TokenizerConfig(path=str(tiny_tokenizer.path))
    message = refusal(prepared, config, tmp_path / "run", given)
    assert "made with another tokenizer" in message
    assert tiny_tokenizer.fingerprint in message
    assert "another tokenizer" in refusal(open_corpus, config, tiny_tokenizer)
    message = refusal(prepared, config, tmp_path / "run", TokenizerConfig(vocab_size=800))
    assert "was made with tokenizer.vocab_size = 500, not 800" in message
    own = cached(mixture, given, out="given")
    assert prepared(own, tmp_path / "ok", given).tokenizer.fingerprint == tiny_tokenizer.fingerprint
    assert open_corpus(own, tiny_tokenizer).facts["train"]["documents"] > 300


def test_settings_that_the_cache_was_not_made_with_are_refused(mixture, tmp_path):
    config = cached(mixture)
    named = CorpusConfig(cache=config.cache, split_bytes=100)
    assert "corpus.split_bytes = None, not 100" in refusal(prepared, named, tmp_path / "run")
    other = config_of(mixture, cache=config.cache)
    assert prepared(other, tmp_path / "run").facts["train"]["documents"] > 300
    assert "reads the text" in refusal(
        cache.make_cache, other, TOKENIZER, tmp_path / "c", tasks=[], workers=1
    )


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda m, t: (m, TokenizerConfig(vocab_size=600, sentinels=32)), "tokenizer.vocab_size"),
        (lambda m, t: (m, TokenizerConfig(path=str(t.path))), "tokenizer.given"),
        (lambda m, t: (m.with_name("code").joinpath("x.py").write_text("x"), m)[1:], "code"),
    ],
)
def test_a_cache_of_something_else_is_not_overwritten(mixture, tiny_tokenizer, change, difference):
    cached(mixture)
    message = refusal(cached, *change(mixture, tiny_tokenizer))
    assert "holds the cache of other data or settings" in message
    assert difference in message


def test_making_a_cache_again_leaves_it_as_it_is(mixture):
    config = cached(mixture)
    files = {p: p.stat().st_mtime_ns for p in Path(config.cache).rglob("*") if p.is_file()}
    cached(mixture)
    again = {p: p.stat().st_mtime_ns for p in Path(config.cache).rglob("*") if p.is_file()}
    assert again == files


def test_bad_records_are_refused_or_counted(mixture, tmp_path):
    path = tmp_path / "prose.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = lines[200] = '{"text": '
    path.write_text("\n".join(lines) + "\n")
    assert "max_bad_records" in refusal(cached, mixture, max_bad_records=0)
    message = refusal(cached, mixture, max_bad_records=1, out="one")
    assert "corpus.max_bad_records is 1" in message
    config = cached(mixture, max_bad_records=2, out="two")
    corpus = prepared(config, tmp_path / "run")
    assert corpus.facts["bad_records"] == 2
    assert corpus.counts()["bad_records"] == 2
    from_text = prepared(config_of(mixture, max_bad_records=2), tmp_path / "text")
    np.testing.assert_equal(steps(corpus), steps(from_text))


def test_a_run_goes_on_only_with_its_own_cache(mixture, tmp_path):
    config = cached(mixture)
    made = prepared(config, tmp_path / "run")
    assert reopen_corpus(config, tmp_path / "run").facts == made.facts
    lines = (tmp_path / "prose.jsonl").read_text()
    (tmp_path / "prose.jsonl").write_text(lines.replace("self", "this"))
    other = cached(mixture, out="other")
    message = refusal(reopen_corpus, other, tmp_path / "run")
    assert "source prose" in message
    assert "changed since this run began" in message


def test_the_manifest_says_what_it_was_made_from(mixture):
    plan = read_manifest(Path(cached(mixture).cache)).plan
    assert plan["cache"] == {"format": 1, "sources": ["prose", "code"]}
    assert plan["source prose"]["language"] == "en"
    assert plan["source code"]["weight"] == 0.5
    assert plan["mixture"]["temperature"] == 2.0
    assert plan["corpus"]["heldout_share"] == 0.1
    assert set(plan["fingerprint"]) == {"prose", "code"}
