"""Packed arrays: what the train step is fed, under the field's names."""

import zlib
from collections.abc import Sequence

import numpy as np

from t5g2.data.packing import Piece

Batch = dict[str, np.ndarray]


def empty_batch(rows: int, inputs_length: int, targets_length: int) -> Batch:
    """Arrays of `rows` rows of padding.

    int32 [rows, inputs_length]: encoder_input_tokens, encoder_segment_ids (0 is padding, examples
    count from 1), encoder_positions. int32 [rows, targets_length]: decoder_input_tokens (targets
    shifted right behind bos, example by example), decoder_target_tokens, decoder_segment_ids,
    decoder_positions, decoder_task_ids. float32 [rows, targets_length]: decoder_loss_weights.
    uint32 [rows]: row_digest, a checksum of the row's tokens.
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
    return batch


def fill_row(batch: Batch, row: int, pieces: Sequence[Piece], bos_id: int) -> None:
    """Writes the examples of one row into an empty one of `batch`."""
    s = t = 0
    for segment, piece in enumerate(pieces, start=1):
        inputs, targets = piece.example
        left, right = slice(s, s + len(inputs)), slice(t, t + len(targets))
        batch["encoder_input_tokens"][row, left] = inputs
        batch["encoder_segment_ids"][row, left] = segment
        batch["encoder_positions"][row, left] = np.arange(len(inputs))
        batch["decoder_input_tokens"][row, t] = bos_id
        batch["decoder_input_tokens"][row, t + 1 : right.stop] = targets[:-1]
        batch["decoder_target_tokens"][row, right] = targets
        batch["decoder_segment_ids"][row, right] = segment
        batch["decoder_positions"][row, right] = np.arange(len(targets))
        batch["decoder_task_ids"][row, right] = piece.task
        batch["decoder_loss_weights"][row, right] = 1.0
        s, t = left.stop, right.stop
    digest = zlib.crc32(batch["encoder_input_tokens"][row].tobytes())
    batch["row_digest"][row] = zlib.crc32(batch["decoder_target_tokens"][row].tobytes(), digest)
