"""The run's data as seqio Tasks and a Mixture. seqio, hence TensorFlow, is imported on first use.

    import seqio
    import t5g2.data.tasks

    t5g2.data.tasks.register_run("runs/quickstart")
    dataset = seqio.get_mixture_or_task("quickstart_ul2").get_dataset(
        {"inputs": 512, "targets": 512}, split="train", seed=0
    )

The denoisers are the same as in training. What differs is seqio's: examples are noised by their
position in the stream, and each is as long as its sequence lengths allow, whatever shares its row.
Decoder inputs start with bos: give seqio's feature converter `bos_id=2`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from t5g2.data.corpus import Corpus, reopen_corpus
from t5g2.data.mixture import DataConfig, Mixture, Source, check_lengths
from t5g2.data.sampling import key
from t5g2.data.sources.opening import AnyDocuments, TextSource
from t5g2.data.ul2 import Denoiser, SpecialTokens, philox
from t5g2.data.vocabularies import seqio_vocabulary
from t5g2.errors import UserError

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf

    Preprocessor = Callable[..., tf.data.Dataset]

# seqio's name of each split, and the corpus' own.
SPLITS = {"train": "train", "validation": "heldout"}
# What each registered Mixture was made of, to tell a repetition from a clash.
_definitions: dict[str, Any] = {}


def register(name: str, corpus: Corpus, config: DataConfig) -> str:
    """Registers a Task for each denoiser and the Mixture of them.

    Tasks are named `<name>_<denoiser>`, such as `mine_span3_15`. Each has the splits "train" and
    "validation" (the held-out documents) and the int32 features "inputs" and "targets". Documents
    are cut into examples that fit the sequence lengths asked for, or the configuration's where
    none are, so that seqio never trims. Registering the same again changes nothing.

    Args:
        name: what the names of Tasks and Mixture start with.
        corpus: documents and tokenizer.
        config: denoisers and default sequence lengths.

    Returns:
        The Mixture's name, `<name>_ul2`.

    Raises:
        UserError: seqio is not installed, the corpus is a cache, the name is taken by something
            else or has a character that seqio does not allow, or the sequence lengths do not suit a
            denoiser.
    """
    if not re.fullmatch(r"[\w.:#]+", name):
        raise UserError(f"seqio names may hold letters, digits and _ . : # only, not {name!r}")
    if not all(isinstance(source, TextSource) for source in corpus.sources):
        raise UserError(
            "seqio Tasks are made of text, and this corpus is a cache of tokens: give the text by "
            "corpus.path or corpus.mixture, without corpus.cache"
        )
    for source in corpus.sources:
        if isinstance(source, TextSource) and source.has_images:
            raise UserError(f"source {source.name} has images: there are no seqio Tasks of these")
        if isinstance(source, TextSource) and source.has_prompts:
            raise UserError(
                f"source {source.name} has prompts of its own: there are no seqio Tasks of these"
            )
    mixture = corpus.mixture("train", config)
    check_lengths(mixture, config.inputs_length, config.targets_length)
    vocabulary = seqio_vocabulary(corpus.tokenizer)
    import seqio

    lengths = {"inputs": config.inputs_length, "targets": config.targets_length}
    sizes = [len(source.documents) for source in mixture.sources]
    tasks = [dataclasses.astuple(task) for task in mixture.tasks]
    fingerprint, rates = corpus.facts["fingerprint"], mixture.rates.tolist()
    definition = (fingerprint, sizes, lengths, tasks, rates, mixture.special)
    mixture_name = f"{name}_ul2"
    task_names = [f"{name}_{_allowed(task.name)}" for task in mixture.tasks]
    if mixture_name in seqio.MixtureRegistry.names():
        if _definitions.get(mixture_name) == definition:
            return mixture_name
        raise UserError(f"seqio has another Mixture {mixture_name}: register under another name")
    taken = [
        task
        for number, task in enumerate(task_names)
        if task in seqio.TaskRegistry.names() or task in task_names[:number]
    ]
    if taken:
        raise UserError(f"seqio has another Task {taken[0]}: register under another name")

    # The denoiser ends the targets with eos; inputs have none, as at inference.
    feature = seqio.Feature(vocabulary, add_eos=False)
    sources = [
        _source({split: source.documents[own] for split, own in SPLITS.items()})
        for source in corpus.sources
        if isinstance(source, TextSource)
    ]
    for task_name, task in zip(task_names, mixture.tasks, strict=True):
        assert isinstance(task.denoiser, Denoiser)
        seqio.TaskRegistry.add(
            task_name,
            source=sources[task.source],
            preprocessors=_preprocessors(task_name, task.denoiser, mixture.special, lengths),
            output_features={"inputs": feature, "targets": feature},
        )
    seqio.MixtureRegistry.add(mixture_name, list(zip(task_names, rates, strict=True)))
    _definitions[mixture_name] = definition
    return mixture_name


def register_run(run_dir: str | Path, name: str | None = None) -> str:
    """Registers the data of a run directory, finished or not, as the run itself sees it.

    Args:
        run_dir: made by `t5g2 train`; nothing in it is changed.
        name: see `register`; by default the directory's own name, with an underscore for each
            character that seqio does not allow.

    Returns:
        The Mixture's name.

    Raises:
        UserError: not a run directory, one without a corpus yet, documents or tokenizer that
            changed since the run began, or what `register` raises.
    """
    from t5g2.settings import run_settings

    run_dir = Path(run_dir)
    settings = run_settings(run_dir)
    if name is None:
        name = _allowed(run_dir.resolve().name)
    return register(name, reopen_corpus(settings.corpus, run_dir, settings.model), settings.data)


def _allowed(name: str) -> str:
    """A name with an underscore for each character that seqio does not allow."""
    return re.sub(r"[^\w.:#]", "_", name)


def _source(texts: Mapping[str, AnyDocuments]) -> "seqio.FunctionDataSource":
    """Whole documents as {"text": string}."""
    import seqio
    import tensorflow as tf

    def documents(split: str, shuffle_files: bool, seed: int | None = None) -> "tf.data.Dataset":
        files = texts[split]
        if files.sequential:
            spec = {"text": tf.TensorSpec([], tf.string)}
            return tf.data.Dataset.from_generator(
                lambda: ({"text": text.encode()} for text in files.iterate()), output_signature=spec
            )

        def text(index: "tf.Tensor") -> dict[str, "tf.Tensor"]:
            # Not stateful: the dataset's position can be saved, and it may read in parallel.
            read = tf.numpy_function(lambda i: files[i].encode(), [index], tf.string, False)
            return {"text": tf.ensure_shape(read, [])}

        dataset = tf.data.Dataset.range(len(files))
        if shuffle_files:
            dataset = dataset.shuffle(len(files), seed=seed)
        return dataset.map(text, num_parallel_calls=tf.data.AUTOTUNE)

    sizes = {split: len(files) for split, files in texts.items()}
    return seqio.FunctionDataSource(documents, splits=tuple(texts), num_input_examples=sizes)


def _preprocessors(
    name: str, denoiser: Denoiser, special: SpecialTokens, default_lengths: Mapping[str, int]
) -> list["Preprocessor"]:
    """From {"text"} to {"inputs", "targets"}: tokenise, cut to size, denoise."""
    import seqio
    import tensorflow as tf

    def tokenize(
        dataset: "tf.data.Dataset", output_features: Mapping[str, "seqio.Feature"]
    ) -> "tf.data.Dataset":
        vocabulary = output_features["inputs"].vocabulary
        return dataset.map(
            lambda example: vocabulary.encode_tf(example["text"]),
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    def cut(
        dataset: "tf.data.Dataset", sequence_length: Mapping[str, int | None] | None = None
    ) -> "tf.data.Dataset":
        given = {side: n for side, n in (sequence_length or {}).items() if n is not None}
        room = {**default_lengths, **given}
        source = Source(name=name, documents=(), denoisers=(denoiser,))
        mixture = Mixture(sources=(source,), special=special)
        check_lengths(mixture, room["inputs"], room["targets"])
        longest = denoiser.longest(room["inputs"], room["targets"], special)

        def pieces(tokens: "tf.Tensor") -> "tf.data.Dataset":
            starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64), longest)
            return starts.map(lambda start: {"tokens": tokens[start : start + longest]})

        return dataset.flat_map(pieces)

    # All Tasks of a Mixture are given the same seeds; their own keys make their noise differ.
    noise = key("noise", name)

    def denoised(tokens: np.ndarray, *seed: np.ndarray) -> list[np.ndarray]:
        return list(denoiser(tokens, philox(noise, *map(int, seed)), special))

    @seqio.map_over_dataset(num_seeds=1)
    def denoise(example: dict[str, "tf.Tensor"], seed: Any) -> dict[str, "tf.Tensor"]:
        arguments = [example["tokens"], *seed]
        inputs, targets = tf.numpy_function(denoised, arguments, [tf.int32] * 2, stateful=False)
        return {
            "inputs": tf.ensure_shape(inputs, [None]),
            "targets": tf.ensure_shape(targets, [None]),
        }

    return [tokenize, cut, denoise]
