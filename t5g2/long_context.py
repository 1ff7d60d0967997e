"""`t5g2 long_context`: how well a checkpoint finds and uses what stands far apart."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5g2 import settings
from t5g2.config import did_you_mean
from t5g2.data.sources.mixture_file import read_mixture
from t5g2.data.sources.opening import open_mixture
from t5g2.errors import UserError
from t5g2.files import to_path, write_atomically
from t5g2.longcontext.curves import Point, plot, table
from t5g2.longcontext.families import FAMILIES
from t5g2.longcontext.haystack import Haystack, collected, read_haystack
from t5g2.longcontext.material import Material, read_questions
from t5g2.longcontext.measure import measure
from t5g2.pretrained import Pretrained, load
from t5g2.scoring import Scorer

# The name of the checkpoint's own held-out documents as a haystack.
CORPUS = "corpus"


def run(args: argparse.Namespace) -> int:
    """Prints the curves of `--checkpoint`, and writes them to `--out`."""
    families = _families(args.families)
    if min(args.lengths) < 1 or args.examples < 1:
        raise UserError("--lengths and --examples must be at least 1")
    pretrained = load(to_path(args.checkpoint))
    if args.rope_factor_global is not None:
        if not args.rope_factor_global > 0:
            raise UserError(f"--rope_factor_global must be above 0, not {args.rope_factor_global}")
        pretrained = interpolated(pretrained, args.rope_factor_global)
    questions = read_questions(to_path(args.questions)) if args.questions else ()
    material = Material(haystack=_haystack(args.haystack, pretrained), questions=questions)
    if args.families is None and not questions:
        families = [family for family in families if family != "qa"]
        print("without --questions there is no qa")
    scorer = Scorer(pretrained, tokens_per_batch=args.tokens_per_batch)
    points: list[Point] = []
    answers: list[dict[str, Any]] = []
    print(table([]))
    for family in families:
        for length in sorted(set(args.lengths)):
            point = measure(
                scorer,
                family,
                length,
                args.examples,
                material,
                seed=args.seed,
                form=args.form,
                record=answers.append,
            )
            points.append(point)
            print(table([point]).splitlines()[-1], flush=True)
            if args.out:
                _write(to_path(args.out), args, material, points, answers)
    return 0


def interpolated(pretrained: Pretrained, factor: float) -> Pretrained:
    """The model with its global layers' positions divided by `factor`."""
    config = dataclasses.replace(pretrained.config, rope_factor_global=factor)
    return Pretrained(config, pretrained.params, pretrained.tokenizer, pretrained.meta)


def _families(names: Sequence[str] | None) -> list[str]:
    for name in names or ():
        if name not in FAMILIES:
            guess = did_you_mean(name, FAMILIES)
            raise UserError(f"--families: no {name}{guess or '; there are ' + ', '.join(FAMILIES)}")
    return list(names or FAMILIES)


def _haystack(name: str | None, pretrained: Pretrained) -> Haystack | None:
    """The text that is named; by default the corpus, if the checkpoint has one."""
    if name not in (None, CORPUS):
        assert name is not None
        return read_haystack(to_path(name))
    if "settings" not in pretrained.meta:
        if name is None:
            return None
        raise UserError("--haystack corpus: the checkpoint does not say what it was trained on")
    corpus = settings.from_json(pretrained.meta["settings"]).corpus
    if corpus.cache is not None:
        raise UserError("the checkpoint was trained from a cache, which has no text: --haystack F")
    texts = [
        source
        for source in open_mixture(read_mixture(corpus), corpus, pretrained.config)
        if not source.has_images and not source.has_prompts
    ]
    if not texts:
        raise UserError("the checkpoint was not trained on text: give --haystack FILE")
    return collected(CORPUS, (text for source in texts for text in source.documents["heldout"]))


def _write(
    out: Path,
    args: argparse.Namespace,
    material: Material,
    points: Sequence[Point],
    answers: Sequence[dict[str, Any]],
) -> None:
    """Writes what is measured so far: `long_context.json`, `.svg`, and all answers."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "checkpoint": args.checkpoint,
        "haystack": material.haystack.name if material.haystack else None,
        "rope_factor_global": args.rope_factor_global,
        "form": args.form,
        "seed": args.seed,
        "curves": [dataclasses.asdict(point) for point in points],
    }
    write_atomically(out / "long_context.json", json.dumps(content, indent=1))
    write_atomically(out / "answers.jsonl", "".join(f"{json.dumps(line)}\n" for line in answers))
    lines = {p.family: [q for q in points if q.family == p.family] for p in points}
    plot(lines, out / "long_context.svg")
