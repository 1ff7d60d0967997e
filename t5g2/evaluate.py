"""`t5g2 evaluate`: held-out loss of a checkpoint, by denoiser, by source and by language."""

import argparse
from collections.abc import Iterator
from typing import Any

import jax

from t5g2 import settings
from t5g2.data.corpus import open_corpus, row_stream
from t5g2.data.tokenizer import load_tokenizer
from t5g2.errors import UserError
from t5g2.evaluate_tasks import evaluate_tasks, newest_checkpoint
from t5g2.evaluation import HeldOut, HeldOutLoss
from t5g2.files import to_path
from t5g2.models.t5gemma2 import logical_axes
from t5g2.parallel.mesh import configure_devices, make_mesh
from t5g2.parallel.rules import check_room, make_layout, parameter_shardings
from t5g2.pretrained import Pretrained, load
from t5g2.reporting.task_losses import TaskNames, regrouped
from t5g2.training.step import jit_eval_step
from t5g2.visual_tokens import check_tower


def run(args: argparse.Namespace) -> int:
    """Prints the loss of a checkpoint on the held-out documents of a configuration.

    The configuration is that of the gin files, or without any the checkpoint's own. With `--task`,
    see `evaluate_tasks`.
    """
    if args.task:
        _refuse(args, "--task takes no gin settings", "gin_file", "gin_bindings")
        if args.run_dir is None:
            _refuse(args, "--all and --follow are for a run: give --run_dir", "all", "follow")
        return evaluate_tasks(args)
    of_tasks = ("split", "examples", "inputs_length", "targets_length", "all", "follow", "out")
    _refuse(args, f"only with --task: {', '.join(f'--{name}' for name in of_tasks)}", *of_tasks)
    if args.run_dir is None:
        path = to_path(args.checkpoint)
    else:
        path = newest_checkpoint(to_path(args.run_dir))
    pretrained = load(path)
    if args.gin_file:
        chosen = settings.read_settings(args.gin_file, args.gin_bindings, args.gin_search_paths)
    elif "settings" in pretrained.meta:
        own = settings.from_json(pretrained.meta["settings"])
        chosen = settings.overridden(own, args.gin_bindings)
    else:
        raise UserError(f"{path} does not say what to evaluate on: give --gin_file")
    _check_lengths(chosen, pretrained.meta)
    if args.gin_file or args.gin_bindings:
        _check_tokenizer(chosen, pretrained)
    configure_devices(chosen.mesh)
    mesh = make_mesh(chosen.mesh)
    parts = chosen.batch_parts(mesh)
    layout = make_layout(mesh, chosen.mesh.rules)
    room = (chosen.data.inputs_length, chosen.data.targets_length)
    check_room(layout, pretrained.config, room)
    corpus = open_corpus(chosen.corpus, pretrained.tokenizer, pretrained.config)
    check_tower(corpus, pretrained.params)
    stream = row_stream(corpus, "heldout", chosen.data, chosen.rows)
    config = pretrained.config
    shardings = parameter_shardings(layout, logical_axes(config), pretrained.params)
    step = jit_eval_step(
        layout,
        shardings,
        config=config,
        num_tasks=len(stream.tasks),
        accumulation=parts.accumulation,
    )
    heldout = HeldOut(stream, step, layout, chosen.evaluation.batches)
    mean = heldout.loss(jax.device_put(pretrained.params, shardings))
    print(f"held-out loss {mean.loss:.4f} nats/token over {mean.targets:,} target tokens")
    names = TaskNames({source.name: source.spec.language for source in corpus.sources})
    for line in _by_group(mean, names):
        print(line)
    return 0


def _refuse(args: argparse.Namespace, message: str, *names: str) -> None:
    if any(getattr(args, name) not in (None, False, []) for name in names):
        raise UserError(message)


def _check_lengths(chosen: settings.Settings, meta: dict[str, Any]) -> None:
    """Refuses gin files that say other lengths than the checkpoint's run."""
    if "settings" not in meta:
        return
    own = settings.from_json(meta["settings"]).data
    for name in ("inputs_length", "targets_length"):
        asked, trained = getattr(chosen.data, name), getattr(own, name)
        if asked != trained:
            raise UserError(
                f"data.{name} is {asked}, but the checkpoint was trained with {trained}: losses "
                "would not compare; leave it out, or bind it to that"
            )


def _check_tokenizer(chosen: settings.Settings, pretrained: Pretrained) -> None:
    """Refuses gin files that name another tokenizer than the checkpoint's."""
    path = chosen.tokenizer.path
    own = pretrained.tokenizer.fingerprint
    if path is not None and load_tokenizer(path).fingerprint != own:
        raise UserError(
            f"tokenizer.path {path} is another tokenizer than the checkpoint's, "
            f"{pretrained.tokenizer.path}: leave it out"
        )


def _by_group(mean: HeldOutLoss, names: TaskNames) -> Iterator[str]:
    """Lines for each denoiser, source, language, modality and place: loss and target tokens."""
    groups: list[tuple[str, dict[str, float], dict[str, int]]] = []
    for by in names.kinds():
        (group,) = regrouped([mean._asdict()], names, by)
        groups.append((by, group["by_task"], group["targets_by_task"]))
    if len(mean.by_modality) > 1:
        groups.append(("modality", mean.by_modality, mean.targets_by_modality))
    groups.append(("position in the targets", mean.by_position, mean.targets_by_position))
    for head, losses, targets in groups:
        yield f"by {head}"
        width = max(map(len, losses), default=0)
        for name, loss in losses.items():
            yield f"  {name:{width}}  {loss:.4f}  {targets[name]:>11,} targets"
