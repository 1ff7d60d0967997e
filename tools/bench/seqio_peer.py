"""The field's way to packed UL2 rows, to compare with: seqio, tf.data, T5's span corruption.

A seqio Task for each denoiser, their Mixture, `seqio.get_dataset` and a packing feature converter:
what a T5X run reads. The `t5` library is not needed: what its span corruption does (a noise mask by
random segmentation, sentinels by masking) is written here again with TensorFlow's operations.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import seqio
import tensorflow as tf

from t5g2.data.ul2 import T5GEMMA2_UL2, Denoiser, SpecialTokens

_numbers = itertools.count()


def batches(
    documents: Sequence[np.ndarray], special: SpecialTokens, length: int, rows: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of `rows` rows of `length` inputs and targets; all cores take part."""
    name = f"peer{next(_numbers)}"
    lengths = [len(document) for document in documents]
    ragged = tf.RaggedTensor.from_row_lengths(np.concatenate(documents), lengths)

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices({"tokens": ragged})

    feature = seqio.Feature(seqio.PassThroughVocabulary(2**18, special.eos_id), add_eos=False)
    rates = []
    for denoiser in T5GEMMA2_UL2:
        seqio.TaskRegistry.add(
            f"{name}_{denoiser.name}",
            source=seqio.FunctionDataSource(dataset, splits=["train"]),
            preprocessors=_preprocessors(denoiser, special, length),
            output_features={"inputs": feature, "targets": feature},
        )
        rates.append((f"{name}_{denoiser.name}", denoiser.weight))
    seqio.MixtureRegistry.add(name, rates)
    packed = seqio.get_dataset(
        name,
        task_feature_lengths={"inputs": length, "targets": length},
        dataset_split="train",
        shuffle=True,
        seed=0,
        num_epochs=None,
        feature_converter=seqio.EncDecFeatureConverter(pack=True),
    )
    return packed.batch(rows).prefetch(2).as_numpy_iterator()


def _preprocessors(
    denoiser: Denoiser, special: SpecialTokens, length: int
) -> list[Callable[[tf.data.Dataset], tf.data.Dataset]]:
    longest = denoiser.longest(length, length, special)

    def split(dataset: tf.data.Dataset) -> tf.data.Dataset:
        def pieces(document: dict[str, tf.Tensor]) -> tf.data.Dataset:
            tokens = document["tokens"]
            starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64), longest)
            return starts.map(lambda start: {"tokens": tokens[start : start + longest]})

        return dataset.flat_map(pieces)

    @seqio.map_over_dataset(num_seeds=2)
    def denoise(example: dict[str, tf.Tensor], seeds: tf.Tensor) -> dict[str, tf.Tensor]:
        tokens = example["tokens"]
        mask = _noise_mask(tf.size(tokens), denoiser, seeds)
        targets = _with_sentinels(tokens, ~mask, special)
        return {
            "inputs": _with_sentinels(tokens, mask, special),
            "targets": tf.concat([targets, [special.eos_id]], axis=0),
        }

    return [split, denoise]


def _noise_mask(length: tf.Tensor, denoiser: Denoiser, seeds: tf.Tensor) -> tf.Tensor:
    """Which tokens are hidden; T5's masks begin with what is kept and end with what is hidden."""
    wanted = tf.round(tf.cast(length, tf.float32) * denoiser.corruption_rate)
    hidden = tf.clip_by_value(tf.cast(wanted, tf.int32), 1, tf.maximum(length - 1, 1))
    kept = length - hidden
    if denoiser.mean_span is None:
        return tf.range(length) >= kept
    spans = tf.cast(tf.round(tf.cast(hidden, tf.float32) / denoiser.mean_span), tf.int32)
    spans = tf.maximum(tf.minimum(tf.maximum(spans, 1), tf.minimum(hidden, kept)), 1)
    segments = [_segments(kept, spans, seeds[0]), _segments(hidden, spans, seeds[1])]
    starts = tf.cumsum(tf.reshape(tf.stack(segments, axis=1), [-1]))[:-1]
    edges = tf.math.unsorted_segment_sum(tf.ones_like(starts), starts, length)
    return tf.cumsum(edges) % 2 == 1


def _segments(total: tf.Tensor, parts: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Lengths of `parts` random segments of `total`."""
    is_cut = tf.cast(tf.range(tf.maximum(total - 1, 0)) < parts - 1, tf.int32)
    is_cut = tf.random.experimental.stateless_shuffle(is_cut, seed)
    segment = tf.cumsum(tf.concat([[0], is_cut], axis=0))[:total]
    return tf.math.unsorted_segment_sum(tf.ones_like(segment), segment, parts)


def _with_sentinels(tokens: tf.Tensor, mask: tf.Tensor, special: SpecialTokens) -> tf.Tensor:
    """Each run of masked tokens replaced by the next sentinel."""
    before = tf.concat([[False], mask[:-1]], axis=0)
    first = mask & ~before
    sentinels = special.sentinel_ids.start + tf.cumsum(tf.cast(first, tf.int32)) - 1
    return tf.boolean_mask(tf.where(first, sentinels, tokens), ~(mask & before))
