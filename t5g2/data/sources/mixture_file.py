"""The mixture file: a TOML file that lists sources and how they are mixed."""

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5g2.config import did_you_mean
from t5g2.data.sources.config import CorpusConfig
from t5g2.errors import UserError

FORMATS = ("text", "jsonl", "parquet", "arrayrecord", "tfds", "seqio", "image_text", "prompted")
# Those whose examples have prompts of their own.
ONE_TASK = {"image_text": "images with text", "prompted": "prompts with answers"}
# Names become parts of the names of tasks and of files.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """A source as a mixture file describes it.

    Attributes:
        name: what it is called in the names of tasks and in metrics.
        path: a directory, file or glob; for TFDS and seqio a name.
        format: one of `FORMATS`; None: what the files' names say.
        field: the field, column or feature that is the text; None: "text", and of ArrayRecord
            the whole record.
        language: of its text, for reports.
        weight: its rate, relative to a mean of 1 over the sources without; None: by temperature.
        denoisers: names of those among the run's that its examples get, or the name of a preset;
            None: all.
        file: the mixture file; None: the source is `corpus.path`.
    """

    name: str
    path: str
    format: str | None = None
    field: str | None = None
    language: str | None = None
    weight: float | None = None
    denoisers: str | tuple[str, ...] | None = None
    file: Path | None = None

    def where(self, key: str) -> str:
        """How messages name a key of this source."""
        return f"corpus.{key}" if self.file is None else f"{self.file}: source {self.name}: {key}"

    def settings(self) -> dict[str, Any]:
        """What a run is not resumed with another value of, as JSON values."""
        names = self.denoisers
        return {
            "language": self.language,
            "weight": self.weight,
            "denoisers": list(names) if isinstance(names, tuple) else names,
            "format": self.format,
            "field": self.field,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureSpec:
    """Sources and how they are mixed.

    Attributes:
        sources: in the order of the file.
        temperature: rates are proportional to training tokens ** (1 / temperature).
    """

    sources: tuple[SourceSpec, ...]
    temperature: float = 1.0

    def weights(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """The weight of each source.

        Those without one of their own get size ** (1 / temperature), times a number that makes
        their mean 1.

        Args:
            sizes: training tokens of each source; may be empty where they do not matter.
        """
        logs = {
            source.name: math.log(max(sizes[source.name], 1)) / self.temperature
            for source in self.sources
            if source.weight is None and self.needs_sizes()
        }
        highest = max(logs.values(), default=0.0)
        scaled = {name: math.exp(log - highest) for name, log in logs.items()}
        mean = sum(scaled.values()) / max(len(scaled), 1)
        return {
            source.name: scaled[source.name] / mean
            if source.name in scaled
            else 1.0
            if source.weight is None
            else source.weight
            for source in self.sources
        }

    def needs_sizes(self) -> bool:
        """Whether the weights depend on the sources' sizes."""
        return sum(source.weight is None for source in self.sources) > 1

    def settings(self) -> dict[str, dict[str, Any]]:
        """All that a run is not resumed with another value of, by source, as JSON values."""
        return {
            "mixture": {"temperature": self.temperature},
            **{f"source {source.name}": source.settings() for source in self.sources},
        }


def read_mixture(config: CorpusConfig) -> MixtureSpec:
    """The sources of a corpus.

    Raises:
        UserError: the first mistake in the mixture file.
    """
    if config.mixture is None:
        return MixtureSpec(sources=(SourceSpec(name="text", path=config.path, format="text"),))
    path = Path(config.mixture).expanduser()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"corpus.mixture: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise UserError(f"{path}: not TOML: {error}") from None
    _check_keys(str(path), content, ("temperature", "source"))
    temperature = _positive(str(path), content, "temperature")
    tables = content.get("source")
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path}: no [[source]] table: there must be one for each source")
    sources = tuple(_source(path, number, table) for number, table in enumerate(tables, 1))
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: source {name}: name: {names.count(name)} sources have it")
    return MixtureSpec(sources=sources, temperature=1.0 if temperature is None else temperature)


def _source(file: Path, number: int, table: Mapping[str, Any]) -> SourceSpec:
    name = table.get("name")
    where = f"{file}: source {number if name is None else name}"
    keys = [field.name for field in dataclasses.fields(SourceSpec) if field.name != "file"]
    _check_keys(where, table, keys)
    for key in ("name", "path"):
        if key not in table:
            raise UserError(f"{where}: {key}: missing")
    texts = {
        key: _text(where, table, key) for key in ("name", "path", "format", "field", "language")
    }
    if not _NAME.fullmatch(texts["name"] or ""):
        raise UserError(
            f"{where}: name: may hold letters, digits and _ . - only, and begins with one of the "
            "former two"
        )
    chosen = texts["format"]
    if chosen is not None and chosen not in FORMATS:
        raise UserError(
            f"{where}: format: no format {chosen!r}{did_you_mean(chosen, FORMATS)}; there are "
            f"{', '.join(FORMATS)}"
        )
    if chosen == "text" and texts["field"] is not None:
        raise UserError(f"{where}: field: text files have none; leave it out")
    if chosen == "prompted" and texts["field"] is not None:
        raise UserError(f"{where}: field: prompted lines have inputs and targets; leave it out")
    if chosen in ONE_TASK and "denoisers" in table:
        raise UserError(
            f"{where}: denoisers: {ONE_TASK[chosen]} have one task, prefix language modelling; "
            "leave it out"
        )
    return SourceSpec(
        **{**texts, "name": name, "path": table["path"]},
        weight=_positive(where, table, "weight"),
        denoisers=_denoisers(where, table),
        file=file,
    )


def _denoisers(where: str, table: Mapping[str, Any]) -> str | tuple[str, ...] | None:
    value = table.get("denoisers")
    if value is None or _is_text(value):
        return value
    if not (isinstance(value, list) and value and all(map(_is_text, value))):
        raise UserError(
            f"{where}: denoisers: must be a list of names or the name of a preset, not {value!r}"
        )
    if len(set(value)) < len(value):
        raise UserError(f"{where}: denoisers: {value!r} names one twice")
    return tuple(value)


def _check_keys(where: str, table: Mapping[str, Any], known: tuple[str, ...] | list[str]) -> None:
    for key in table:
        if key not in known:
            guess = did_you_mean(key, known)
            raise UserError(
                f"{where}: unknown key {key!r}{guess or '; keys are ' + ', '.join(known)}"
            )


def _text(where: str, table: Mapping[str, Any], key: str) -> str | None:
    value = table.get(key)
    if key in table and not _is_text(value):
        raise UserError(f"{where}: {key}: must be a text, not {value!r}")
    return value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _positive(where: str, table: Mapping[str, Any], key: str) -> float | None:
    value = table.get(key)
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise UserError(f"{where}: {key}: must be a number above 0, not {value!r}")
    return float(value)
