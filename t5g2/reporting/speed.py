"""How fast a run is: tokens and model FLOPs a second, and MFU where the devices' peak is known."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from t5g2.reporting.metrics_log import Row, RunHistory
from t5g2.reporting.numbers import compact
from t5g2.reporting.series import curve, is_number

_RECENT = 100


class Speed(NamedTuple):
    """Medians over the last records of a run; None where it recorded nothing to tell it from.

    Attributes:
        tokens: real tokens of both sides a second.
        seconds: of a step.
        flops: model FLOPs a second of all devices together, of full rows (see `planning.flops`).
        mfu: share of the devices' bfloat16 peak that `flops` are (arXiv:2204.02311, appendix B).
        peak_known: whether the run knew that peak; of a CPU nobody does.
    """

    tokens: float | None
    seconds: float | None
    flops: float | None
    mfu: float | None
    peak_known: bool

    @classmethod
    def of(cls, history: RunHistory) -> Speed:
        """The speed of a run."""
        rows = history.train[-_RECENT:]
        seconds = _median(rows, "step_seconds")
        work, peak = history.fact("model_flops"), history.fact("peak_flops")
        flops = work / seconds if is_number(work) and seconds else None
        known = is_number(peak)
        mfu = flops / peak if flops is not None and known else None
        return cls(_median(rows, "tokens_per_second"), seconds, flops, mfu, known)

    def text(self) -> str:
        """All that is known of it in a line."""
        parts = []
        if self.tokens is not None:
            parts.append(f"{compact(self.tokens)} real tokens/s")
        if self.seconds is not None:
            parts.append(f"{self.seconds:.3g} s a step")
        if self.flops is not None:
            parts.append(f"{compact(self.flops)}FLOP/s of the model")
            parts.append(
                f"MFU {self.mfu:.1%}" if self.mfu is not None else "no MFU: no peak is known"
            )
        return ", ".join(parts)


def _median(rows: list[Row], name: str) -> float | None:
    values = [y for _, y in curve(rows, name).points]
    return statistics.median(values) if values else None
