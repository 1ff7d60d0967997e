"""`t5g2 inspect data|config|checkpoint`: what goes into a run, and what it saved."""

import argparse
from pathlib import Path

from t5g2 import settings
from t5g2.checkpoints.manifest import verify
from t5g2.checkpoints.store import array_shapes, read_meta
from t5g2.data.cache_format import TOKENIZER_DIR
from t5g2.data.corpus import Corpus, open_corpus, reopen_corpus, row_stream
from t5g2.data.inspection import SourceFacts, summarise
from t5g2.data.sources.opening import TextSource
from t5g2.data.tokenizer import load_tokenizer
from t5g2.errors import UserError
from t5g2.files import to_path, write_atomically
from t5g2.inspect_batch import make_again
from t5g2.parallel.mesh import configure_devices
from t5g2.planning.placement import placement
from t5g2.reporting.data_page import as_page
from t5g2.reporting.data_text import as_text


def data(args: argparse.Namespace) -> str:
    """Examples and statistics of the data."""
    if (args.run_dir is None) == (not args.gin_file):
        raise UserError("give either --run_dir or --gin_file")
    one = args.step is not None or args.batch is not None
    if one and (args.run_dir is None or args.split != "train"):
        raise UserError("--step and --batch are of the training data of a run: give --run_dir")
    if args.run_dir is not None:
        run_dir = to_path(args.run_dir)
        chosen = settings.overridden(settings.run_settings(run_dir), args.gin_bindings)
        corpus = reopen_corpus(chosen.corpus, run_dir, chosen.model)
    else:
        chosen = settings.read_settings(args.gin_file, args.gin_bindings, args.gin_search_paths)
        path, cache = chosen.tokenizer.path, chosen.corpus.cache
        if path is None and cache is None:
            raise UserError(
                f"{args.gin_file[-1]} trains its tokenizer in the run: give --run_dir of a run, or "
                "--gin.tokenizer.path"
            )
        tokenizer = load_tokenizer(path or f"{cache}/{TOKENIZER_DIR}")
        corpus = open_corpus(chosen.corpus, tokenizer, chosen.model)
    chosen_data = chosen.data
    again = None
    if one:
        rows = row_stream(corpus, "train", chosen_data, chosen.rows)
        again = make_again(to_path(args.run_dir), rows, step=args.step, batch=args.batch)
    summary = summarise(
        corpus.mixture(args.split, chosen_data),
        corpus.tokenizer,
        rows=chosen.rows,
        inputs_length=chosen_data.inputs_length,
        targets_length=chosen_data.targets_length,
        images_per_row=chosen_data.images_per_row,
        seed=chosen_data.seed,
        examples=args.examples,
        batches=1 if again else args.batches,
        total_steps=chosen.train.total_steps if args.split == "train" else None,
        about=lambda name: _about(corpus, name, args.split),
        cursors=again and again.cursors,
    )
    if args.html is None:
        return as_text(summary) if again is None else f"{again.said}\n\n{as_text(summary)}"
    page = to_path(args.html)
    try:
        write_atomically(page, as_page(summary, Path(args.run_dir or args.gin_file[-1]).stem))
    except OSError as error:
        raise UserError(f"--html {page} cannot be written: {error.strerror}") from None
    return f"{page}: open it in a browser"


def _about(corpus: Corpus, name: str, split: str) -> SourceFacts:
    """What a corpus knows of a source; its bad records are those that were met so far."""
    (source,) = (source for source in corpus.sources if source.name == name)
    counted = corpus.facts.get("sources", {}).get(name)
    met = source.bad.count(name) if isinstance(source, TextSource) else 0
    return SourceFacts(
        language=source.spec.language,
        tokens=counted and counted[split]["tokens"],
        bad_records=max(met, counted["bad_records"] if counted else 0),
    )


def config(args: argparse.Namespace) -> str:
    """Every setting with its value, and the parameters."""
    chosen = settings.read_settings(args.gin_file, args.gin_bindings, args.gin_search_paths)
    configure_devices(chosen.mesh)
    return "\n".join([chosen.to_gin(), *placement(chosen)])


def checkpoint(args: argparse.Namespace) -> str:
    """What a checkpoint holds."""
    path = to_path(args.checkpoint)
    meta = read_meta(path)
    verdict = verify(path)
    shapes = array_shapes(path / "params")
    total = sum(size for _, _, size in shapes)
    facts = {
        "step": meta["step"],
        "tokens": f"{meta['tokens']:,} ({meta['target_tokens']:,} targets)",
        "averaged steps": ", ".join(map(str, meta.get("averaged_steps", []))) or "none",
        "configuration": meta.get("config_hash") or f"none: imported from {meta['imported_from']}",
        "data digest": f"{meta['digest']:08x}",
        "resumable": "yes" if (path / "optimizer").is_dir() else "no: parameters alone",
        "written by": ", ".join(f"{name} {v}" for name, v in meta["versions"].items()),
        "verified": "no: written before checkpoints had checksums"
        if verdict is None
        else f"yes: {verdict.files} files, {verdict.size:,} bytes",
        "parameters": f"{total:,}",
    }
    lines = [f"{name + ':':16} {value}" for name, value in facts.items()]
    lines += [f"  {name:44} {shape!s:24} {size:>14,}" for name, shape, size in shapes]
    return "\n".join(lines)
