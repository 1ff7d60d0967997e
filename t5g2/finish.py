"""What a run leaves behind: averaged weights, their export, infillings, figures, the report."""

import json
from pathlib import Path
from typing import Any

import jax

from t5g2.checkpoints.average import write_average
from t5g2.checkpoints.keeping import CheckpointStore
from t5g2.checkpoints.store import read_arrays
from t5g2.data.corpus import Corpus
from t5g2.evaluation import HeldOut
from t5g2.export import export_checkpoint
from t5g2.files import remove, write_atomically
from t5g2.infilling import Infillings, fill_in
from t5g2.parallel import hosts
from t5g2.pretrained import load
from t5g2.reporting.metrics_log import MetricsLog, NoLog, has_metrics, read_metrics
from t5g2.reporting.plots import plot_loss
from t5g2.reporting.progress import Progress
from t5g2.reporting.report import write_report
from t5g2.settings import Settings

AVERAGED_DIR = "averaged"
EXPORT_DIR = "export"
SAMPLES_FILE = "samples.json"


def is_finished(run_dir: Path) -> bool:
    """Whether a run has come to its end, results included."""
    return has_metrics(run_dir) and bool(read_metrics(run_dir).summary)


def write_figures(run_dir: Path) -> None:
    """Writes `loss.png` and `report.html` from what the run directory holds."""
    history = read_metrics(run_dir)
    if history.train:
        plot_loss(history, run_dir / "loss.png")
    write_report(run_dir)


def finish(
    run_dir: Path,
    settings: Settings,
    corpus: Corpus,
    store: CheckpointStore,
    heldout: HeldOut,
    params_shardings: Any,
    log: MetricsLog | NoLog,
    progress: Progress,
) -> None:
    """Averages, evaluates, exports, fills in samples, and writes the summary, which ends the run.

    What an interrupted earlier attempt left is made again.
    """
    step, wanted = settings.train.total_steps, max(settings.finish.average_last, 1)
    chosen = store.newest_permanent(wanted) if hosts.is_first() else []
    for told in store.news():
        log.write("event", step, level="warning", message=told)
        progress.message(told)
    averaged = [checkpoint.step for checkpoint in chosen]
    if len(averaged) < wanted:
        progress.message(
            f"finish.average_last is {wanted} but only {len(averaged)} can be averaged"
        )
    result = run_dir / AVERAGED_DIR
    with progress.stage(f"averaging steps {', '.join(map(str, averaged))}"):
        if hosts.is_first():
            remove(result)
            write_average([checkpoint.path for checkpoint in chosen], result)
        hosts.barrier("averaged")
        params = read_arrays(result / "params")
    loss = heldout.loss(jax.device_put(params, params_shardings))
    if not hosts.is_first():
        return
    log.write("eval", step, split="heldout", weights="averaged", **loss._asdict())
    entropy = corpus.facts["unigram_entropy"]
    history = read_metrics(run_dir)
    last = [row["loss"] for row in history.eval if row["weights"] == "last"][-1]
    progress.message(
        f"held-out loss: averaged {loss.loss:.3f}, last {last:.3f} nats/token; unigram entropy "
        f"of the corpus: {entropy:.3f}"
    )
    source = result
    if settings.finish.export:
        source = run_dir / EXPORT_DIR
        with progress.stage(f"exporting to {source}"):
            remove(source)
            export_checkpoint(result, source)
    if settings.finish.samples:
        with progress.stage("filling in held-out text"):
            samples = fill_in(load(source), Infillings(corpus, settings, settings.finish.samples))
        write_atomically(run_dir / SAMPLES_FILE, json.dumps(samples, indent=1))
        for sample in samples:
            progress.message(
                f"--- {sample['task']}\n{sample['input']}\n"
                f"    predicted: {sample['prediction']!r}\n    truth:     {sample['target']!r}"
            )
    log.write(
        "summary",
        step,
        unigram_entropy=entropy,
        heldout_loss_last=last,
        heldout_loss_averaged=loss.loss,
        checkpoints_averaged=averaged,
        export=str(source) if settings.finish.export else None,
    )
