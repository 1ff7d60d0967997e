"""Which curves of a run the report draws."""

from __future__ import annotations

from collections.abc import Sequence

from t5g2.reporting.charts import Chart, Series, draw
from t5g2.reporting.metrics_log import Row, RunHistory
from t5g2.reporting.series import Curve, curve, smooth

COLOURS = 6  # c0 to c5 of report.css


def colour(index: int) -> str:
    """The style class of the group of tasks with this place in its table."""
    return f"c{index % COLOURS}"


def loss(history: RunHistory) -> str:
    """Training loss, raw and smoothed, and the held-out losses."""
    train = curve(history.train, "loss")
    entropy = history.fact("unigram_entropy")
    level = None
    if isinstance(entropy, int | float):
        level = (float(entropy), f"unigram entropy {entropy:.2f}")
    series = [
        *_raw_and_smooth("training", train, "train"),
        *(
            Series(
                name=name,
                curve=curve([row for row in history.eval if row.get("weights") == weights], "loss"),
                colour=style,
                look="dots",
            )
            for weights, name, style in (
                ("last", "held-out, last weights", "heldout"),
                ("averaged", "held-out, averaged weights", "averaged"),
            )
        ),
    ]
    return draw(
        Chart(
            title="Training and held-out loss",
            unit="nats per target token, logarithmic",
            series=series,
            logarithmic=True,
            level=level,
            resumes=_resumes(history),
        )
    )


def losses_by(what: str, names: Sequence[str], train: Sequence[Row], heldout: Sequence[Row]) -> str:
    """Held-out loss of each group of tasks over the run, its smoothed training loss behind.

    Args:
        what: What the groups are: "denoiser".
        names: The groups to draw.
        train: Training records whose `by_task` holds the groups' losses.
        heldout: Held-out records of the last weights, likewise.
    """
    series = []
    for index, name in enumerate(names):
        trained = curve(train, "by_task", inner=name)
        measured = curve(heldout, "by_task", inner=name)
        series.append(
            Series(
                name=f"{name}, training",
                curve=Curve(smooth(trained.points), trained.bad),
                colour=colour(index),
                look="faint",
                in_legend=not measured.points,
            )
        )
        series.append(
            Series(
                name=name,
                curve=measured,
                colour=colour(index),
                look="dots",
                dashed=index >= COLOURS,
            )
        )
    chart = Chart(
        title=f"Loss by {what}",
        unit="nats per target token, logarithmic; dots: held-out, faint: training, smoothed",
        series=series,
        logarithmic=True,
    )
    return draw(chart)


def optimisation(history: RunHistory) -> str:
    """Learning rate and gradient norm, a chart each."""
    rate, norm = curve(history.train, "learning_rate"), curve(history.train, "grad_norm")
    values = [y for _, y in norm.points]
    decades = bool(values) and max(values) > 30 * min(values) > 0
    return draw(
        Chart(
            title="Learning rate",
            unit="",
            series=[Series(name="learning rate", curve=rate, colour="c1")],
            form="scientific",
            from_zero=True,
        )
    ) + draw(
        Chart(
            title="Gradient norm",
            unit="before clipping" + (", logarithmic" if decades else ""),
            series=_raw_and_smooth("gradient norm", norm, "c4"),
            logarithmic=decades,
            from_zero=not decades,
            resumes=_resumes(history),
        )
    )


def norms(history: RunHistory) -> str:
    """Norms of all parameters and of each step's update, a chart each, where they were recorded."""
    drawn = ""
    for title, unit, name, style in (
        ("Parameter norm", "of all that train", "param_norm", "c1"),
        ("Update norm", "what a step adds to the parameters", "update_norm", "c2"),
    ):
        found = curve(history.train, name)
        if found.points or found.bad:
            values = [y for _, y in found.points]
            decades = bool(values) and max(values) > 30 * min(values) > 0
            drawn += draw(
                Chart(
                    title=title,
                    unit=unit + (", logarithmic" if decades else ""),
                    series=_raw_and_smooth(title.lower(), found, style),
                    form="compact" if name == "param_norm" else "scientific",
                    logarithmic=decades,
                    resumes=_resumes(history),
                )
            )
    return drawn


def utilization(history: RunHistory) -> str:
    """MFU; where no peak is known, FLOPs a second; "" where neither was recorded."""
    mfu, rate = curve(history.train, "mfu"), curve(history.train, "model_flops_per_second")
    if mfu.points:
        title, unit, shown = "MFU", "model FLOPs as a share of the devices' bfloat16 peak", mfu
    elif rate.points:
        title, unit, shown = "Model FLOPs", "a second; no peak of these devices is known", rate
    else:
        return ""
    return draw(
        Chart(
            title=title,
            unit=unit,
            series=_raw_and_smooth(title, shown, "c4"),
            form="percent" if mfu.points else "compact",
            from_zero=True,
            resumes=_resumes(history),
        )
    )


def throughput(history: RunHistory) -> str:
    """Tokens a second, MFU, and the share of each side of a batch that is real tokens."""
    speed = curve(history.train, "tokens_per_second")
    fills = [
        Series(name=name, curve=Curve(smooth(full.points), full.bad), colour=style)
        for name, style, full in (
            ("encoder", "c3", curve(history.train, "fill_inputs")),
            ("decoder", "c0", curve(history.train, "fill_targets")),
        )
    ]
    shown = draw(
        Chart(
            title="Throughput",
            unit="real tokens a second",
            series=_raw_and_smooth("tokens a second", speed, "c3"),
            form="compact",
            from_zero=True,
            resumes=_resumes(history),
        )
    )
    return (
        shown
        + utilization(history)
        + draw(
            Chart(
                title="Packing",
                unit="share of a batch that is real tokens, smoothed; the rest is padding",
                series=fills,
                form="percent",
            )
        )
    )


def _raw_and_smooth(name: str, full: Curve, style: str) -> list[Series]:
    smoothed = smooth(full.points)
    if smoothed == full.points:  # too few to smooth
        return [Series(name=name, curve=full, colour=style)]
    return [
        Series(name=f"{name}, each record", curve=full, colour=style, look="faint"),
        Series(name=f"{name}, smoothed", curve=Curve(smoothed, []), colour=style),
    ]


def _resumes(history: RunHistory) -> list[int]:
    return [start["step"] for start in history.starts if start["step"] > 0]
