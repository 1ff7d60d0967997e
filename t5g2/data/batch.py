"""Packed arrays: what the train step is fed, under the field's names."""

import functools
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from t5g2.data.packing import ImageSlots, Piece, RowStream

Batch = dict[str, np.ndarray]


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
    for i, cursor in enumerate(cursors):
        pieces, following[i] = stream.next_row(first + i, cursor)
        fill_row(batch, i, pieces, stream.mixture.special.bos_id)
        if stream.images is not None:
            _fill_images(batch, i, pieces, stream)
    return following


def fill_row(batch: Batch, row: int, pieces: Sequence[Piece], bos_id: int) -> None:
    """Writes the examples of one row, but for their images, into an empty one of `batch`."""
    arrays = {name: array[row] for name, array in batch.items()}
    positions = _counting(max(arrays["encoder_positions"].size, arrays["decoder_positions"].size))
    decoder_inputs = arrays["decoder_input_tokens"]
    s = t = 0
    for segment, piece in enumerate(pieces, start=1):
        inputs, targets = piece.example
        left, right = slice(s, s + len(inputs)), slice(t, t + len(targets))
        arrays["encoder_input_tokens"][left] = inputs
        arrays["encoder_segment_ids"][left] = segment
        arrays["encoder_positions"][left] = positions[: len(inputs)]
        decoder_inputs[t] = bos_id
        decoder_inputs[t + 1 : right.stop] = targets[:-1]
        arrays["decoder_target_tokens"][right] = targets
        arrays["decoder_segment_ids"][right] = segment
        arrays["decoder_positions"][right] = positions[: len(targets)]
        arrays["decoder_task_ids"][right] = piece.task
        s, t = left.stop, right.stop
    arrays["decoder_loss_weights"][:t] = 1.0
    digest = zlib.crc32(np.array([piece[:4] for piece in pieces], np.int64).tobytes())
    digest = zlib.crc32(arrays["encoder_input_tokens"], digest)
    batch["row_digest"][row] = zlib.crc32(arrays["decoder_target_tokens"], digest)


def _fill_images(batch: Batch, row: int, pieces: Sequence[Piece], stream: RowStream) -> None:
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


@functools.cache
def _counting(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.int32)
