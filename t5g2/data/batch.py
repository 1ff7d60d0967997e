"""Packed arrays: what the train step is fed, under the field's names."""

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from t5g2.data.packing import Cut, ImageSlots, RowStream
from t5g2.data.ul2 import spread

Batch = dict[str, np.ndarray]
# Rows are written together that have about so many places: arrays that stay in a core's cache.
PLACES_AT_ONCE = 1 << 17


def empty_batch(
    rows: int, inputs_length: int, targets_length: int, images: ImageSlots | None = None
) -> Batch:
    """Arrays of `rows` rows of padding.

    int32 [rows, inputs_length]: encoder_input_tokens, encoder_segment_ids (0 is padding, examples
    count from 1), encoder_positions. int32 [rows, targets_length]: decoder_input_tokens (targets
    shifted right behind bos, example by example), decoder_target_tokens, decoder_segment_ids,
    decoder_positions, decoder_task_ids. float32 [rows, targets_length]: decoder_loss_weights.
    uint32 [rows]: row_digest, a checksum of which examples stand in the row (task, document, start
    and length of each), of its tokens and of its images.

    With I slots for images in a row: uint8 [rows, I, size, size, 3] images, or bfloat16
    [rows, I, N, W] image_features, in the order of their places in encoder_input_tokens; zero where
    a row has fewer.
    """
    batch: Batch = {}
    for side, length, tokens in (
        ("encoder", inputs_length, ("input_tokens",)),
        ("decoder", targets_length, ("input_tokens", "target_tokens", "task_ids")),
    ):
        for field in (*tokens, "segment_ids", "positions"):
            batch[f"{side}_{field}"] = np.zeros((rows, length), np.int32)
    batch["decoder_loss_weights"] = np.zeros((rows, targets_length), np.float32)
    batch["row_digest"] = np.zeros(rows, np.uint32)
    if images is not None:
        shape = (rows, images.per_row, *images.slot.shape)
        batch[images.slot.name] = np.zeros(shape, images.slot.dtype)
    return batch


def fill_rows(
    batch: Batch, stream: RowStream, first: int, cursors: Int[np.ndarray, "rows cursor"]
) -> Int[np.ndarray, "rows cursor"]:
    """Writes the next rows of a stream into an empty batch.

    Args:
        batch: arrays of as many rows.
        stream: what they are rows of.
        first: number of the first in the stream.
        cursors: where they stand; not changed.

    Returns:
        The cursors after them.
    """
    following = np.empty_like(cursors)
    at_once = max(PLACES_AT_ONCE // sum(stream.room), 1)
    for start in range(0, len(cursors), at_once):
        rows = []
        for i in range(start, min(start + at_once, len(cursors))):
            cuts, following[i] = stream.cut_row(first + i, cursors[i])
            rows.append(cuts)
        some = {name: array[start : start + at_once] for name, array in batch.items()}
        write_rows(some, stream, rows)
    return following


def write_rows(batch: Batch, stream: RowStream, rows: Sequence[Sequence[Cut]]) -> None:
    """Writes rows of examples into an empty batch, with few calls of numpy for all of them.

    Args:
        batch: arrays of as many rows.
        stream: what the cuts are of.
        rows: the examples of each, at least one.
    """
    # Rows are contiguous: what is written to the flat arrays stands in the batch.
    flat = {
        name: batch[name].reshape(-1, copy=False)
        for name in batch
        if name.startswith(("encoder", "decoder"))
    }
    cuts = [cut for row in rows for cut in row]
    counts = np.array([len(row) for row in rows])
    last = np.cumsum(counts)
    lengths = np.array([cut.lengths for cut in cuts])
    tasks = np.array([cut.task for cut in cuts])
    segments = np.arange(1, len(cuts) + 1) - np.repeat(last - counts, counts)
    # Where examples begin: behind those before them in their rows.
    ahead = np.cumsum(lengths, axis=0) - lengths
    ahead -= np.repeat(ahead[last - counts], counts, axis=0)
    begins = ahead + np.repeat(np.arange(len(rows)), counts)[:, None] * np.array(stream.room)
    stream.write_examples(cuts, begins, flat["encoder_input_tokens"], flat["decoder_target_tokens"])
    for side, at, sizes in zip(("encoder", "decoder"), begins.T, lengths.T, strict=True):
        total = len(flat[f"{side}_positions"])
        used = spread(segments.astype(np.int32), at, sizes, total)
        flat[f"{side}_segment_ids"][:] = used
        is_used = used > 0
        positions = np.arange(total, dtype=np.int32) - spread(at.astype(np.int32), at, sizes, total)
        np.multiply(positions, is_used, out=flat[f"{side}_positions"])
    # Of the decoder, which is the last side.
    flat["decoder_task_ids"][:] = spread(tasks.astype(np.int32), at, sizes, total)
    flat["decoder_loss_weights"][:] = is_used
    shifted = flat["decoder_input_tokens"]
    np.multiply(flat["decoder_target_tokens"][:-1], is_used[1:], out=shifted[1:])
    shifted[at] = stream.mixture.special.bos_id
    examples = np.array([cut[:4] for cut in cuts], np.int64)
    inputs, targets = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
    for row, (stop, count) in enumerate(zip(last.tolist(), counts.tolist(), strict=True)):
        digest = zlib.crc32(examples[stop - count : stop].data)
        batch["row_digest"][row] = zlib.crc32(targets[row], zlib.crc32(inputs[row], digest))
        if stream.images is not None:
            _fill_images(batch, row, rows[row], stream)


def _fill_images(batch: Batch, row: int, pieces: Sequence[Cut], stream: RowStream) -> None:
    """Writes the images of a row's examples, and has its checksum speak of them too."""
    assert stream.images is not None
    slots = batch[stream.images.slot.name][row]
    filled = 0
    for piece in pieces:
        if piece.images:
            slots[filled : filled + piece.images] = stream.piece_images(piece)
            filled += piece.images
    digest = batch["row_digest"][row].item()
    batch["row_digest"][row] = zlib.crc32(slots[:filled].view(np.uint8), digest)
