"""A run's text: documents, the tokenizer (trained on them if none is given), and facts of both."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from t5g2.data.mixture import DataConfig, Mixture, Source
from t5g2.data.sources import CorpusConfig, TextFiles, TokenizedTexts, open_corpus
from t5g2.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from t5g2.data.ul2 import SpecialTokens
from t5g2.errors import UserError
from t5g2.files import write_atomically

TOKENIZER_DIR = "tokenizer"


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


def prepare_tokenizer(
    config: TokenizerConfig, texts: dict[str, TextFiles], run_dir: Path
) -> Tokenizer:
    """The run's tokenizer, kept in `run_dir`/tokenizer: found there, copied there, or trained."""
    home = run_dir / TOKENIZER_DIR
    # Anything else in there is what an interrupted run left.
    if any(path.suffix in (".model", ".json") for path in home.glob("*")):
        return load_tokenizer(home)
    if config.path is None:
        home.mkdir(parents=True, exist_ok=True)
        return train_sentencepiece(
            texts["train"],
            home / "tokenizer.model",
            vocab_size=config.vocab_size,
            sentinels=config.sentinels,
            max_bytes=config.train_bytes,
        )
    given = load_tokenizer(Path(config.path))
    staging = home.with_name(TOKENIZER_DIR + ".tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    shutil.copy2(given.path, staging / given.path.name)
    staging.replace(home)
    return load_tokenizer(home)


def prepare_corpus(
    corpus_config: CorpusConfig,
    tokenizer_config: TokenizerConfig,
    run_dir: Path,
    stage: Callable[[str], Any],
) -> Corpus:
    """Opens the corpus, makes the tokenizer and counts both; what was done before is kept.

    Args:
        corpus_config: where the text is.
        tokenizer_config: which tokenizer.
        run_dir: the tokenizer and `corpus.json` are kept there.
        stage: a context manager that announces a phase by its title.

    Raises:
        UserError: an unusable corpus or tokenizer, or a corpus that changed since the run began.
    """
    with stage("corpus"):
        texts = open_corpus(corpus_config)
        fingerprint = {split: files.fingerprint() for split, files in texts.items()}
    with stage("tokenizer"):
        tokenizer = prepare_tokenizer(tokenizer_config, texts, run_dir)
    fingerprint["tokenizer"] = tokenizer.fingerprint
    kept = run_dir / "corpus.json"
    if kept.exists():
        facts = json.loads(kept.read_text())
        changed = [k for k, v in fingerprint.items() if facts["fingerprint"].get(k) != v]
        if changed:
            raise UserError(
                f"{run_dir}: {' and '.join(changed)} changed since this run began ({kept} has the "
                "fingerprints); restore what changed or use another --run_dir"
            )
    else:
        with stage("counting tokens"):
            facts = {"fingerprint": fingerprint, **_count(texts, tokenizer)}
        write_atomically(kept, json.dumps(facts, indent=1))
    return Corpus(texts=texts, tokenizer=tokenizer, facts=facts)


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
