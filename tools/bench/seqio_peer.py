"""The field's way to packed UL2 rows, to compare with: seqio, tf.data, T5's span corruption.

The `t5` library is not needed: what its preprocessors do (a noise mask by random segmentation,
sentinels by masking) is written here again with TensorFlow's operations; mixing is
`sample_from_datasets`, as in seqio's Mixtures, and packing is seqio's own.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import seqio
import tensorflow as tf

from t5g2.data.ul2 import T5GEMMA2_UL2, Denoiser, SpecialTokens


def batches(
    documents: Sequence[np.ndarray], special: SpecialTokens, length: int, rows: int
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of `rows` rows of `length` inputs and targets, with all the cores' help."""
    lengths = [len(document) for document in documents]
    ragged = tf.RaggedTensor.from_row_lengths(np.concatenate(documents), lengths)
    tasks = [_examples(ragged, denoiser, special, length) for denoiser in T5GEMMA2_UL2]
    weights = np.array([denoiser.weight for denoiser in T5GEMMA2_UL2])
    mixed = tf.data.Dataset.sample_from_datasets(tasks, (weights / weights.sum()).tolist(), seed=0)
    converter = seqio.EncDecFeatureConverter(pack=True)
    packed = converter(mixed, {"inputs": length, "targets": length})
    return packed.batch(rows).prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def _examples(
    documents: tf.RaggedTensor, denoiser: Denoiser, special: SpecialTokens, length: int
) -> tf.data.Dataset:
    longest = denoiser.longest(length, length, special)

    def pieces(tokens: tf.Tensor) -> tf.data.Dataset:
        starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64), longest)
        return starts.map(lambda start: tokens[start : start + longest])

    def example(tokens: tf.Tensor) -> dict[str, tf.Tensor]:
        mask = _noise_mask(tf.size(tokens), denoiser)
        targets = _with_sentinels(tokens, ~mask, special)
        return {
            "inputs": _with_sentinels(tokens, mask, special),
            "targets": tf.concat([targets, [special.eos_id]], axis=0),
        }

    documents = tf.data.Dataset.from_tensor_slices(documents)
    shuffled = documents.shuffle(1000, seed=0).repeat()
    return shuffled.flat_map(pieces).map(example, num_parallel_calls=tf.data.AUTOTUNE)


def _noise_mask(length: tf.Tensor, denoiser: Denoiser) -> tf.Tensor:
    """Which tokens are hidden; T5's masks begin with what is kept and end with what is hidden."""
    wanted = tf.round(tf.cast(length, tf.float32) * denoiser.corruption_rate)
    hidden = tf.clip_by_value(tf.cast(wanted, tf.int32), 1, tf.maximum(length - 1, 1))
    kept = length - hidden
    if denoiser.mean_span is None:
        return tf.range(length) >= kept
    spans = tf.cast(tf.round(tf.cast(hidden, tf.float32) / denoiser.mean_span), tf.int32)
    spans = tf.maximum(tf.minimum(tf.maximum(spans, 1), tf.minimum(hidden, kept)), 1)
    runs = tf.stack([_segments(kept, spans), _segments(hidden, spans)], axis=1)
    starts = tf.cumsum(tf.reshape(runs, [-1]))[:-1]
    edges = tf.math.unsorted_segment_sum(tf.ones_like(starts), starts, length)
    return tf.cumsum(edges) % 2 == 1


def _segments(total: tf.Tensor, parts: tf.Tensor) -> tf.Tensor:
    """Lengths of `parts` random segments of `total`."""
    is_cut = tf.random.shuffle(tf.cast(tf.range(total - 1) < parts - 1, tf.int32))
    segment = tf.cumsum(tf.concat([[0], is_cut], axis=0))[:total]
    return tf.math.unsorted_segment_sum(tf.ones_like(segment), segment, parts)


def _with_sentinels(tokens: tf.Tensor, mask: tf.Tensor, special: SpecialTokens) -> tf.Tensor:
    """Each run of masked tokens replaced by the next sentinel."""
    before = tf.concat([[False], mask[:-1]], axis=0)
    first = mask & ~before
    sentinels = special.sentinel_ids.start + tf.cumsum(tf.cast(first, tf.int32)) - 1
    return tf.boolean_mask(tf.where(first, sentinels, tokens), ~(mask & before))
