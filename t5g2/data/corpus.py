"""A run's text: documents, the tokenizer (trained on them if none is given), and facts of both."""

import dataclasses
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from t5g2.data.mixture import DataConfig, Mixture, Source
from t5g2.data.packing import RowStream
from t5g2.data.sources import CorpusConfig, TextFiles, TokenizedTexts, open_corpus
from t5g2.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from t5g2.data.ul2 import SpecialTokens
from t5g2.errors import UserError
from t5g2.files import write_atomically

TOKENIZER_DIR = "tokenizer"
FACTS_FILE = "corpus.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer.

    Attributes:
        path: a SentencePiece `.model`, a `tokenizer.json`, or a directory that holds one; None
            trains a SentencePiece model on the corpus.
        vocab_size: size of the trained vocabulary, sentinels included.
        sentinels: size of its sentinel block.
        train_bytes: how much text of the corpus it is trained on.
    """

    path: str | None = None
    vocab_size: int = 4096
    sentinels: int = 128
    train_bytes: int = 8_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """A run's documents and tokenizer, ready to train on.

    Attributes:
        texts: documents of each split.
        tokenizer: what they are tokenised with.
        facts: counts of documents, characters and tokens, the unigram entropy of the training
            tokens (nats a token) and a fingerprint of the files.
    """

    texts: dict[str, TextFiles]
    tokenizer: Tokenizer
    facts: dict[str, Any]

    def counts(self) -> dict[str, int]:
        """Documents of both splits, characters and tokens of the training documents."""
        train, heldout = self.facts["train"], self.facts["heldout"]
        return {**train, "heldout_documents": heldout["documents"]}

    def mixture(self, split: str, config: DataConfig) -> Mixture:
        """The mixture over one split."""
        special = SpecialTokens(
            self.tokenizer.bos_id,
            self.tokenizer.eos_id,
            self.tokenizer.sentinel_ids,
            config.bos_on_inputs,
        )
        documents = TokenizedTexts(self.texts[split], self.tokenizer)
        source = Source(name="text", documents=documents, denoisers=config.made_denoisers())
        return Mixture(sources=(source,), special=special)


def prepare_corpus(
    corpus_config: CorpusConfig,
    tokenizer_config: TokenizerConfig,
    run_dir: Path,
    stage: Callable[[str], AbstractContextManager[None]],
) -> Corpus:
    """Opens the corpus, makes the run's tokenizer and counts both; what was done before is kept.

    Args:
        corpus_config: where the text is.
        tokenizer_config: which tokenizer.
        run_dir: keeps the tokenizer, in `tokenizer/`, and the facts, in `corpus.json`.
        stage: a context manager that announces a phase by its title.

    Raises:
        UserError: an unusable corpus or tokenizer, or a corpus that changed since the run began.
    """
    with stage("corpus"):
        texts = open_corpus(corpus_config)
    facts_path, home = run_dir / FACTS_FILE, run_dir / TOKENIZER_DIR
    made_for = [dataclasses.asdict(corpus_config), dataclasses.asdict(tokenizer_config)]
    made_for = json.loads(json.dumps(made_for))
    facts = json.loads(facts_path.read_text()) if facts_path.exists() else {}
    # Written last, the facts vouch for the tokenizer. Without them, or with those of other
    # settings that never came to train, it is made anew.
    if facts.get("made_for") == made_for:
        return _unchanged(texts, run_dir, facts)
    with stage("tokenizer"):
        tokenizer = _make_tokenizer(tokenizer_config, texts["train"], home)
    with stage("counting tokens"):
        facts = {
            "made_for": made_for,
            "fingerprint": _fingerprint(texts, tokenizer),
            **_count(texts, tokenizer),
        }
    write_atomically(facts_path, json.dumps(facts, indent=1))
    return Corpus(texts=texts, tokenizer=tokenizer, facts=facts)


def reopen_corpus(config: CorpusConfig, run_dir: Path) -> Corpus:
    """The corpus and tokenizer of a run that has prepared them; nothing is written.

    Raises:
        UserError: the run has none yet, or they changed since it began.
    """
    facts_path = run_dir / FACTS_FILE
    if not facts_path.is_file():
        raise UserError(f"{run_dir} has no {FACTS_FILE} yet: start its training first")
    return _unchanged(open_corpus(config), run_dir, json.loads(facts_path.read_text()))


def _unchanged(texts: dict[str, TextFiles], run_dir: Path, facts: dict[str, Any]) -> Corpus:
    tokenizer = load_tokenizer(run_dir / TOKENIZER_DIR)
    kept, found = facts["fingerprint"], _fingerprint(texts, tokenizer)
    changed = [name for name in found if found[name] != kept[name]]
    if changed:
        raise UserError(
            f"{run_dir}: {' and '.join(changed)} changed since this run began ({FACTS_FILE} has "
            "the fingerprints); restore what changed or use another run directory"
        )
    return Corpus(texts=texts, tokenizer=tokenizer, facts=facts)


def _fingerprint(texts: dict[str, TextFiles], tokenizer: Tokenizer) -> dict[str, str]:
    files = {split: files.fingerprint() for split, files in texts.items()}
    return {**files, "tokenizer": tokenizer.fingerprint}


def row_stream(corpus: Corpus, split: str, config: DataConfig, rows: int) -> RowStream:
    """The packed rows of one split.

    Raises:
        UserError: sequence lengths that do not suit a denoiser or the sentinels.
    """
    mixture = corpus.mixture(split, config)
    return RowStream(mixture, rows, config.inputs_length, config.targets_length, config.seed)


def _make_tokenizer(config: TokenizerConfig, texts: TextFiles, home: Path) -> Tokenizer:
    home.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.model", "tokenizer.json"):
        (home / name).unlink(missing_ok=True)
    if config.path is not None:
        given = load_tokenizer(Path(config.path)).path
        write_atomically(home / f"tokenizer{given.suffix}", given.read_bytes())
        return load_tokenizer(home)
    return train_sentencepiece(
        texts,
        home / "tokenizer.model",
        vocab_size=config.vocab_size,
        sentinels=config.sentinels,
        max_bytes=config.train_bytes,
    )


def _count(texts: dict[str, TextFiles], tokenizer: Tokenizer) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for split, files in texts.items():
        counts = np.zeros(tokenizer.vocab_size, np.int64)
        characters = 0
        for text in files:
            characters += len(text)
            counts += np.bincount(tokenizer.encode(text), minlength=len(counts))
        facts[split] = {
            "documents": len(files),
            "characters": characters,
            "tokens": int(counts.sum()),
        }
        if split == "train":
            shares = counts[counts > 0] / max(counts.sum(), 1)
            entropy = -float(np.sum(shares * np.log(shares)))
            facts["unigram_entropy"] = entropy if math.isfinite(entropy) else 0.0
    return facts
