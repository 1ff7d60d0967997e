"""Curves of a run: pick them out of the records, smooth them, thin them without losing extremes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Curve:
    """One measured quantity over the run.

    Attributes:
        points: (x, y), both finite, by x.
        bad: The x of every value that is NaN or infinite.
    """

    points: Points
    bad: list[float]


def curve(
    rows: Iterable[Mapping[str, Any]], name: str, *, inner: str | None = None, x: str = "step"
) -> Curve:
    """Picks one value of every record that has it.

    Args:
        rows: Records of a run, by step.
        name: The field.
        inner: The name within the field where that is a mapping, such as a denoiser in `by_task`.
        x: The field for the horizontal axis.
    """
    points: Points = []
    bad: list[float] = []
    for row in rows:
        value, at = row.get(name), row.get(x)
        if inner is not None:
            value = value.get(inner) if isinstance(value, Mapping) else None
        if not is_number(value) or not is_number(at) or not math.isfinite(at):
            continue
        if math.isfinite(value):
            points.append((at, value))
        else:
            bad.append(at)
    return Curve(points, bad)


def inner_names(rows: Iterable[Mapping[str, Any]], name: str) -> list[str]:
    """The names within a mapping field of any of the records, in order of first appearance."""
    found: dict[str, None] = {}
    for row in rows:
        if isinstance(inner := row.get(name), Mapping):
            found.update(dict.fromkeys(inner))
    return list(found)


def smooth(points: Points) -> Points:
    """A moving average over about a fiftieth of the points.

    The window is centred, so the curve does not lag behind a steep start as a running average
    would; towards the start it narrows, towards the end it keeps its left half.
    """
    half = len(points) // 100
    # Running sums in whole numbers: as floats, one enormous spike would wipe out all after it.
    unit = 1 << 64
    sums = [0]
    for _, y in points:
        numerator, denominator = y.as_integer_ratio()
        sums.append(sums[-1] + numerator * unit // denominator)
    smoothed = []
    for index, (x, _) in enumerate(points):
        begin = index - min(half, index)
        end = index + 1 + min(half, index, len(points) - 1 - index)
        smoothed.append((x, (sums[end] - sums[begin]) / ((end - begin) * unit)))
    return smoothed


def decimate(points: Points, buckets: int) -> Points:
    """Thins a curve: of each of `buckets` equal runs of points, keep the lowest and the highest.

    The first and the last point stay too, so every extreme of the curve survives. At most
    2 * buckets + 2 points come back; a curve that has no more than that comes back whole.
    """
    if len(points) <= 2 * buckets + 2:
        return points
    keep = {0, len(points) - 1}
    for bucket in range(buckets):
        begin, end = (len(points) * i // buckets for i in (bucket, bucket + 1))
        values = [y for _, y in points[begin:end]]
        keep.add(begin + values.index(min(values)))
        keep.add(begin + values.index(max(values)))
    return [points[index] for index in sorted(keep)]


def view_top(values: Sequence[float], keep: Sequence[float] = (), tolerated: float = 1.5) -> float:
    """The upper end of an axis: the maximum, or less where a few spikes would flatten all else.

    Args:
        values: What is drawn, none of it negative; at least one value here or in `keep`.
        keep: What must be in view whatever the rest is.
        tolerated: By what factor the maximum may exceed that and almost all values.
    """
    ordered = sorted(values)
    high = max([*ordered[: int(0.98 * (len(ordered) - 1)) + 1][-1:], *keep])
    highest = max([*ordered[-1:], *keep])
    return 1.1 * high if highest > tolerated * high > 0 else highest


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a record is a number: finite or not, but neither text nor a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
