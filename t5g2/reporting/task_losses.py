"""Losses of a mixture's tasks, put together by denoiser, by source or by language."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from t5g2.reporting.metrics_log import Row, RunHistory
from t5g2.reporting.series import Points, is_number

By = Literal["denoiser", "source", "language"]


@dataclasses.dataclass(frozen=True)
class TaskNames:
    """What the names of tasks say: "source/denoiser", or the denoiser alone of a lone source.

    Attributes:
        languages: the sources, each with its language or None.
    """

    languages: Mapping[str, str | None]

    @classmethod
    def of(cls, history: RunHistory) -> TaskNames:
        """Those of a run, also of sources that it had before it accepted others."""
        found: dict[str, str | None] = {}
        for start in history.starts:
            found.update(start.get("source_languages") or {})
        return cls(found)

    def group(self, task: str, by: By) -> str | None:
        """The denoiser, source or language of a task; None if it has no such thing."""
        source, slash, denoiser = task.partition("/")
        if not slash or source not in self.languages:
            source, denoiser = next(iter(self.languages), ""), task
            if len(self.languages) != 1 and by != "denoiser":
                return None
        if by == "denoiser":
            return denoiser
        return source if by == "source" else self.languages.get(source)

    def kinds(self) -> list[By]:
        """What is worth telling apart: languages only where they are not just the sources."""
        named = {language for language in self.languages.values() if language is not None}
        by_source: list[By] = ["source"] if len(self.languages) > 1 else []
        by_language: list[By] = ["language"] if 1 < len(named) < len(self.languages) else []
        return ["denoiser", *by_source, *by_language]


def regrouped(rows: Iterable[Row], names: TaskNames, by: By) -> list[Row]:
    """Records whose `by_task` and `targets_by_task` are those of groups of tasks.

    The loss of a group is the mean over its target tokens. Records that do not count these, as
    old ones do not, keep the losses of groups of one task only.
    """
    groups: dict[str, str | None] = {}
    made = []
    for row in rows:
        losses, targets = row.get("by_task"), row.get("targets_by_task")
        if not isinstance(losses, Mapping):
            continue
        members: dict[str, list[str]] = {}
        for task in losses:
            if task not in groups:
                groups[task] = names.group(task, by)
            if (group := groups[task]) is not None:
                members.setdefault(group, []).append(task)
        made.append({**row, **_grouped(members, losses, targets)})
    return made


def _grouped(
    members: Mapping[str, list[str]], losses: Mapping[str, Any], targets: Any
) -> dict[str, dict[str, Any]]:
    by_group, counts = {}, {}
    for group, tasks in members.items():
        counted = isinstance(targets, Mapping) and all(targets.get(task) for task in tasks)
        if counted and all(is_number(losses[task]) for task in tasks):
            counts[group] = sum(targets[task] for task in tasks)
            nll = sum(losses[task] * targets[task] for task in tasks)
            by_group[group] = nll / counts[group]
        elif len(tasks) == 1:
            by_group[group] = losses[tasks[0]]
    return {"by_task": by_group, "targets_by_task": counts}


def shares(by_task: Mapping[str, float], names: TaskNames, by: By) -> dict[str, float]:
    """Rates of tasks, or other numbers of theirs, added up by group."""
    found: dict[str, float] = {}
    for task, share in by_task.items():
        if (group := names.group(task, by)) is not None:
            found[group] = found.get(group, 0.0) + share
    return found


def mean_of(rows: Iterable[Row], name: str) -> float | None:
    """Mean finite loss of a group over regrouped records, weighted by target tokens if counted."""
    total = weight = 0.0
    for row in rows:
        loss = row["by_task"].get(name)
        if is_number(loss) and math.isfinite(loss):
            targets = row["targets_by_task"].get(name, 1)
            total, weight = total + loss * targets, weight + targets
    return total / weight if weight else None


def averaged(rows: list[Row], name: str, most: int) -> Points:
    """A curve of at most `most` points, each the mean over a stretch of regrouped records."""
    count = min(most, len(rows))
    points = []
    for i in range(count):
        part = rows[len(rows) * i // count : len(rows) * (i + 1) // count]
        if (mean := mean_of(part, name)) is not None:
            points.append((float(part[-1]["step"]), mean))
    return points


def targets_of(rows: Iterable[Row]) -> dict[str, int]:
    """Target tokens of each group over regrouped records."""
    found: dict[str, int] = {}
    for row in rows:
        for name, targets in row["targets_by_task"].items():
            found[name] = found.get(name, 0) + targets
    return found
