"""Numbers as people read them."""

from __future__ import annotations

import math

_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def grouped(value: int) -> str:
    """1234567 → "1,234,567"."""
    return f"{value:,}"


def compact(value: float) -> str:
    """Three significant digits and a suffix: 1234567 → "1.23M"; small numbers as they are."""
    if not math.isfinite(value):
        return str(value)
    for limit, suffix in _SUFFIXES:
        # 999,950 rounds up to 1,000 thousands: that is a million.
        if abs(value) >= limit * 0.9995:
            scaled = value / limit
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{suffix}"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"


def tick(value: float) -> str:
    """A label of an axis, no longer than it must be: 1250000 → "1.25M", 2000 → "2,000"."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if abs(value) < 1e4:
        return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.4g}"
    limit, suffix = next(pair for pair in _SUFFIXES if abs(value) >= pair[0])
    return f"{value / limit:.4g}{suffix}"


def scientific(value: float) -> str:
    """0.001 → "1.0e-3"; the exponent without padding."""
    if not math.isfinite(value):
        return str(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def clock(seconds: float) -> str:
    """4.26 → "0:04"; 372 → "6:12"; 90061 → "25:01:01" (hours)."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """4.26 → "4.3 s"; 372 → "6 min 12 s"; 90061 → "25 h 1 min"; from 2 days on, days."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
