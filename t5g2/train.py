"""The pretraining job: `t5g2 train`. It goes on where the run's last checkpoint stands."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from t5g2.activity import Activity
from t5g2.checkpoints.directory import clear_remains, has_checkpoint
from t5g2.checkpoints.keeping import CheckpointStore
from t5g2.checkpoints.store import CHECKPOINTS_DIR
from t5g2.compile_cache import use_compile_cache
from t5g2.data.corpus import (
    Corpus,
    accept_corpus,
    check_mixture,
    prepare_corpus,
    reopen_corpus,
    row_stream,
)
from t5g2.data.feed import Feed
from t5g2.data.loader import RowBatches
from t5g2.evaluation import Averages, HeldOut
from t5g2.files import to_path, write_atomically
from t5g2.finish import finish, is_finished, write_figures
from t5g2.infilling import InfillingsInTraining
from t5g2.initialization import load_teacher, starting_tokenizer
from t5g2.kernels.attention import choose_backend
from t5g2.parallel import hosts
from t5g2.parallel.mesh import configure_devices, make_mesh
from t5g2.parallel.rules import batch_shardings, check_room, make_layout, row_sharding
from t5g2.planning.rate import FlopRate
from t5g2.recovery import Recovery
from t5g2.reporting.goodput import goodput_line
from t5g2.reporting.metrics_log import MetricsLog, NoLog, read_metrics
from t5g2.reporting.progress import Nowhere, Progress
from t5g2.reporting.wandb_log import WandbLog
from t5g2.run_lock import run_lock
from t5g2.settings import CONFIG_FILE, Settings, check_same_run, read_settings
from t5g2.signals import StopRequest
from t5g2.starting import (
    Position,
    check_run_dir,
    check_sizes,
    checkpoint_meta,
    run_facts,
    shorter_warmup,
    start_or_restore,
)
from t5g2.training.bad_steps import EXIT_CODE as EXIT_BAD_STEPS
from t5g2.training.bad_steps import Drawn, Guard
from t5g2.training.metrics import Meter
from t5g2.training.optimizer import make_optimizer
from t5g2.training.schedule import make_schedule
from t5g2.training.state import state_shardings
from t5g2.training.step import compile_train_step, jit_eval_step
from t5g2.visual_tokens import check_tower
from t5g2.watchdog import Stragglers, Watchdog


def run(args: argparse.Namespace) -> int:
    """Runs the job; see `train`."""
    settings = read_settings(args.gin_file, args.gin_bindings, args.gin_search_paths)
    return train(settings, to_path(args.run_dir), Activity(args.began))


def train(settings: Settings, run_dir: Path, activity: Activity | None = None) -> int:
    """Trains until the end, `train.stop_at`, or SIGINT or SIGTERM.

    Returns:
        0 when done or stopped at `train.stop_at`; 128 + the number of the signal that stopped it,
        once everything is saved; 3 if `bad_steps` stopped it.

    Raises:
        UserError: anything that the user can mend.
    """
    activity = activity or Activity()
    check_run_dir(run_dir)
    accepted = check_same_run(run_dir, settings)
    total = settings.train.total_steps
    if is_finished(run_dir):
        print(f"{run_dir} is complete ({total} steps): see {run_dir / 'report.html'}")
        return 0

    # ---- Devices
    configure_devices(settings.mesh)
    hosts.start(settings.hosts)
    use_compile_cache(run_dir)
    mesh = make_mesh(settings.mesh)
    parts = settings.batch_parts(mesh)
    layout = make_layout(mesh, settings.mesh.rules)
    room = (settings.data.inputs_length, settings.data.targets_length)
    check_room(layout, settings.model, room)
    attention_backend = choose_backend(settings.model.attention, mesh.abstract_mesh)

    stream = None if hosts.is_first() else Nowhere()
    with run_lock(run_dir) as told_by_lock, Progress(total, stream=stream) as progress:
        if told_by_lock:
            progress.message(told_by_lock)
        # ---- Data
        if hosts.is_first() and (remains := clear_remains(run_dir)):
            progress.message(f"removed what a killed run left: {', '.join(remains)}")
        with hosts.first_goes_first("corpus"):
            corpus, changes = _corpus(settings, run_dir, progress)
        accepted += changes
        rows, heldout_rows = (
            row_stream(corpus, "train", settings.data, settings.rows),
            row_stream(corpus, "heldout", settings.data, settings.rows),
        )
        check_sizes(settings, corpus)
        progress.message(f"batch: {parts}")
        if hosts.is_first():
            write_atomically(run_dir / CONFIG_FILE, settings.to_gin())
        tasks = [task.name for task in rows.tasks]

        # ---- Model
        schedule = make_schedule(settings.schedule, total)
        optimizer = make_optimizer(settings.optimizer, schedule)
        shapes, shardings = state_shardings(settings.model, optimizer, layout)
        teacher = None
        if settings.train.teacher is not None:
            path = to_path(settings.train.teacher)
            with progress.stage("reading the teacher"):
                teacher = load_teacher(path, settings.model, corpus.tokenizer, layout)
        with activity.during("compile"), progress.stage("compiling"):
            train_step = compile_train_step(
                layout,
                shapes,
                shardings,
                rows=rows.rows,
                room=rows.room,
                images=rows.images,
                config=settings.model,
                optimizer=optimizer,
                num_tasks=len(tasks),
                accumulation=parts.accumulation,
                teacher=teacher,
                z_loss=settings.train.z_loss,
            )
        eval_step = jit_eval_step(
            layout,
            shardings.params,
            config=settings.model,
            num_tasks=len(tasks),
            accumulation=parts.accumulation,
        )
        heldout = HeldOut(heldout_rows, eval_step, layout, settings.evaluation.batches)

        # ---- State: restored, or new
        wandb = WandbLog(settings.wandb, run_dir, progress.message)
        log = MetricsLog(run_dir, wandb) if hosts.is_first() else NoLog()
        store = CheckpointStore(
            run_dir / CHECKPOINTS_DIR, settings.checkpoints, settings.finish.average_last, log.flush
        )
        with store, log, Watchdog(settings.watchdog, activity, run_dir):

            def begin() -> Position:
                return start_or_restore(
                    settings, run_dir, store, rows, optimizer, shapes, shardings, progress, activity
                )

            step, state, cursors, totals, number, guarded = begin()
            check_tower(corpus, state.params)
            rate = FlopRate.of_run(settings.model, rows, mesh)
            facts = run_facts(settings, corpus, rows, shapes, mesh) | rate.facts()
            facts |= {"attention": attention_backend, "batch": parts.to_json()}
            log.start(step, began=activity.began, seconds=activity.seconds(), **facts)
            progress.message(f"attention: {attention_backend}")

            def warn(told: str, at: int | None = None, **values: Any) -> None:
                values = {"level": "warning", "message": told, **values}
                log.write("event", step if at is None else at, **values)
                progress.message(told)

            for told in store.news():
                warn(told)
            if accepted:
                warn(f"train.accept_changes: {'; '.join(accepted)}")
            if shorter := shorter_warmup(settings):
                progress.message(shorter)
            infillings = InfillingsInTraining(run_dir, corpus, settings, step)
            progress.announce(save=settings.checkpoints.every, evaluation=settings.evaluation.every)

            # ---- The loop
            by_row = row_sharding(layout)
            first, count = hosts.own_rows(by_row, rows.rows)
            agreed, save_wanted = hosts.Agreement(mesh), hosts.Agreement(mesh)
            stragglers = Stragglers(settings.watchdog, mesh)
            room = (rows.rows * rows.room[0], rows.rows * rows.room[1])
            last = min(total, settings.train.stop_at or total)
            recovery = Recovery(settings.bad_steps, run_dir, store, rows, first, warn)

            def watched() -> tuple[Guard, Meter]:
                guard = Guard(settings.bad_steps, mesh, guarded)
                return guard, Meter(tasks, room, schedule, totals, guard.watch)

            guard, meter = watched()

            def batches_after(cursors: Any) -> RowBatches:
                return RowBatches(rows, cursors, first, count, settings.data.workers)

            def record() -> None:
                values = meter.record(step)
                values |= rate.of(values["step_seconds"]) | {"seconds": activity.seconds()}
                log.write("train", step, **values)
                progress.update(step, **values)
                waited = activity.seconds()["data"]
                if told := stragglers.told(step, values["step_seconds"], waited):
                    warn(told, level="info")

            def save(write: Callable[..., None]) -> None:
                meta = checkpoint_meta(settings, rows, meter.totals())
                meta |= {"batch": feed.number, "guard": guard.state(), **recovery.meta()}
                in_turn = step % settings.checkpoints.every == 0 or step == total
                placed = hosts.to_devices(by_row, cursors, rows.rows)
                with activity.during("save"):
                    write(state, placed, meta, temporary=not in_turn)

            averages = Averages(store, settings.finish.average_last, shardings.params)
            average_every = settings.evaluation.average_every

            def evaluate(weights: str, params: Any, **facts: Any) -> None:
                with activity.during("evaluation"):
                    loss = heldout.loss(params)
                log.write("eval", step, split="heldout", weights=weights, **loss._asdict(), **facts)
                progress.message(
                    f"step {step}: held-out loss of the {weights} weights {loss.loss:.3f} "
                    "nats/token"
                )

            with Feed(batches_after) as feed, StopRequest() as stop:
                feed.begin(cursors, number, recovery.left_out)
                while step < last and not stop.hear(agreed(stop.signal or 0)):
                    activity.enter("data")
                    batch, cursors = next(feed)
                    # Not waited for in vain if the devices still had to do.
                    activity.enter("step", booked="step" if meter.devices_work() else None)
                    batch = hosts.to_devices(batch_shardings(layout, batch), batch, rows.rows)
                    with jax.transfer_guard("disallow"):
                        state, metrics = train_step(state, batch, guard.limits)
                    step += 1
                    activity.stepped(step)
                    meter.add(metrics)
                    guard.add(Drawn(step, feed.number, feed.before, cursors))

                    due = step % settings.checkpoints.every == 0
                    evaluates = step % settings.evaluation.every == 0 or step == total
                    if step % settings.train.log_every == 0 or step == last:
                        record()
                        if step % settings.train.log_every == 0:
                            guard.renew()
                        # Out of turn only here: a resumed run's records are over the same steps.
                        due |= bool(save_wanted(store.wants_save()))
                    if due or evaluates:
                        meter.pause()
                    recovery.tell(guard)
                    if recovery.rolls_back(guard):
                        del state  # there may be no room for two
                        step, state, cursors, totals, number, guarded = begin()
                        log.rewind(step, seconds=activity.seconds())
                        guard, meter = watched()
                        feed.begin(cursors, number, recovery.left_out)
                        continue
                    if guard.stop:
                        break
                    if evaluates:
                        evaluate("last", state.params)
                        infillings.take(step, state.params)
                    if due:
                        save(store.save)
                    if average_every and step % average_every == 0 and step < total:
                        meter.pause()
                        params, averaged = averages.newest()
                        if averaged:
                            evaluate("averaged", params, checkpoints=averaged)
                        del params
                    for told in store.news():
                        warn(told)
                if meter.pending:
                    record()
                recovery.tell(guard)
                saved = store.wait()
                if guard.sound and saved < step:
                    save(store.save_at_the_end)
                    saved = step
                for told in store.news():
                    warn(told)

            # ---- The end, or the end for now
            activity.enter("finish")
            if guard.stop:
                warn(f"{guard.stop}; the last checkpoint is of step {saved}: see docs/running.md")
            elif stop.signal is not None:
                log.write("event", step, level="warning", message=f"stopped by {stop.signal.name}")
                progress.message(
                    f"{stop.signal.name}: saved step {saved}; the same command goes on from there"
                )
            elif step < total:
                progress.message(f"train.stop_at: saved step {step} of {total}")
            else:
                finish(run_dir, settings, corpus, store, heldout, shardings.params, log, progress)
            log.write("end", step, seconds=activity.seconds())
        if hosts.is_first():
            write_figures(run_dir)
            progress.message(goodput_line(read_metrics(run_dir)))
        progress.message(f"report: {run_dir / 'report.html'}")
    return EXIT_BAD_STEPS if guard.stop else stop.exit_code


def _corpus(settings: Settings, run_dir: Path, progress: Progress) -> tuple[Corpus, list[str]]:
    """A new run's corpus and tokenizer, made; those of a run with checkpoints, and what changed."""
    if has_checkpoint(run_dir / CHECKPOINTS_DIR):
        # What the run started from may be gone by now.
        with progress.stage("corpus"):
            if settings.train.accept_changes:
                return accept_corpus(settings.corpus, run_dir, progress.message, settings.model)
            return reopen_corpus(settings.corpus, run_dir, settings.model), []
    check_mixture(settings.corpus, settings.data)
    tokenizer = starting_tokenizer(settings)
    if tokenizer != settings.tokenizer:
        progress.message(f"tokenizer: that of train.init_from, {tokenizer.path}")
    stage, message = progress.stage, progress.message
    return prepare_corpus(settings.corpus, tokenizer, run_dir, stage, message, settings.model), []
