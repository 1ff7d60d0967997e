"""A run's text: documents, the tokenizer (trained on them if none is given), and facts of both."""

import dataclasses
import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from t5g2.config import did_you_mean, differences
from t5g2.data.cached_corpus import CachedSource, open_cache
from t5g2.data.counting import corpus_facts, count, facts_of, tokenizer_sample
from t5g2.data.image_examples import ImageExamples, ImagePrefix, image_prefix
from t5g2.data.images import check_trained_ids
from t5g2.data.mixture import DataConfig, Mixture, Source, TokenSource
from t5g2.data.packing import RowStream
from t5g2.data.sources.config import CorpusConfig
from t5g2.data.sources.documents import SequentialDocuments
from t5g2.data.sources.mixture_file import MixtureSpec, SourceSpec, read_mixture
from t5g2.data.sources.opening import SPLITS, TextSource, open_mixture
from t5g2.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from t5g2.data.ul2 import Denoiser, SpecialTokens, denoisers_from, with_mode_ids
from t5g2.errors import UserError
from t5g2.files import remove, write_atomically
from t5g2.models.config import ModelConfig

logger = logging.getLogger(__name__)

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
        spec: which sources there are and how they are mixed.
        sources: the opened sources, in the order of `spec`.
        tokenizer: what they are tokenised with.
        facts: counts of documents, characters and tokens, of all sources and of each; the number of
            bad records; the unigram entropy of the training tokens (nats a token); fingerprints of
            the files.
    """

    spec: MixtureSpec
    sources: tuple[TextSource, ...] | tuple[CachedSource, ...]
    tokenizer: Tokenizer
    facts: dict[str, Any]

    def counts(self) -> dict[str, int]:
        """Documents of both splits, characters and tokens of the training documents."""
        train, heldout = self.facts["train"], self.facts["heldout"]
        bad = self.facts["bad_records"]
        skipped = {"bad_records": bad} if bad else {}
        return {**train, "heldout_documents": heldout["documents"], **skipped}

    def counts_by_source(self) -> dict[str, dict[str, Any]]:
        """Language, training documents and tokens, and bad records of each source."""
        sources = self.facts["sources"]
        train = {name: facts["train"] for name, facts in sources.items()}
        return {
            "source_languages": {name: facts["language"] for name, facts in sources.items()},
            "source_documents": {name: counts["documents"] for name, counts in train.items()},
            "source_tokens": {name: counts["tokens"] for name, counts in train.items()},
            "source_bad_records": {name: facts["bad_records"] for name, facts in sources.items()},
        }

    @property
    def tower(self) -> str | None:
        """Fingerprint of the vision tower whose visual tokens it has in place of images, if so."""
        cached = (source for source in self.sources if isinstance(source, CachedSource))
        return next((source.tower for source in cached if source.tower is not None), None)

    def weights(self) -> dict[str, float]:
        """The weight of each source in the mixture."""
        sizes = {
            name: facts["train"]["tokens"] for name, facts in self.facts.get("sources", {}).items()
        }
        return self.spec.weights(sizes)

    def mixture(self, split: str, config: DataConfig) -> Mixture:
        """The mixture over one split.

        Raises:
            UserError: a source names a denoiser that the configuration does not have, or has images
                that the tokenizer has no tokens for.
        """
        special = SpecialTokens(
            self.tokenizer.bos_id,
            self.tokenizer.eos_id,
            self.tokenizer.sentinel_ids,
            config.bos_on_inputs,
        )
        weights = self.weights()
        sources = tuple(
            self._source(source, source.tokens(split, self.tokenizer), config, weights[source.name])
            for source in self.sources
        )
        return Mixture(sources=sources, special=special)

    def _source(
        self,
        source: TextSource | CachedSource,
        documents: TokenSource | ImageExamples,
        config: DataConfig,
        weight: float,
    ) -> Source:
        made = with_mode_ids(source_denoisers(source.spec, config), self.tokenizer.encode)
        denoisers: tuple[Denoiser, ...] | tuple[ImagePrefix] = made
        if hasattr(documents, "slot"):
            denoisers = (image_prefix(made),)
        return Source(name=source.name, documents=documents, denoisers=denoisers, weight=weight)


def source_denoisers(spec: SourceSpec, config: DataConfig) -> tuple[Denoiser, ...]:
    """The denoisers that examples of a source get.

    Raises:
        UserError: it names one that the configuration does not have.
    """
    if spec.denoisers is None:
        return config.made_denoisers()
    if isinstance(spec.denoisers, str):
        try:
            return denoisers_from(spec.denoisers)
        except UserError as error:
            raise UserError(f"{spec.where('denoisers')}: {error}") from None
    made = {denoiser.name: denoiser for denoiser in config.made_denoisers()}
    for name in spec.denoisers:
        if name not in made:
            raise UserError(
                f"{spec.where('denoisers')}: data.denoisers has no {name!r}"
                f"{did_you_mean(name, made)}; it has {', '.join(made)}"
            )
    return tuple(made[name] for name in spec.denoisers)


def check_mixture(corpus_config: CorpusConfig, data_config: DataConfig) -> None:
    """Finds mistakes in a mixture file, and denoisers that it names in vain, before long work.

    Raises:
        UserError: the first one.
    """
    for spec in read_mixture(corpus_config).sources:
        source_denoisers(spec, data_config)


def prepare_corpus(
    corpus_config: CorpusConfig,
    tokenizer_config: TokenizerConfig,
    run_dir: Path,
    stage: Callable[[str], AbstractContextManager[None]],
    message: Callable[[str], None] = logger.info,
    model: ModelConfig | None = None,
) -> Corpus:
    """Opens the corpus, makes the run's tokenizer and counts both; what was done before is kept.

    Args:
        corpus_config: where the text is.
        tokenizer_config: which tokenizer.
        run_dir: keeps the tokenizer, in `tokenizer/`, and the facts, in `corpus.json`.
        stage: a context manager that announces a phase by its title.
        message: told how far long phases are.
        model: reads the images that the corpus may have.

    Raises:
        UserError: an unusable corpus or tokenizer, or a corpus that changed since the run began.
    """
    if corpus_config.cache is not None:
        return _prepare_cached(corpus_config, tokenizer_config, run_dir, stage, model)
    spec = read_mixture(corpus_config)
    with stage("corpus"):
        sources = open_mixture(spec, corpus_config, model)
    facts_path, home = run_dir / FACTS_FILE, run_dir / TOKENIZER_DIR
    paths = {source.name: source.path for source in spec.sources}
    configs = [dataclasses.asdict(corpus_config), dataclasses.asdict(tokenizer_config)]
    made_for = json.loads(json.dumps([*configs, spec.settings(), paths]))
    facts = json.loads(facts_path.read_text()) if facts_path.exists() else {}
    # Written last, the facts vouch for the tokenizer. Without them, or with those of other
    # settings that never came to train, it is made anew.
    if facts.get("made_for") == made_for:
        return _unchanged(spec, sources, run_dir, facts)
    with stage("tokenizer"):
        tokenizer = make_tokenizer(tokenizer_config, spec, sources, home, model)
    with stage("counting tokens"):
        facts = {
            "made_for": made_for,
            "mixture": spec.settings(),
            "fingerprint": _fingerprint(sources, tokenizer),
            **_count(spec, sources, tokenizer, corpus_config.heldout_share, message),
        }
    write_atomically(facts_path, json.dumps(facts, indent=1))
    return Corpus(spec=spec, sources=sources, tokenizer=tokenizer, facts=facts)


def _prepare_cached(
    corpus_config: CorpusConfig,
    tokenizer_config: TokenizerConfig,
    run_dir: Path,
    stage: Callable[[str], AbstractContextManager[None]],
    model: ModelConfig | None,
) -> Corpus:
    """As `prepare_corpus`, from a cache: there is nothing to be counted or trained."""
    with stage("cache"):
        cache = open_cache(corpus_config, model)
        cache.check_settings(tokenizer_config)
        own = dataclasses.replace(tokenizer_config, path=str(cache.tokenizer.path))
        tokenizer = make_tokenizer(own, cache.spec, (), run_dir / TOKENIZER_DIR)
        facts = {
            "mixture": cache.spec.settings(),
            "fingerprint": _fingerprint(cache.sources, tokenizer),
            **cache.facts(),
        }
    write_atomically(run_dir / FACTS_FILE, json.dumps(facts, indent=1))
    return Corpus(spec=cache.spec, sources=cache.sources, tokenizer=tokenizer, facts=facts)


def reopen_corpus(config: CorpusConfig, run_dir: Path, model: ModelConfig | None = None) -> Corpus:
    """The corpus and tokenizer of a run that has prepared them; nothing is written.

    Args:
        config: where the text is.
        run_dir: of the run.
        model: reads the images that the corpus may have.

    Raises:
        UserError: the run has none yet, or they changed since it began.
    """
    facts_path = run_dir / FACTS_FILE
    if not facts_path.is_file():
        raise UserError(f"{run_dir} has no {FACTS_FILE} yet: start its training first")
    facts = json.loads(facts_path.read_text())
    if config.cache is not None:
        cache = open_cache(config, model)
        return _unchanged(cache.spec, cache.sources, run_dir, facts)
    spec = read_mixture(config)
    return _unchanged(spec, open_mixture(spec, config, model), run_dir, facts)


def accept_corpus(
    config: CorpusConfig,
    run_dir: Path,
    message: Callable[[str], None] = logger.info,
    model: ModelConfig | None = None,
) -> tuple[Corpus, list[str]]:
    """The corpus that a run goes on with, which may have changed, under the run's tokenizer.

    If it has, it is counted anew and the run directory's facts are those of the new one.

    Args:
        config: where the text is now.
        run_dir: has prepared a corpus before.
        message: told how far long phases are.
        model: reads the images that the corpus may have.

    Returns:
        The corpus, and what changed in it since the run began or last accepted a change.

    Raises:
        UserError: an unusable corpus, or a cache of another tokenizer's tokens.
    """
    facts = json.loads((run_dir / FACTS_FILE).read_text())
    tokenizer = load_tokenizer(run_dir / TOKENIZER_DIR)
    sources: tuple[TextSource, ...] | tuple[CachedSource, ...]
    if config.cache is not None:
        cache = open_cache(config, model)
        cache.check_tokenizer(tokenizer)
        spec, sources, count_anew = cache.spec, cache.sources, cache.facts
    else:
        spec = read_mixture(config)
        sources = opened = open_mixture(spec, config, model)
        count_anew = partial(_count, spec, opened, tokenizer, config.heldout_share, message)
    settings, changed = _changes(spec, sources, tokenizer, facts)
    if not settings and not changed:
        return _unchanged(spec, sources, run_dir, facts), []
    counts = count_anew()
    fingerprint = _fingerprint(sources, tokenizer)
    facts = {**facts, "mixture": spec.settings(), "fingerprint": fingerprint, **counts}
    write_atomically(run_dir / FACTS_FILE, json.dumps(facts, indent=1))
    corpus = Corpus(spec=spec, sources=sources, tokenizer=tokenizer, facts=facts)
    return corpus, [*settings, *(f"{name}: other documents" for name in changed)]


def open_corpus(
    config: CorpusConfig, tokenizer: Tokenizer, model: ModelConfig | None = None
) -> Corpus:
    """A corpus outside of a run, under a tokenizer; counted only if the rates depend on it.

    Args:
        config: where the text is.
        tokenizer: what it is tokenised with.
        model: reads the images that the corpus may have.

    Raises:
        UserError: an unusable corpus.
    """
    if config.cache is not None:
        cache = open_cache(config, model)
        cache.check_tokenizer(tokenizer)
        return Corpus(
            spec=cache.spec, sources=cache.sources, tokenizer=tokenizer, facts=cache.facts()
        )
    spec = read_mixture(config)
    sources = open_mixture(spec, config, model)
    facts = {}
    if spec.needs_sizes():
        facts = _count(spec, sources, tokenizer, config.heldout_share, logger.info)
    return Corpus(spec=spec, sources=sources, tokenizer=tokenizer, facts=facts)


def _unchanged(
    spec: MixtureSpec,
    sources: tuple[TextSource, ...] | tuple[CachedSource, ...],
    run_dir: Path,
    facts: dict[str, Any],
) -> Corpus:
    tokenizer = load_tokenizer(run_dir / TOKENIZER_DIR)
    settings, changed = _changes(spec, sources, tokenizer, facts)
    if settings:
        raise UserError(
            f"{run_dir}: the mixture file changed since this run began: {'; '.join(settings)}; "
            "restore it, use another run directory, or accept it by train.accept_changes = True"
        )
    if changed:
        raise UserError(
            f"{run_dir}: {' and '.join(changed)} changed since this run began ({FACTS_FILE} has "
            "the fingerprints); restore what changed, use another run directory, or accept it by "
            "train.accept_changes = True"
        )
    for source in sources:
        for split, documents in source.documents.items():
            if isinstance(documents, SequentialDocuments):
                documents.know_count(facts["sources"][source.name][split]["documents"])
    return Corpus(spec=spec, sources=sources, tokenizer=tokenizer, facts=facts)


def _changes(
    spec: MixtureSpec,
    sources: tuple[TextSource, ...] | tuple[CachedSource, ...],
    tokenizer: Tokenizer,
    facts: dict[str, Any],
) -> tuple[list[str], list[str]]:
    """Settings of the mixture, and contents, that are not those of which the facts are."""
    kept, found = facts["fingerprint"], _fingerprint(sources, tokenizer)
    changed = [name for name in found if found[name] != kept.get(name)]
    return differences(facts["mixture"], spec.settings()), changed


def _fingerprint(
    sources: tuple[TextSource, ...] | tuple[CachedSource, ...], tokenizer: Tokenizer
) -> dict[str, str]:
    files = {f"source {source.name}": source.fingerprint() for source in sources}
    return {**files, "tokenizer": tokenizer.fingerprint}


def row_stream(corpus: Corpus, split: str, config: DataConfig, rows: int) -> RowStream:
    """The packed rows of one split.

    Raises:
        UserError: sequence lengths that do not suit a denoiser or the sentinels, or no room for
            images.
    """
    mixture = corpus.mixture(split, config)
    return RowStream(
        mixture,
        rows,
        config.inputs_length,
        config.targets_length,
        config.seed,
        config.images_per_row,
    )


def make_tokenizer(
    config: TokenizerConfig,
    spec: MixtureSpec,
    sources: tuple[TextSource, ...],
    home: Path,
    model: ModelConfig | None = None,
) -> Tokenizer:
    """Trains a run's tokenizer on all its sources, or copies the one that it names, into `home`.

    Args:
        config: which tokenizer.
        spec: how the sources are mixed.
        sources: the text.
        home: a directory.
        model: if it reads images, a trained tokenizer has image tokens.

    Raises:
        UserError: no usable tokenizer, or too little text to train one on, or a model with other
            image tokens than a trained tokenizer has.
    """
    images = model is not None and model.vision is not None
    if config.path is None and images:
        assert model is not None
        check_trained_ids(model, config.sentinels)
    home.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.model", "tokenizer.json"):
        remove(home / name)
    if config.path is not None:
        given = load_tokenizer(config.path).path
        write_atomically(home / f"tokenizer{given.suffix}", given.read_bytes())
        return load_tokenizer(home)
    return train_sentencepiece(
        tokenizer_sample(sources, spec, config.train_bytes),
        home / "tokenizer.model",
        vocab_size=config.vocab_size,
        sentinels=config.sentinels,
        max_bytes=config.train_bytes,
        images=images,
    )


def _count(
    spec: MixtureSpec,
    sources: tuple[TextSource, ...],
    tokenizer: Tokenizer,
    heldout_share: float,
    message: Callable[[str], None],
) -> dict[str, Any]:
    """The facts that are counts: one pass over all documents."""
    train, by_source = [], {}
    for source in sources:
        counts = {split: count(source, split, tokenizer, message) for split in SPLITS}
        found = {split: of_split.documents for split, of_split in counts.items()}
        source.check_splits(found, heldout_share)
        for split, documents in source.documents.items():
            if isinstance(documents, SequentialDocuments):
                documents.know_count(found[split])
        train.append(counts["train"])
        by_source[source.name] = facts_of(source, counts)
    return corpus_facts(spec, by_source, train)
