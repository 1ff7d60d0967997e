"""The section of the report on held-out loss by modality and by place in the targets."""

from __future__ import annotations

from collections.abc import Mapping

from t5g2.reporting.metrics_log import Row, RunHistory
from t5g2.reporting.page import table
from t5g2.reporting.series import is_number

_PARTS = {"by_modality": "modality", "by_position": "position in the targets"}


def held_out_sections(history: RunHistory) -> list[tuple[str, str]]:
    """Heading and HTML; nothing of a run that recorded neither, or one modality alone."""
    newest: dict[str, Row] = {str(row.get("weights")): row for row in history.eval}
    tables = []
    for field, head in _PARTS.items():
        by_weights = {
            weights: losses
            for weights, row in newest.items()
            if isinstance(losses := row.get(field), Mapping)
        }
        names = list(dict.fromkeys(name for losses in by_weights.values() for name in losses))
        if len(names) < 2:
            continue
        counts = next(row for row in newest.values() if field in row)[f"targets_{field}"]
        columns = list(by_weights.values())
        rows = [
            [name, *(_shown(losses.get(name)) for losses in columns), _count(counts.get(name))]
            for name in names
        ]
        heads = [head, *(f"{weights} weights" for weights in by_weights), "targets"]
        tables.append(table(heads, rows, numbers=range(1, len(heads))))
    return [("Held-out loss by part", "".join(tables))] if tables else []


def _shown(value: object) -> str:
    return f"{value:.3f}" if is_number(value) else "–"


def _count(value: object) -> str:
    return f"{value:,}" if is_number(value) else "–"
