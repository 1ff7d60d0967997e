"""What a run trains on when `corpus.cache` names a cache: no text, no tokenising."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from t5g2.data.cache import (
    CachedDocuments,
    CachedRecords,
    cache_tokenizer,
    read_token_counts,
)
from t5g2.data.cache_format import FORMAT, IMAGES, MANIFEST, Manifest, Plan, read_manifest
from t5g2.data.cache_images import CachedImageTexts, check_images_plan
from t5g2.data.counting import Counts, corpus_facts
from t5g2.data.image_examples import feature_slot, pixel_slot
from t5g2.data.sources.config import CorpusConfig
from t5g2.data.sources.mixture_file import MixtureSpec, SourceSpec, read_mixture
from t5g2.data.sources.opening import SPLITS, check_reads_images
from t5g2.data.sources.records import BadRecords
from t5g2.data.tokenizer import Tokenizer, load_tokenizer
from t5g2.errors import UserError
from t5g2.models.config import ModelConfig

if TYPE_CHECKING:
    from t5g2.data.corpus import TokenizerConfig

# Settings of `CorpusConfig` and of `TokenizerConfig` that determine what a cache holds.
_CORPUS_SETTINGS = ("suffixes", "heldout_share", "split_bytes")
_TOKENIZER_SETTINGS = ("vocab_size", "sentinels", "train_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedSource:
    """A source in a cache.

    Attributes:
        spec: as the mixture file describes it.
        documents: of the splits "train" and "heldout", as tokens.
        content: checksum of all of them.
        tower: fingerprint of the vision tower whose visual tokens stand in for images; None: there
            are no such.
    """

    spec: SourceSpec
    documents: dict[str, CachedDocuments | CachedImageTexts]
    content: str
    tower: str | None = None

    @property
    def name(self) -> str:
        """The source's name."""
        return self.spec.name

    def fingerprint(self) -> str:
        """Changes with any document."""
        return self.content

    def tokens(self, split: str, tokenizer: Tokenizer) -> CachedDocuments | CachedImageTexts:
        """The documents of a split; the tokenizer has done its work."""
        return self.documents[split]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenedCache:
    """A cache, ready to train from.

    Attributes:
        directory: where it is.
        manifest: what it holds.
        spec: the sources and how they are mixed.
        sources: in the order of `spec`.
        tokenizer: what they were tokenised with.
    """

    directory: Path
    manifest: Manifest
    spec: MixtureSpec
    sources: tuple[CachedSource, ...]
    tokenizer: Tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuses another tokenizer than the cache's.

        Raises:
            UserError: naming both.
        """
        if tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise UserError(
                f"corpus.cache: {self.directory} was made with another tokenizer (fingerprint "
                f"{self.tokenizer.fingerprint}) than {tokenizer.path} ({tokenizer.fingerprint}): "
                "make a cache with this one"
            )

    def check_settings(self, config: "TokenizerConfig") -> None:
        """Refuses a run's tokenizer settings that the cache was not made with.

        Raises:
            UserError: naming the setting.
        """
        if config.path is not None:
            self.check_tokenizer(load_tokenizer(config.path))
            return
        plan, tokenizer = self.manifest.plan["tokenizer"], self.manifest.tokenizer
        made = {name: plan.get(name, tokenizer.get(name)) for name in _TOKENIZER_SETTINGS}
        _refuse_others(self.directory, "tokenizer", config, made)

    def facts(self) -> dict[str, Any]:
        """What a run keeps of the sources together, as JSON values.

        Raises:
            UserError: the file of the token counts is missing or damaged.
        """
        by_source, train = {}, []
        ids = read_token_counts(self.directory, self.manifest)
        for source in self.spec.sources:
            shards = {split: self.manifest.shards[split][source.name] for split in SPLITS}
            totals = {
                split: {
                    what: sum(getattr(shard, what) for shard in found)
                    for what in ("documents", "characters", "tokens")
                }
                for split, found in shards.items()
            }
            by_source[source.name] = {
                "language": source.language,
                **totals,
                "bad_records": sum(
                    shard.bad_records for found in shards.values() for shard in found
                ),
            }
            of_train = totals["train"]
            text = ids[source.name]
            image_tokens = of_train["tokens"] - int(text.sum())
            counts = Counts(of_train["documents"], of_train["characters"], text, image_tokens)
            train.append(counts)
        return corpus_facts(self.spec, by_source, train)


def cache_plan(
    spec: MixtureSpec,
    corpus: CorpusConfig,
    tokenizer: "TokenizerConfig",
    fingerprints: Mapping[str, str],
    names: tuple[str, ...],
    images: Plan | None = None,
) -> Plan:
    """What a cache is made from; see `Manifest`.

    Args:
        spec: all sources, also those that are not cached: the tokenizer may be trained on them.
        corpus: how their documents are made.
        tokenizer: what they are tokenised with.
        fingerprints: of the sources' files, by name.
        names: the sources that are cached.
        images: what their images depend on, if there are any.

    Raises:
        UserError: the tokenizer that is named cannot be read.
    """
    if tokenizer.path is None:
        made = {name: getattr(tokenizer, name) for name in _TOKENIZER_SETTINGS}
    else:
        made = {"given": load_tokenizer(tokenizer.path).fingerprint}
    settings = spec.settings()
    return {
        "cache": {"format": FORMAT, "sources": list(names)},
        "corpus": {name: _json(getattr(corpus, name)) for name in _CORPUS_SETTINGS},
        "tokenizer": made,
        "fingerprint": dict(fingerprints),
        **settings,
        **(images or {}),
    }


def open_cache(config: CorpusConfig, model: ModelConfig | None = None) -> OpenedCache:
    """Opens the cache that `corpus.cache` names.

    The sources and their rates are those of the mixture file, where the run names one, and else
    those that the cache was made with.

    Args:
        config: names it.
        model: reads the images that it may have.

    Raises:
        UserError: no complete cache, one that lacks a source or was made with other settings than
            the run's or for a model that reads images otherwise, or missing or damaged files.
    """
    directory = Path(str(config.cache)).expanduser()
    manifest = read_manifest(directory)
    _refuse_others(directory, "corpus", config, manifest.plan["corpus"])
    spec = _spec(directory, manifest) if config.mixture is None else read_mixture(config)
    bad = BadRecords(config.max_bad_records)
    return OpenedCache(
        directory=directory,
        manifest=manifest,
        spec=spec,
        sources=tuple(_source(directory, manifest, source, model, bad) for source in spec.sources),
        tokenizer=cache_tokenizer(directory, manifest.tokenizer),
    )


def _source(
    directory: Path,
    manifest: Manifest,
    spec: SourceSpec,
    model: ModelConfig | None,
    bad: BadRecords,
) -> CachedSource:
    if spec.name not in manifest.shards["train"]:
        raise UserError(
            f"{spec.where('name')}: the cache {directory} has no such source; it has "
            f"{', '.join(manifest.shards['train'])}"
        )
    dtype = np.dtype(manifest.tokenizer["dtype"])
    shards = {split: manifest.shards[split][spec.name] for split in SPLITS}
    content = manifest.fingerprint(spec.name)
    documents: dict[str, CachedDocuments | CachedImageTexts] = {
        split: CachedDocuments(directory, found, dtype) for split, found in shards.items()
    }
    if spec.name not in manifest.shards.get(IMAGES, {}):
        return CachedSource(spec=spec, documents=documents, content=content)
    check_reads_images(spec.where("format"), model)
    assert model is not None
    if spec.denoisers is not None:
        raise UserError(f"{spec.where('denoisers')}: the source has images: leave it out")
    tower = check_images_plan(directory, manifest.plan, model)
    slot = pixel_slot(model) if tower is None else feature_slot(model)
    images = CachedRecords(directory, manifest.shards[IMAGES][spec.name])
    documents = {
        split: CachedImageTexts(
            spec.name, CachedRecords(directory, found), images, dtype, slot, bad
        )
        for split, found in shards.items()
    }
    return CachedSource(spec=spec, documents=documents, content=content, tower=tower)


def _spec(directory: Path, manifest: Manifest) -> MixtureSpec:
    """The mixture that the cache was made with."""
    sources = []
    for name in manifest.shards["train"]:
        settings = dict(manifest.plan[f"source {name}"])
        if isinstance(settings["denoisers"], list):
            settings["denoisers"] = tuple(settings["denoisers"])
        sources.append(
            SourceSpec(name=name, path=str(directory), file=directory / MANIFEST, **settings)
        )
    temperature = manifest.plan["mixture"]["temperature"]
    return MixtureSpec(sources=tuple(sources), temperature=temperature)


def _refuse_others(directory: Path, section: str, chosen: Any, made: Mapping[str, Any]) -> None:
    """Refuses settings that a run names and that the cache was not made with."""
    defaults = {field.name: field.default for field in dataclasses.fields(chosen)}
    for name, was in made.items():
        value = getattr(chosen, name)
        if value != defaults[name] and _json(value) != was:
            raise UserError(
                f"corpus.cache: {directory} was made with {section}.{name} = {was}, not {value}: "
                "make another cache, or leave the setting out"
            )


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
