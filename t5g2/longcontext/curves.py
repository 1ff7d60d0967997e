"""Scores over length: means with confidence intervals, as JSON, as a table and as a chart."""

import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from t5g2.files import write_atomically
from t5g2.longcontext.draws import Draws
from t5g2.reporting.numbers import tick

_RESAMPLES = 1000
# The 97.5th percentile of the normal distribution: intervals hold 95%.
_Z = 1.959964
# Okabe and Ito's colours: told apart with every common colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#111111")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """How good a model is in a family at a length.

    Attributes:
        family: name of the family.
        length: encoder tokens that examples may have.
        tokens: that they have, on average.
        examples: how many.
        score: mean, from 0 to 1.
        low: lower end of its 95% confidence interval.
        high: upper end.
        log_likelihood: of the right answer, in nats a token, the mean over examples.
    """

    family: str
    length: int
    tokens: float
    examples: int
    score: float
    low: float
    high: float
    log_likelihood: float


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """The 95% confidence interval of the mean of scores from 0 to 1.

    Wilson's where all are 0 or 1 (J. Am. Stat. Assoc. 22, 1927), which does not shrink to a point
    where all are alike; else the percentile bootstrap's, over resamples that are always the same.
    """
    n, mean = len(scores), statistics.fmean(scores)
    if all(score in (0, 1) for score in scores):
        centre = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
        return max(centre - half, 0.0), min(centre + half, 1.0)
    draws = Draws("bootstrap", n)
    means = sorted(
        statistics.fmean([draws.choice(scores) for _ in range(n)]) for _ in range(_RESAMPLES)
    )
    edge = round(_RESAMPLES * 0.025)
    return means[edge], means[-1 - edge]


def table(curves: Sequence[Point]) -> str:
    """The points as lines of text, a family a block."""
    lines = [f"{'family':16} {'length':>7} {'score':>6}  {'95% interval':13}  nats/token  examples"]
    lines += [
        f"{p.family:16} {p.length:7} {p.score:6.3f}  {p.low:.3f} to {p.high:.3f}"
        f"  {-p.log_likelihood:10.3f}  {p.examples:8}"
        for p in curves
    ]
    return "\n".join(lines)


def plot(curves: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Draws scores over length, with their intervals, as SVG or PNG by the name of the file.

    Args:
        curves: points by the name of a line.
        path: the file to write, at once.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lengths = sorted({point.length for points in curves.values() for point in points})
    for number, (name, points) in enumerate(curves.items()):
        colour, style = _COLOURS[number % len(_COLOURS)], ("-", "--", ":")[number // 7 % 3]
        xs = [point.length for point in points]
        axes.fill_between(
            xs, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.12, lw=0
        )
        axes.plot(xs, [p.score for p in points], style, color=colour, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [tick(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("encoder tokens")
    axes.set_ylabel("score")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    content = io.BytesIO()
    # Without the date and random ids, equal curves make equal files.
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with mpl.rc_context({"svg.hashsalt": "t5g2"}):
        figure.savefig(content, format=path.suffix.removeprefix("."), metadata=metadata)
    write_atomically(path, content.getvalue())
