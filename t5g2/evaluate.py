"""`t5g2 evaluate`: held-out loss of a checkpoint, by denoiser, by source and by language."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax

from t5g2 import settings
from t5g2.data.corpus import open_corpus, row_stream
from t5g2.errors import UserError
from t5g2.evaluation import HeldOut
from t5g2.models.t5gemma2 import logical_axes
from t5g2.parallel.mesh import check_rows, configure_devices, make_mesh
from t5g2.parallel.rules import parameter_shardings
from t5g2.pretrained import load
from t5g2.reporting.task_losses import TaskNames, regrouped
from t5g2.training.metrics import MeanLoss
from t5g2.training.step import jit_eval_step
from t5g2.visual_tokens import check_tower


def run(args: argparse.Namespace) -> int:
    """Prints the loss of `--checkpoint` on the held-out documents of a configuration.

    The configuration is that of the gin files, or without any the checkpoint's own.
    """
    pretrained = load(Path(args.checkpoint))
    if args.gin_file:
        chosen = settings.read_settings(args.gin_file, args.gin_bindings, args.gin_search_paths)
    elif "settings" in pretrained.meta:
        own = settings.from_json(pretrained.meta["settings"])
        chosen = settings.overridden(own, args.gin_bindings)
    else:
        raise UserError(f"{args.checkpoint} does not say what to evaluate on: give --gin_file")
    configure_devices(chosen.mesh)
    mesh = make_mesh(chosen.mesh)
    check_rows(mesh, chosen.rows, 1)
    corpus = open_corpus(chosen.corpus, pretrained.tokenizer, pretrained.config)
    check_tower(corpus, pretrained.params)
    stream = row_stream(corpus, "heldout", chosen.data, chosen.rows)
    config = pretrained.config
    shardings = parameter_shardings(mesh, logical_axes(config), pretrained.params)
    step = jit_eval_step(mesh, shardings, config=config, num_tasks=len(stream.tasks))
    heldout = HeldOut(stream, step, mesh, chosen.evaluation.batches)
    mean = heldout.loss(jax.device_put(pretrained.params, shardings))
    print(f"held-out loss {mean.loss:.4f} nats/token over {mean.targets:,} target tokens")
    names = TaskNames({source.name: source.spec.language for source in corpus.sources})
    for line in _by_group(mean, names):
        print(line)
    return 0


def _by_group(mean: MeanLoss, names: TaskNames) -> Iterator[str]:
    """A line for each denoiser, source and language: loss and number of target tokens."""
    kinds = names.kinds()
    for by in kinds:
        (group,) = regrouped([mean._asdict()], names, by)
        if len(kinds) > 1:
            yield f"by {by}"
        width = max(map(len, group["by_task"]), default=0)
        for name, loss in group["by_task"].items():
            yield f"  {name:{width}}  {loss:.4f}  {group['targets_by_task'][name]:>11,} targets"
