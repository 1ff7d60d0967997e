"""Packed arrays: what the train step is fed, under the field's names."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from isal.isal_zlib import crc32
from jaxtyping import Int, Shaped

from t5g2.data.packing import Cuts, ImageSlots, RowStream
from t5g2.data.ul2 import counting, spread

Batch = dict[str, np.ndarray]
# Rows are written together that have about so many places: arrays that stay in a core's cache.
PLACES_AT_ONCE = 1 << 18
_ALIGNMENT = 64  # of arrays in a batch's memory, in bytes: a cache line


def empty_batch(
    rows: int,
    inputs_length: int,
    targets_length: int,
    images: ImageSlots | None = None,
    zeros: bool = True,
) -> Batch:
    """Arrays of `rows` rows of padding; without `zeros`, of whatever stood in their memory.

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
    fields: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for side, length, tokens in (
        ("encoder", inputs_length, ("input_tokens",)),
        ("decoder", targets_length, ("input_tokens", "target_tokens", "task_ids")),
    ):
        for field in (*tokens, "segment_ids", "positions"):
            fields[f"{side}_{field}"] = (rows, length), np.dtype(np.int32)
    fields["decoder_loss_weights"] = (rows, targets_length), np.dtype(np.float32)
    fields["row_digest"] = (rows,), np.dtype(np.uint32)
    if images is not None:
        shape = (rows, images.per_row, *images.slot.shape)
        fields[images.slot.name] = shape, np.dtype(images.slot.dtype)
    # One block of memory: malloc keeps its like for the next batch, where it returns many smaller
    # ones to the system, page by page.
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in fields.values()]
    places = [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    block = (np.zeros if zeros else np.empty)(places[-1], np.uint8)
    return {
        name: block[place : place + size].view(dtype).reshape(shape)
        for (name, (shape, dtype)), place, size in zip(fields.items(), places, sizes, strict=False)
    }


def fill_rows(
    batch: Batch, stream: RowStream, first: int, cursors: Int[np.ndarray, "rows cursor"]
) -> Int[np.ndarray, "rows cursor"]:
    """Writes the next rows of a stream over whatever stands in a batch.

    Args:
        batch: arrays of as many rows.
        stream: what they are rows of.
        first: number of the first in the stream.
        cursors: where they stand; not changed.

    Returns:
        The cursors after them.
    """
    cuts, following = stream.cut_rows(first, cursors)
    at_once = max(PLACES_AT_ONCE // sum(stream.room), 1)
    for start in range(0, len(cursors), at_once):
        some = {name: array[start : start + at_once] for name, array in batch.items()}
        write_rows(some, stream, first + start, cuts.of_rows(start, start + at_once))
    return following


def write_rows(batch: Batch, stream: RowStream, first: int, cuts: Cuts) -> None:
    """Writes rows of examples over a batch, with few calls of numpy for all of them.

    Args:
        batch: arrays of as many rows.
        stream: what the cuts are of.
        first: number of the first row in the stream.
        cuts: the examples of each row, at least one.
    """
    # Rows are contiguous: what is written to the flat arrays stands in the batch.
    flat = {
        name: batch[name].reshape(-1, copy=False)
        for name in batch
        if name.startswith(("encoder", "decoder"))
    }
    rows = len(batch["row_digest"])
    last = np.searchsorted(cuts.row, np.arange(rows), "right")
    counts = np.diff(last, prepend=0)
    segments = np.arange(1, len(cuts.row) + 1) - np.repeat(last - counts, counts)
    # Where examples begin: behind those before them in their rows.
    ahead = np.cumsum(cuts.lengths, axis=0) - cuts.lengths
    ahead -= np.repeat(ahead[last - counts], counts, axis=0)
    begins = ahead + cuts.row[:, None] * np.array(stream.room)
    inputs, targets = flat["encoder_input_tokens"], flat["decoder_target_tokens"]
    stream.write_examples(cuts, begins, inputs, targets, first)
    for side, at, sizes in zip(("encoder", "decoder"), begins.T, cuts.lengths.T, strict=True):
        used, positions = flat[f"{side}_segment_ids"], flat[f"{side}_positions"]
        total = len(used)
        used[:] = spread(segments.astype(np.int32), at, sizes, total)
        # As int32, which multiplies faster than truth values do.
        is_used = np.minimum(used, 1)
        begun = spread(at.astype(np.int32), at, sizes, total)
        np.subtract(counting(total, np.int32), begun, out=positions)
        positions *= is_used
    # Of the decoder, which is the last side.
    flat["decoder_task_ids"][:] = spread(cuts.task.astype(np.int32), at, sizes, total)
    flat["decoder_loss_weights"][:] = is_used
    shifted, ends = flat["decoder_input_tokens"], at + sizes
    shifted[1:] = targets[:-1]
    shifted[ends[ends < total]] = 0
    shifted[at] = stream.mixture.special.bos_id
    examples = np.stack([cuts.task, cuts.document, cuts.start, cuts.length], 1)
    tokens = [batch[name] for name in ("encoder_input_tokens", "decoder_target_tokens")]
    begins_of_rows = (last - counts).tolist()
    digests = [
        crc32(row_targets, crc32(row_inputs, crc32(examples[begin:stop])))
        for begin, stop, row_inputs, row_targets in zip(
            begins_of_rows, last.tolist(), *tokens, strict=True
        )
    ]
    if stream.images is not None:
        for row, (begin, stop) in enumerate(zip(begins_of_rows, last.tolist(), strict=True)):
            slots = batch[stream.images.slot.name][row]
            digests[row] = _fill_images(slots, stream, cuts, range(begin, stop), digests[row])
    batch["row_digest"][:] = digests


def _fill_images(
    slots: Shaped[np.ndarray, "images ..."],
    stream: RowStream,
    cuts: Cuts,
    pieces: Sequence[int],
    digest: int,
) -> int:
    """Writes the images of a row's examples; gives the row's checksum, of them too."""
    filled = 0
    for piece in pieces:
        if images := int(cuts.images[piece]):
            slots[filled : filled + images] = stream.piece_images(
                int(cuts.task[piece]), int(cuts.document[piece])
            )
            filled += images
    slots[filled:] = 0
    return crc32(slots[:filled].view(np.uint8), digest)
