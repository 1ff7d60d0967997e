"""Fewer lines of a long `metrics.jsonl`, chosen before any is parsed, for a quick look."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

LAST_KEPT = 200
_TRAIN = b'{"kind": "train",'


def thinned(lines: Sequence[bytes], most: int | None) -> list[tuple[int, bytes]]:
    """Numbers (from 1) and lines; of train records about `most`, of all others every one.

    Kept are train records in even distances, the last `LAST_KEPT` of them, and the last one before
    each record of another kind: where a process died, or an evaluation took place.
    """
    train = [i for i, line in enumerate(lines) if line.startswith(_TRAIN)]
    if most is None or len(train) <= most + LAST_KEPT:
        return list(enumerate(lines, start=1))
    kept = set(range(len(lines))).difference(train)
    for other in list(kept):
        if place := bisect.bisect(train, other):
            kept.add(train[place - 1])
    kept.update(train[i * len(train) // most] for i in range(most))
    kept.update(train[-LAST_KEPT:])
    return [(i + 1, lines[i]) for i in sorted(kept)]
