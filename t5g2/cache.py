"""`t5g2 cache`: a run's documents, tokenised once, as shards that runs train from."""

import argparse
import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path

from t5g2.config import did_you_mean
from t5g2.data.cache import verify_cache
from t5g2.data.cache_format import IMAGES, TOKENIZER_DIR, Manifest
from t5g2.data.cache_image_writing import FeaturePart, ImagePart, ImageTextPart
from t5g2.data.cache_images import images_plan
from t5g2.data.cache_workers import usable_cores, write_in_processes
from t5g2.data.cache_writing import (
    CacheWriter,
    Part,
    Todo,
    begin_cache,
    begun_cache,
    cache_directory,
    write_cache,
)
from t5g2.data.cached_corpus import cache_plan
from t5g2.data.corpus import TokenizerConfig, check_mixture, make_tokenizer
from t5g2.data.sources.config import CorpusConfig
from t5g2.data.sources.image_text import ImageDocuments, ImageRecords
from t5g2.data.sources.mixture_file import MixtureSpec, read_mixture
from t5g2.data.sources.opening import SPLITS, TextSource, open_mixture
from t5g2.errors import UserError
from t5g2.initialization import starting_tokenizer
from t5g2.models.config import ModelConfig
from t5g2.reporting.numbers import grouped
from t5g2.reporting.progress import Progress
from t5g2.settings import read_settings
from t5g2.visual_tokens import Tower

Run = Callable[[CacheWriter, list[Todo]], None]


def run(args: argparse.Namespace) -> int:
    """Makes the cache `--out`, or checks the cache `--verify`."""
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers must be at least 1, not {args.workers}")
    workers = args.workers or usable_cores()
    if args.verify is not None:
        return _verify(Path(args.verify), workers)
    if args.runner is None and args.runner_option:
        raise UserError("--runner_option is for --runner")
    settings = read_settings(args.gin_file, args.gin_bindings, args.gin_search_paths)
    check_mixture(settings.corpus, settings.data)
    tokenizer = starting_tokenizer(settings)
    manifest = make_cache(
        settings.corpus,
        tokenizer,
        Path(args.out),
        tasks=args.task,
        workers=workers,
        runner=args.runner,
        runner_options=args.runner_option,
        model=settings.model,
        vision=None if args.vision is None else Path(args.vision),
    )
    shards = list(manifest.all_shards())
    images = sum(
        shard.documents for found in manifest.shards.get(IMAGES, {}).values() for shard in found
    )
    print(
        f"{args.out}: {grouped(sum(shard.tokens for shard in shards))} tokens of "
        f"{grouped(sum(shard.documents for shard in shards) - images)} documents"
        f"{f' with {grouped(images)} images' if images else ''} in "
        f"{grouped(sum(shard.bytes for shard in shards))} bytes, {len(shards)} shards; "
        f"train from it with --gin.corpus.cache={args.out}"
    )
    return 0


def make_cache(
    corpus: CorpusConfig,
    tokenizer_config: TokenizerConfig,
    out: Path,
    *,
    tasks: list[str],
    workers: int,
    runner: str | None = None,
    runner_options: list[str] | None = None,
    model: ModelConfig | None = None,
    vision: Path | None = None,
) -> Manifest:
    """Makes a cache, or goes on with one that was begun.

    Args:
        corpus: which sources.
        tokenizer_config: their tokenizer; a trained one is trained as a run over all of them does.
        out: the cache.
        tasks: names of the sources to cache; none: all.
        workers: number of processes.
        runner: an Apache Beam runner to use in their place.
        runner_options: Beam's options for it, as NAME=VALUE.
        model: reads the images that there may be.
        vision: checkpoint whose tower's visual tokens are stored in place of images; they are made
            in this process, on its devices.

    Raises:
        UserError: anything that the user can mend.
    """
    if corpus.cache is not None:
        raise UserError("corpus.cache names a cache to train from: t5g2 cache reads the text")
    if runner is not None:
        # Here already: a missing package is told before the work.
        from t5g2.data.cache_beam import write_with_beam
    spec = read_mixture(corpus)
    names = _chosen(spec, tasks)
    with cache_directory(out), Progress(0) as progress:
        with progress.stage("sources"):
            sources = open_mixture(spec, corpus, model)
            fingerprints = {source.name: source.fingerprint() for source in sources}
        for source in sources:
            if source.name in names and source.has_prompts:
                raise UserError(
                    f"{source.spec.where('format')}: prompted lines are not cached: leave the "
                    "source out by --task, or train without corpus.cache"
                )
        have_images = any(source.name in names and source.has_images for source in sources)
        if vision is not None and not have_images:
            raise UserError('--vision: no source has images (format = "image_text")')
        tower, images = None, None
        if have_images:
            assert model is not None
            with progress.stage("vision tower") if vision else contextlib.nullcontext():
                tower = Tower(vision, model) if vision else None
                images = images_plan(model, tower.fingerprint if tower else None)
        plan = cache_plan(spec, corpus, tokenizer_config, fingerprints, names, images)
        tokenizer = begun_cache(out, plan)
        if tokenizer is None:
            with progress.stage("tokenizer"):
                home = out / TOKENIZER_DIR
                tokenizer = make_tokenizer(tokenizer_config, spec, sources, home, model)
            begin_cache(out, plan, tokenizer)
        with progress.stage("counting documents"):
            parts = tuple(
                _part(source, split, corpus.heldout_share)
                for split in SPLITS
                for source in sources
                if source.name in names
            )
            parts += tuple(
                _images(source, tower)
                for source in sources
                if source.name in names and source.has_images
            )
        writer = CacheWriter(
            directory=out,
            parts=parts,
            tokenizer=tokenizer,
            max_bad_records=corpus.max_bad_records,
        )
        if runner is None:
            return write_cache(writer, plan, functools.partial(_on_this_machine, writer, workers))

        def on_runner(todo: list[Todo]) -> None:
            made_here, others = _divided(writer, todo)
            for each in made_here:
                writer.write(each, lambda documents, tokens: None)
            write_with_beam(writer, others, str(runner), runner_options or [])

        with progress.stage(f"writing with {runner}"):
            return write_cache(writer, plan, on_runner)


def _chosen(spec: MixtureSpec, tasks: list[str]) -> tuple[str, ...]:
    known = [source.name for source in spec.sources]
    for name in tasks:
        if name not in known:
            guess = did_you_mean(name, known)
            raise UserError(f"--task: no source {name}{guess or '; there are ' + ', '.join(known)}")
    return tuple(name for name in known if not tasks or name in tasks)


def _part(source: TextSource, split: str, heldout_share: float) -> Part:
    counts = {name: len(documents) for name, documents in source.documents.items()}
    source.check_splits(counts, heldout_share)
    documents = source.documents[split]
    if isinstance(documents, ImageDocuments):
        return ImageTextPart(split=split, source=source.name, texts=documents)
    return Part(split=split, source=source.name, texts=documents)


def _images(source: TextSource, tower: Tower | None) -> Part:
    """The images of a source, or what a tower makes of them."""
    records = source.records
    assert isinstance(records, ImageRecords)
    if tower is None:
        return ImagePart(source=source.name, texts=records.images, records=records)
    assert tower.model.vision is not None
    return FeaturePart(
        source=source.name,
        texts=records.images,
        records=records,
        tower=tower,
        image_size=tower.model.vision.image_size,
    )


def _divided(writer: CacheWriter, todo: list[Todo]) -> tuple[list[Todo], list[Todo]]:
    """The shards that need this process' devices, and the others."""
    made_here = [each for each in todo if isinstance(writer.parts[each.part], FeaturePart)]
    return made_here, [each for each in todo if each not in made_here]


def _on_this_machine(writer: CacheWriter, workers: int, todo: list[Todo]) -> None:
    everything = writer.todo()
    total = sum(len(part.texts) for part in writer.parts)
    done = total - sum(writer.documents(each) for each in todo)
    with Progress(total, unit="document") as progress:
        if len(todo) < len(everything):
            progress.message(
                f"going on: {len(everything) - len(todo)} of {len(everything)} shards stand"
            )
        began, tokens = time.monotonic(), 0

        def report(more_documents: int, more_tokens: int) -> None:
            nonlocal done, tokens
            done, tokens = done + more_documents, tokens + more_tokens
            progress.update(done, tokens_per_second=tokens / (time.monotonic() - began))

        made_here, others = _divided(writer, todo)
        for each in made_here:
            writer.write(each, report)
        write_in_processes(writer, others, workers, report)


def _verify(directory: Path, workers: int) -> int:
    with Progress(0) as progress, progress.stage(f"verifying {directory}"):
        count = verify_cache(directory, workers)
    print(f"{directory}: all {count} shards are as the manifest says")
    return 0
