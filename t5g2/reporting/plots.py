"""`loss.png`: a run in one picture."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from t5g2.files import to_path, write_atomically
from t5g2.reporting.metrics_log import RunHistory, placed_by_tokens
from t5g2.reporting.numbers import compact, tick
from t5g2.reporting.series import Curve, Points, curve, decimate, inner_names, smooth, view_top
from t5g2.reporting.task_losses import TaskNames, regrouped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: told apart with every common colour blindness.
_COLOURS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
_TRAIN, _HELDOUT = "#0072B2", "#111111"
_LINES: tuple[Any, ...] = ("-", "--", ":", "-.")
_BUCKETS = 1000


def plot_loss(
    history: RunHistory, path: str | os.PathLike[str], *, title: str | None = None
) -> None:
    """Draws the losses, the learning rate and the gradient norm of a run as a PNG.

    The horizontal axis is real tokens, with steps on top; steps alone where the records hold no
    tokens. Values that are not finite cannot be drawn; the picture says how many there are.

    Args:
        history: The run.
        path: The file to write; it is replaced in one move.
        title: The run's name; the name of the file's directory by default.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = to_path(path)
    rows = [*history.train, *history.eval]
    by_tokens = any("tokens" in row for row in history.train)
    x = "tokens" if by_tokens else "step"
    heldout = placed_by_tokens(history) if by_tokens else history.eval

    figure = Figure(figsize=(9, 7.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    figure.suptitle(title or path.resolve().parent.name, fontsize=13, fontweight="bold")
    for axes in (losses, rates):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)

    _draw_losses(losses, history, heldout, x)
    _draw_rates(rates, history, x)
    rates.set_xlabel("real tokens (encoder + decoder)" if by_tokens else "step")
    rates.xaxis.set_major_formatter(lambda value, _: tick(value))
    if by_tokens and len(history.train) > 1:
        _steps_on_top(losses, history)
    if not rows:
        losses.text(0.5, 0.5, "nothing recorded yet", ha="center", transform=losses.transAxes)

    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())


def _draw_losses(
    axes: Axes, history: RunHistory, heldout: Sequence[dict[str, Any]], x: str
) -> None:
    train = curve(history.train, "loss", x=x)
    seen = [y for _, y in train.points]
    keep = seen[:1]  # where the run began, and below all that is held out
    bad = len(train.bad)
    style: dict[str, Any] = {"marker": "." if len(train.points) < 3 else None}
    _line(axes, decimate(train.points, _BUCKETS), color=_TRAIN, alpha=0.3, linewidth=0.7, **style)
    smoothed = decimate(smooth(train.points), _BUCKETS)
    _line(axes, smoothed, color=_TRAIN, linewidth=1.8, label="training (smoothed)", **style)

    last = [row for row in heldout if row.get("weights") != "averaged"]
    averaged = [row for row in heldout if row.get("weights") == "averaged"]
    by_denoiser = regrouped(last, TaskNames.of(history), "denoiser")
    for index, name in enumerate(inner_names(by_denoiser, "by_task")):
        task = curve(by_denoiser, "by_task", inner=name, x=x)
        keep += [y for _, y in task.points]
        bad += len(task.bad)
        _line(
            axes,
            task.points,
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_LINES[index // len(_COLOURS) % len(_LINES)],
            linewidth=1,
            marker=".",
            markersize=3 if len(task.points) < 60 else 0,
            label=f"held-out, {name}",
        )
    for rows, fill, marker, label in (
        (last, _HELDOUT, "o", "held-out"),
        (averaged, "#FFFFFF", "D", "held-out, averaged weights"),
    ):
        points = curve(rows, "loss", x=x)
        keep += [y for _, y in points.points]
        bad += len(points.bad)
        look = {"markersize": 4.5 if len(points.points) < 60 else 2.5, "markerfacecolor": fill}
        _line(axes, points.points, color=_HELDOUT, marker=marker, label=label, zorder=3, **look)

    entropy = history.fact("unigram_entropy")
    if isinstance(entropy, int | float):
        keep.append(entropy)
        axes.axhline(entropy, color="#666666", linestyle="--", linewidth=1)
        note = f"unigram entropy {entropy:.2f}"
        place = axes.get_yaxis_transform()
        axes.text(0.995, entropy, note, ha="right", va="bottom", fontsize=8, transform=place)
    notes = [f"values that are not finite and not drawn: {bad}"] if bad else []
    if (seen or keep) and (top := view_top(seen, keep)) < max(seen, default=0):
        axes.set_ylim(top=top)
        notes.append(f"spikes up to {compact(max(seen))} cut off")
    if notes:
        axes.text(0.01, 0.02, "; ".join(notes), fontsize=8, transform=axes.transAxes)
    axes.set_ylabel("loss (nats per target token)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper right")


def _draw_rates(axes: Axes, history: RunHistory, x: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    rate = curve(history.train, "learning_rate", x=x)
    norm = curve(history.train, "grad_norm", x=x)
    marker = "." if len(history.train) < 3 else None
    _line(axes, decimate(rate.points, _BUCKETS), color="#009E73", marker=marker)
    axes.set_ylabel("learning rate", color="#009E73")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    other.spines["top"].set_visible(False)
    colour = "#D55E00"
    raw = decimate(norm.points, _BUCKETS)
    _line(other, raw, color=colour, linewidth=0.6, alpha=0.35, marker=marker)
    _line(other, decimate(smooth(norm.points), _BUCKETS), color=colour, linewidth=1.2)
    other.set_ylabel("gradient norm", color=colour)
    if _spans_decades(norm):
        other.set_yscale("log")
        other.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        other.yaxis.set_major_formatter(lambda value, _: tick(value))
        other.yaxis.set_minor_formatter(NullFormatter())


def _spans_decades(norm: Curve) -> bool:
    values = [y for _, y in norm.points]
    return bool(values) and min(values) > 0 and max(values) > 30 * min(values)


def _steps_on_top(axes: Axes, history: RunHistory) -> None:
    import numpy as np

    pairs = [(row["tokens"], row["step"]) for row in history.train if "tokens" in row]
    tokens, steps = np.array(pairs, dtype=float).T
    if len(pairs) < 2 or np.any(np.diff(tokens) <= 0):
        return

    def extended(value: Any, xs: Any, ys: Any) -> Any:
        """Interpolates, and goes on straight beyond the ends, where the axis has its margins."""
        slope = (ys[-1] - ys[0]) / (xs[-1] - xs[0])
        inside = np.interp(value, xs, ys)
        return inside + slope * (value - np.clip(value, xs[0], xs[-1]))

    top = axes.secondary_xaxis(
        "top",
        functions=(lambda v: extended(v, tokens, steps), lambda v: extended(v, steps, tokens)),
    )
    top.set_xlabel("step", fontsize=9)
    top.tick_params(labelsize=8)
    top.xaxis.set_major_formatter(lambda value, _: tick(value))


def _line(axes: Axes, points: Points, **style: Any) -> None:
    if points:
        axes.plot([x for x, _ in points], [y for _, y in points], **style)
