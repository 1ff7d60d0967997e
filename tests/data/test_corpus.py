import contextlib
import json
import math
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
from reconstruction import reconstruct

from t5g2.data.corpus import Corpus, TokenizerConfig, prepare_corpus
from t5g2.data.mixture import DataConfig
from t5g2.data.packing import RowStream
from t5g2.data.sources import CorpusConfig
from t5g2.errors import UserError

TOKENIZER = TokenizerConfig(vocab_size=600, sentinels=16)


@pytest.fixture
def texts(tmp_path) -> Path:
    """The first 3 kB of 60 modules, as files."""
    root = tmp_path / "texts"
    root.mkdir()
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    for number, module in enumerate(modules):
        text = module.read_text(encoding="utf-8")[:3000]
        (root / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return root


def prepared(
    texts: Path, run: Path, tokenizer: TokenizerConfig = TOKENIZER, stages: list | None = None
) -> Corpus:
    @contextlib.contextmanager
    def stage(title):
        if stages is not None:
            stages.append(title)
        yield

    config = CorpusConfig(path=str(texts), heldout_share=0.1)
    return prepare_corpus(config, tokenizer, run, stage)


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as error:
        prepared(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_corpus_comes_with_a_tokenizer_and_its_facts(texts, tmp_path):
    corpus = prepared(texts, tmp_path / "run")
    assert corpus.tokenizer.vocab_size == 600
    assert len(corpus.tokenizer.sentinel_ids) == 16
    counts = Counter()
    for split in ("train", "heldout"):
        tokens = [corpus.tokenizer.encode(text) for text in corpus.sources[0].documents[split]]
        facts = corpus.facts[split]
        assert facts["documents"] == len(tokens)
        assert facts["characters"] == sum(len(text) for text in corpus.sources[0].documents[split])
        assert facts["tokens"] == sum(map(len, tokens))
        if split == "train":
            counts.update(token for document in tokens for token in document.tolist())
    total = counts.total()
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert corpus.facts["unigram_entropy"] == pytest.approx(entropy)


def test_a_second_look_reuses_what_the_first_made(texts, tmp_path):
    run = tmp_path / "run"
    first = prepared(texts, run, TOKENIZER, stages := [])
    assert stages == ["corpus", "tokenizer", "counting tokens"]
    written = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    again = prepared(texts, run, TOKENIZER, stages := [])
    assert stages == ["corpus"]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == written
    assert again.facts == first.facts
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_the_same_corpus_makes_the_same_tokenizer_in_another_run(texts, tmp_path):
    one, other = (prepared(texts, tmp_path / name).facts for name in ("one", "other"))
    assert one == other


def test_a_given_tokenizer_travels_with_the_run(texts, tmp_path, tiny_tokenizer):
    given = TokenizerConfig(path=str(tiny_tokenizer.path))
    corpus = prepared(texts, tmp_path / "run", given)
    assert corpus.tokenizer.fingerprint == tiny_tokenizer.fingerprint
    assert corpus.tokenizer.path.is_relative_to(tmp_path / "run")


def test_no_tokenizer_where_one_was_named_is_an_error(texts, tmp_path):
    gone = tmp_path / "gone.model"
    assert "gone.model" in refusal(texts, tmp_path / "run", TokenizerConfig(path=str(gone)))
    prepared(texts, tmp_path / "run")  # and what it left behind is in nobody's way


def test_a_corpus_that_changed_since_the_run_began_is_refused(texts, tmp_path):
    run = tmp_path / "run"
    corpus = prepared(texts, run)
    changed = texts / corpus.sources[0].records.names[0]
    original = changed.read_text()
    changed.write_text(original + "# one line more\n")
    message = refusal(texts, run)
    assert "source text changed since this run began" in message
    assert "tokenizer" not in message
    changed.write_text(original)
    prepared(texts, run)
    (texts / "new.txt").write_text("New.")
    assert "source text changed" in refusal(texts, run)


def test_a_tokenizer_that_changed_since_the_run_began_is_refused(texts, tmp_path, tiny_tokenizer):
    run = tmp_path / "run"
    corpus = prepared(texts, run)
    corpus.tokenizer.path.write_bytes(tiny_tokenizer.path.read_bytes())
    assert "tokenizer changed since this run began" in refusal(texts, run)


def test_what_an_interrupted_run_left_is_no_obstacle(texts, tmp_path):
    home = tmp_path / "run" / "tokenizer"
    home.mkdir(parents=True)
    (home / "tokenizer.model.123.tmp").write_bytes(b"half a mo")
    assert prepared(texts, tmp_path / "run").tokenizer.vocab_size == 600


def test_a_document_that_is_not_utf_8_is_named(texts, tmp_path):
    (texts / "00.txt").write_bytes(b"caf\xe9")
    message = refusal(texts, tmp_path / "run")
    assert str(texts / "00.txt") in message
    assert "not UTF-8" in message


def test_a_corpus_too_small_for_the_vocabulary_says_so(texts, tmp_path):
    message = refusal(texts, tmp_path / "run", TokenizerConfig(vocab_size=500_000))
    assert "too small for vocab_size=500000" in message


def test_documents_without_text_are_no_corpus(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text("")
    assert "no text to train a tokenizer on" in refusal(tmp_path, tmp_path / "run")


def test_facts_are_plain_json(texts, tmp_path):
    corpus = prepared(texts, tmp_path / "run")
    assert json.loads(json.dumps(corpus.facts)) == corpus.facts


@pytest.mark.parametrize("bos_on_inputs", [True, False])
def test_the_mixture_uses_the_tokenizer_s_ids(texts, tmp_path, bos_on_inputs):
    corpus = prepared(texts, tmp_path / "run")
    config = DataConfig(
        inputs_length=64,
        targets_length=64,
        denoisers=({"name": "d", "corruption_rate": 0.3, "mean_span": 3.0},),
        bos_on_inputs=bos_on_inputs,
    )
    mixture = corpus.mixture("heldout", config)
    assert [task.name for task in mixture.tasks] == ["d"]
    assert mixture.special == (2, 1, corpus.tokenizer.sentinel_ids, bos_on_inputs)
    stream = RowStream(mixture, 2, 64, 64, 0)
    pieces, _ = stream.next_row(1, stream.start()[1])
    assert bool(pieces[0].example.inputs[0] == 2) == bos_on_inputs
    tokens, _ = reconstruct(*pieces[0].example, mixture.special)
    text = corpus.sources[0].documents["heldout"][pieces[0].document]
    assert text.startswith(corpus.tokenizer.decode(tokens))
