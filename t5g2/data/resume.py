"""Where the rows of a run stand after its sources, their number or their seed have changed."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from t5g2.data.packing import RowStream
from t5g2.errors import UserError

Cursors = Int[np.ndarray, "rows cursor"]


def describe_cursors(stream: RowStream) -> dict[str, Any]:
    """What `continued` must know of the stream that cursors belong to; JSON values."""
    sources = {source.name: len(source.documents) for source in stream.mixture.sources}
    return {"rows": stream.rows, "seed": stream.seed, "sources": sources}


def continued(cursors: Cursors, saved: Mapping[str, Any] | None, stream: RowStream) -> Cursors:
    """Cursors of a stream that goes on where those of a similar one stand.

    Of the same stream they are the same. Otherwise each source, known by its name, goes on, and a
    new one starts at its beginning. If seed and size of a source are the same, no row draws a
    document again that one has used up in this epoch. If the new rows are a multiple of the old
    ones, each token still comes once in it; otherwise documents that were begun may be begun again,
    and what slower rows had not come to yet may be left for the next epoch.

    Args:
        cursors: as a checkpoint holds them.
        saved: what `describe_cursors` said of their stream; None: nothing is known.
        stream: what goes on.

    Raises:
        UserError: they do not fit and nothing is known of their stream.
    """
    if saved is None:
        if cursors.shape != stream.start().shape:
            raise UserError(
                "the checkpoint does not say which sources its data came from: go on with the "
                "mixture and train.rows that it was made with"
            )
        return cursors
    moved = stream.start()
    same_rows = saved["rows"] == stream.rows
    # Beyond all numbers that were used, so that no noise comes again.
    moved[:, 0] = cursors[:, 0] if same_rows else cursors[:, 0].max()
    names = list(saved["sources"])
    for number, source in enumerate(stream.mixture.sources):
        if source.name not in names:
            continue
        at, own = (1 + 2 * n for n in (names.index(source.name), number))
        draws, offsets = cursors[:, at].astype(np.int64), cursors[:, at + 1]
        size = saved["sources"][source.name]
        if saved["seed"] != stream.seed or size != len(source.documents):
            offsets = np.zeros_like(offsets)  # The same draw is another document.
        moved[:, own : own + 2] = _dealt_anew(draws, offsets, stream.rows)
    return moved


def _dealt_anew(
    draws: Int[np.ndarray, " old"], offsets: Int[np.ndarray, " old"], rows: int
) -> Int[np.ndarray, "new 2"]:
    """Draw and offset of each of `rows` rows: draw d of row r is entry d * rows + r."""
    old = len(draws)
    numbers = np.arange(old)
    # The last entries that each row has used up; among so many there is one of every new row that
    # shares entries with it.
    back = np.arange(1, rows // math.gcd(old, rows) + 1)
    used = (draws[:, None] - back) * old + numbers[:, None]
    used = used[used >= 0]
    last = np.full(rows, -1, np.int64)
    np.maximum.at(last, used % rows, used)
    following = last // rows + 1  # -1 // rows + 1 is 0
    begun = dict(zip((draws * old + numbers).tolist(), offsets.tolist(), strict=True))
    entries = following * rows + np.arange(rows)
    return np.stack([following, [begun.get(entry, 0) for entry in entries.tolist()]], axis=1)
