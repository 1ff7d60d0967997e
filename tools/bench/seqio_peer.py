"""The field's way to packed UL2 rows, to compare with: seqio, tf.data, T5's span corruption.

A seqio Task for each denoiser, their Mixture, `seqio.get_dataset` and a packing feature converter:
what a T5X run reads. What the tasks do is one of two things:

- "t5": the `t5` library's own preprocessors in their default order, chunk, concatenation of 128
  documents, split, noise, eos. Its pieces are as long as the inputs are, so that packing finds room
  for nothing beside them; the targets of 15% corruption and the inputs of prefix language modelling
  are mostly padding. Its prefix language modelling cannot hide three quarters; a single noise span,
  which it puts at the end, can.
- "plain": the same noise written here again with TensorFlow's operations, and little beside it: no
  documents are concatenated, and `t5` is not needed.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import seqio
import tensorflow as tf

from t5g2.data.ul2 import T5GEMMA2_UL2, Denoiser, SpecialTokens

_numbers = itertools.count()


def batches(
    kind: str, documents: Sequence[np.ndarray], special: SpecialTokens, length: int, rows: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of `rows` rows of `length` inputs and targets; all cores take part.

    Args:
        kind: "t5" or "plain".
        documents: tokens, none of which is 0.
        special: ids to add.
        length: of either side.
        rows: in a batch.
    """
    preprocessors = {"t5": _t5_preprocessors, "plain": _preprocessors}[kind]
    name = f"peer{next(_numbers)}"
    lengths = [len(document) for document in documents]
    ragged = tf.RaggedTensor.from_row_lengths(np.concatenate(documents), lengths)

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices({"targets": ragged})

    # T5 counts sentinels down from the last token.
    vocabulary = seqio.PassThroughVocabulary(special.sentinel_ids.stop, special.eos_id)
    feature = seqio.Feature(vocabulary, add_eos=kind == "t5")
    rates = []
    for denoiser in T5GEMMA2_UL2:
        seqio.TaskRegistry.add(
            f"{name}_{denoiser.name}",
            source=seqio.FunctionDataSource(dataset, splits=["train"]),
            preprocessors=preprocessors(denoiser, special, length),
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


def _t5_preprocessors(
    denoiser: Denoiser, special: SpecialTokens, length: int
) -> list[Callable[[tf.data.Dataset], tf.data.Dataset]]:
    from t5.data import preprocessors as t5

    rate = denoiser.corruption_rate
    append_eos = seqio.preprocessors.append_eos
    if denoiser.mean_span is not None:
        corrupt = functools.partial(
            t5.span_corruption, mean_noise_span_length=denoiser.mean_span, noise_density=rate
        )
        return [corrupt, append_eos]
    # Its inputs end with eos where ours begin with bos: they are of equal length.
    longest = denoiser.longest(length, length, special)
    # The steps of `span_corruption`, which would derive the length of pieces from the inputs alone.
    return [
        functools.partial(t5.select_random_chunk, feature_key="targets", max_length=65536),
        functools.partial(t5.reduce_concat_tokens, feature_key="targets", batch_size=128),
        functools.partial(t5.split_tokens, feature_key="targets", max_tokens_per_segment=longest),
        functools.partial(
            t5.denoise,
            inputs_fn=t5.noise_span_to_unique_sentinel,
            targets_fn=t5.nonnoise_span_to_unique_sentinel,
            noise_density=rate,
            noise_mask_fn=functools.partial(
                t5.random_spans_noise_mask, mean_noise_span_length=longest
            ),
        ),
        append_eos,
    ]


def _preprocessors(
    denoiser: Denoiser, special: SpecialTokens, length: int
) -> list[Callable[[tf.data.Dataset], tf.data.Dataset]]:
    longest = denoiser.longest(length, length, special)

    def split(dataset: tf.data.Dataset) -> tf.data.Dataset:
        def pieces(document: dict[str, tf.Tensor]) -> tf.data.Dataset:
            tokens = document["targets"]
            starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64), longest)
            return starts.map(lambda start: {"targets": tokens[start : start + longest]})

        return dataset.flat_map(pieces)

    @seqio.map_over_dataset(num_seeds=2)
    def denoise(example: dict[str, tf.Tensor], seeds: tf.Tensor) -> dict[str, tf.Tensor]:
        tokens = example["targets"]
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
