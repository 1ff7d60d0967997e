"""What a run leaves behind: averaged weights, their export, infillings, figures, the report."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

from t5g2.checkpoints.average import write_average
from t5g2.checkpoints.keeping import CheckpointStore
from t5g2.checkpoints.store import read_arrays
from t5g2.data.corpus import Corpus
from t5g2.data.image_examples import ImageExample, ImagePrefix
from t5g2.data.images import shortened
from t5g2.data.mixture import Source
from t5g2.data.packing import Content, is_sequential
from t5g2.data.sampling import TaskChoice, permute
from t5g2.data.ul2 import Bits, Denoiser, Example, SpecialTokens, philox
from t5g2.evaluation import HeldOut
from t5g2.export import export_checkpoint
from t5g2.files import write_atomically
from t5g2.parallel import hosts
from t5g2.pretrained import Prompt, load
from t5g2.reporting.metrics_log import FILE_NAME, MetricsLog, NoLog, read_metrics
from t5g2.reporting.plots import plot_loss
from t5g2.reporting.progress import Progress
from t5g2.reporting.report import write_report
from t5g2.settings import Settings

AVERAGED_DIR = "averaged"
EXPORT_DIR = "export"
SAMPLES_FILE = "samples.json"


def is_finished(run_dir: Path) -> bool:
    """Whether a run has come to its end, results included."""
    path = run_dir / FILE_NAME
    return path.is_file() and bool(read_metrics(path).summary)


def write_figures(run_dir: Path) -> None:
    """Writes `loss.png` and `report.html` from what the run directory holds."""
    history = read_metrics(run_dir / FILE_NAME)
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
            shutil.rmtree(result, ignore_errors=True)
            write_average([checkpoint.path for checkpoint in chosen], result)
        hosts.barrier("averaged")
        params = read_arrays(result / "params")
    loss = heldout.loss(jax.device_put(params, params_shardings))
    if not hosts.is_first():
        return
    log.write("eval", step, split="heldout", weights="averaged", **loss._asdict())
    entropy = corpus.facts["unigram_entropy"]
    history = read_metrics(run_dir / FILE_NAME)
    last = [row["loss"] for row in history.eval if row["weights"] == "last"][-1]
    progress.message(
        f"held-out loss: averaged {loss.loss:.3f}, last {last:.3f} nats/token; unigram entropy "
        f"of the corpus: {entropy:.3f}"
    )
    source = result
    if settings.finish.export:
        source = run_dir / EXPORT_DIR
        with progress.stage(f"exporting to {source}"):
            shutil.rmtree(source, ignore_errors=True)
            export_checkpoint(result, source)
    if settings.finish.samples:
        with progress.stage("filling in held-out text"):
            samples = fill_in(source, corpus, settings)
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


def fill_in(model_dir: Path, corpus: Corpus, settings: Settings) -> list[dict[str, str]]:
    """Greedy infillings of held-out passages, under the mixture's denoisers by their rates.

    Returns:
        For each: task, input, target and prediction, as text with sentinels visible.
    """
    model, tokenizer = load(model_dir), corpus.tokenizer
    mixture = corpus.mixture("heldout", settings.data)
    tasks, length = mixture.tasks, settings.finish.sample_tokens
    seed, choose = settings.data.seed, TaskChoice(mixture.rates, settings.data.seed)
    passages = [_passages(source, length, seed) for source in mixture.sources]
    drawn: list[tuple[str, Example, Prompt]] = []
    for i in range(settings.finish.samples):
        task = tasks[choose(0, i)]
        passage = next(passages[task.source], None)
        if passage is None:
            continue
        example = _denoised(task.denoiser, passage, philox(seed, i), mixture.special)
        drawn.append((task.name, example, Prompt(example.inputs, passage.images)))
    if not drawn:
        return []
    longest = max(len(example.targets) for _, example, _ in drawn)
    made = model.generate_ids([prompt for _, _, prompt in drawn], longest)
    return [
        {
            "task": name,
            "input": shortened(tokenizer.decode(example.inputs[mixture.special.bos_on_inputs :])),
            "target": tokenizer.decode(example.targets[:-1]),
            "prediction": tokenizer.decode(ids),
        }
        for (name, example, _), ids in zip(drawn, made, strict=True)
    ]


class _Passage(NamedTuple):
    """A stretch of a document, or a whole example with its images."""

    content: Content
    images: UInt8[np.ndarray, "M size size 3"] | None = None


def _denoised(
    denoiser: Denoiser | ImagePrefix, passage: _Passage, bits: Bits, special: SpecialTokens
) -> Example:
    if isinstance(denoiser, ImagePrefix):
        assert isinstance(passage.content, ImageExample)
        return denoiser(passage.content, special)
    assert isinstance(passage.content, np.ndarray)
    return denoiser(passage.content, bits, special)


def _passages(source: Source, length: int, seed: int) -> Iterator[_Passage]:
    """Of images each example once; of text stretches of `length` tokens.

    First of each document the first, then the second, and so on. Stored features are no images.
    """
    documents = source.documents
    size, shuffled = len(documents), not is_sequential(documents)

    def order() -> Iterator[int]:
        return (permute(i, size, seed) if shuffled else i for i in range(size))

    if source.image_examples is not None:
        slot = source.image_examples.slot
        for number in order() if slot is None or slot.name == "images" else ():
            example = source.image_examples.example(number)
            if len(example.ids):
                images = source.image_examples.images(number) if example.images else None
                yield _Passage(example, images)
        return
    for start in itertools.count(0, length):
        found = False
        for number in order():
            passage = documents[number][start : start + length]
            if len(passage) == length:
                found = True
                yield _Passage(passage)
        if not found:
            return
