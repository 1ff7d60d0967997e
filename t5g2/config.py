"""Gin, kept shallow: gin files and command-line bindings become checked, frozen dataclasses.

A job has named sections, each a keyword-only dataclass: ``{"train": TrainConfig}``. Gin files bind
their constructor arguments (``train.total_steps = 600``), defines macros (``STEPS = 600``, used as
``%STEPS``) and includes other gin files. The last binding of a setting wins, the command line after
all files; macros are resolved when everything has been read, so a later value of one reaches every
setting that uses it.

gin-config's own ``ConfigParser`` reads the text, so the syntax is gin's. Its global registry is not
used: it forgets the line that a binding came from, never compares a value with an annotation, and
lives as long as the process. Without it two calls of `parse` cannot mix, and every error can name
its file and line. Three things differ from gin on purpose, so that nothing is silently ignored: a
macro that no setting refers to is an error (it is nearly always a misspelt override), as are scopes
(``a/train.seed``), and references and imports (``@f``, ``import m``), which would run code that the
run's written configuration could not hold.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import tokenize
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from t5g2.config_values import (
    MismatchError,
    coerce,
    described,
    final_settings,
    literal,
    plain,
    setting_types,
)
from t5g2.errors import UserError
from t5g2.files import is_remote, to_path

Sections: TypeAlias = Mapping[str, type]

_PACKAGE = Path(__file__).parent
_SETTING_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def parse(
    sections: Sections,
    gin_files: Sequence[str] = (),
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
) -> dict[str, Any]:
    """Reads gin files, then command-line bindings, and builds every section.

    Args:
        sections: Name of each section and its dataclass.
        gin_files: Names of gin files, read in this order. They and the files that they include are
            looked for as given, then under each of `search_paths`; ``configs/...`` also names what
            ships with t5g2, from any working directory.
        bindings: ``NAME=VALUE`` strings, NAME a setting (``train.seed``) or a macro (``STEPS``). A
            VALUE that is no gin literal is taken as text.
        search_paths: Directories.

    Returns:
        An instance of each section's dataclass, by section name, those without bindings included.

    Raises:
        UserError: A file is missing or malformed; a section, setting or macro is unknown; a value
            does not fit its annotation; a required setting has no value; or the dataclass
            refused its values with a ValueError or UserError.
    """
    for directory in search_paths:
        if not to_path(directory).is_dir():
            raise UserError(f"gin search path '{directory}' is not a directory")
    reader = _Reader(sections, search_paths)
    for name in gin_files:
        reader.read_file(name)
    for binding in bindings:
        reader.read_command_line(binding)
    return reader.build()


def operative_config(values: Mapping[str, Any]) -> str:
    """Writes all settings of all sections, defaults included, as gin text that `parse` reads back.

    Args:
        values: Section name to dataclass instance, as `parse` returns them.
    """
    blocks = [f"# Every setting of this configuration. Hash: {config_hash(values)}\n"]
    for section in sorted(values):
        settings = final_settings(values[section])
        blocks.append("".join(f"{section}.{n} = {literal(v)}\n" for n, v in settings.items()))
    return "\n".join(block for block in blocks if block)


def config_hash(values: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON, which sorts the keys of dicts."""
    return hashlib.sha256(_canonical(to_json_dict(values)).encode()).hexdigest()[:16]


def to_json_dict(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Turns `{section: dataclass}` into `{section: {setting: JSON value}}`; tuples become lists."""
    return json.loads(json.dumps({name: final_settings(v) for name, v in values.items()}))


def from_json_dict(sections: Sections, saved: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Builds every section from what `to_json_dict` wrote; what it does not hold takes its default.

    Raises:
        UserError: It holds an unknown section or setting, or a value that does not fit.
    """
    reader = _Reader(sections, ())
    for section, settings in saved.items():
        for setting, value in settings.items():
            reader.bind("saved configuration", section, setting, value)
    return reader.build()


def differences(
    old: Mapping[str, Mapping[str, Any]],
    new: Mapping[str, Mapping[str, Any]],
    ignore: Collection[str] = (),
) -> list[str]:
    """Lists the settings in which two `to_json_dict` results differ.

    Args:
        old: The earlier configuration.
        new: The later one.
        ignore: Settings that may differ, as ``section.setting``.

    Returns:
        Lines such as ``train.seed: 0 -> 1``, sorted; ``(none)`` where one side lacks it.
    """
    before, after = (
        {f"{section}.{name}": plain(v) for section in side for name, v in side[section].items()}
        for side in (old, new)
    )
    lines = []
    for name in sorted(before.keys() | after.keys()):
        sides = [{name: side[name]} if name in side else {} for side in (before, after)]
        if name not in ignore and _canonical(sides[0]) != _canonical(sides[1]):
            was, now = (literal(side[name]) if side else "(none)" for side in sides)
            lines.append(f"{name}: {was} -> {now}")
    return lines


def did_you_mean(name: str, known: Iterable[str], others: dict[str, str] | None = None) -> str:
    """Returns ``; did you mean 'x'?`` for the name nearest to `name`, in any case, or nothing.

    Args:
        name: What the user wrote.
        known: The valid names.
        others: Further names to compare with, and what to propose for each.
    """
    proposals = (others or {}) | {item: item for item in known}
    by_lower = {key.lower(): proposal for key, proposal in proposals.items()}
    nearest = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"; did you mean '{by_lower[nearest[0]]}'?" if nearest else ""


# ---- Reading -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Macro:
    name: str


@dataclasses.dataclass(frozen=True)
class _Reference:
    name: str


class _Delegate:
    """Tells gin's parser what to put in the place of ``%name`` and ``@name``."""

    def macro(self, name: str) -> _Macro:
        return _Macro(name)

    def configurable_reference(self, name: str, evaluate: bool) -> _Reference:
        return _Reference(name)


class _Binding(NamedTuple):
    origin: str
    value: Any


class _GinSyntaxError(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(_one_line(message))
        self.line = line


class _Reader:
    """Collects bindings with their origins, the last one winning, then builds the sections."""

    def __init__(self, sections: Sections, search_paths: Sequence[str]) -> None:
        self.sections = sections
        self.search_paths = search_paths
        self.types = {section: setting_types(cls) for section, cls in sections.items()}
        self.settings: dict[str, dict[str, _Binding]] = {section: {} for section in sections}
        self.macros: dict[str, _Binding] = {}
        self.used_macros: set[str] = set()

    def read_file(self, name: str, origin: str = "", including: tuple[Path, ...] = ()) -> None:
        path = _find(name, self.search_paths, origin)
        if path.resolve() in including:
            raise UserError(f"{origin}: {name!r} includes itself")
        try:
            statements = _statements(path.read_text(encoding="utf-8-sig"))
        except _GinSyntaxError as error:
            raise UserError(f"{path}:{error.line}: {error}") from None
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text: {_one_line(error)}") from None
        for statement in statements:
            here = f"{path}:{statement.location.line_num}"
            match type(statement).__name__:
                case "IncludeStatement":
                    self.read_file(statement.filename, here, (*including, path.resolve()))
                case "ImportStatement":
                    raise UserError(
                        f"{here}: '{statement.format()}': imports are not supported in gin files"
                    )
                case "BindingStatement":
                    if statement.scope:
                        raise UserError(f"{here}: scope '{statement.scope}/' is not supported")
                    section, setting = statement.selector, statement.arg_name
                    if not setting:
                        section, setting = "", section
                    self.bind(here, section, setting, statement.value)

    def read_command_line(self, binding: str) -> None:
        name, equals, text = binding.partition("=")
        name = name.strip()
        if not _SETTING_NAME.fullmatch(name):
            raise UserError(f"command line: --gin.{name!r}: no name of a setting or macro")
        origin = f"command line: --gin.{name}"
        if not equals:
            raise UserError(f"{origin} has no value; write --gin.{name}=VALUE")
        try:
            statements = _statements(f"value = {text.strip()}\n")
            is_literal = len(statements) == 1  # More than one: the text has lines of its own.
        except _GinSyntaxError as error:
            # What opens like a literal was meant as one: a lost bracket must not become text.
            if text.lstrip().startswith(("(", "[", "{", "'", '"', "%", "@")):
                raise UserError(f"{origin}: cannot read {text!r}: {error}") from None
            is_literal = False
        section, _, setting = name.rpartition(".")
        self.bind(origin, section, setting, statements[0].value if is_literal else text)

    def bind(self, origin: str, section: str, setting: str, value: Any) -> None:
        """Records one binding; an empty `section` makes it a macro."""
        if section and section not in self.sections:
            known = (
                did_you_mean(section, self.sections) or f"; there are {', '.join(self.sections)}"
            )
            raise UserError(f"{origin}: no section '{section}'{known}")
        if section and setting not in self.types[section]:
            near = did_you_mean(setting, self.types[section], self._full_names())
            raise UserError(f"{origin}: {section} has no setting '{setting}'{near}")

        def note(item: Any) -> Any:
            if isinstance(item, _Reference):
                raise UserError(f"{origin}: '@{item.name}': references are not supported")
            if isinstance(item, _Macro):
                self.used_macros.add(item.name)
            return item

        _map_leaves(note, value)
        target = self.settings[section] if section else self.macros
        target[setting] = _Binding(origin, value)

    def build(self) -> dict[str, Any]:
        for name, binding in self.macros.items():
            if name not in self.used_macros:
                near = did_you_mean(name, self.used_macros, self._full_names())
                raise UserError(f"{binding.origin}: no setting uses the macro '{name}'{near}")
        return {section: self._build_section(section) for section in self.sections}

    def _build_section(self, section: str) -> Any:
        cls, bindings = self.sections[section], self.settings[section]
        arguments = {setting: self._checked(section, setting) for setting in bindings}
        missing = [
            f"{section}.{field.name}"
            for field in dataclasses.fields(cls)
            if field.name in self.types[section].keys() - bindings.keys()
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise UserError(
                f"{', '.join(missing)} must be given: bind it in a gin file or with "
                f"--gin.{missing[0]}=VALUE"
            )
        try:
            return cls(**arguments)
        except (UserError, ValueError) as error:
            raise UserError(f"{section}: {_one_line(error)}") from error

    def _checked(self, section: str, setting: str) -> Any:
        binding, annotation = self.settings[section][setting], self.types[section][setting]
        value = self._resolve(binding)
        try:
            return coerce(value, annotation)
        except ValueError as error:
            raise UserError(f"{binding.origin}: {section}.{setting}: {_one_line(error)}") from error
        except MismatchError:
            note = ""
            if isinstance(macro := binding.value, _Macro):
                note = f" (the macro {macro.name}, {self.macros[macro.name].origin})"
            raise UserError(
                f"{binding.origin}: {section}.{setting} must be {described(annotation)}, "
                f"not {value!r}{note}"
            ) from None

    def _resolve(self, binding: _Binding, through: tuple[str, ...] = ()) -> Any:
        def replace(item: Any) -> Any:
            if not isinstance(item, _Macro):
                return item
            if item.name in through:
                raise UserError(f"{binding.origin}: the macro '{item.name}' refers to itself")
            if item.name not in self.macros:
                near = did_you_mean(item.name, self.macros)
                raise UserError(f"{binding.origin}: the macro '%{item.name}' has no value{near}")
            return self._resolve(self.macros[item.name], (*through, item.name))

        return _map_leaves(replace, binding.value)

    def _full_names(self) -> dict[str, str]:
        return {n: f"{section}.{n}" for section, names in self.types.items() for n in names}


def _statements(text: str) -> list[Any]:
    """Parses gin text; gin's and the tokenizer's errors become one-line `_GinSyntaxError`s."""
    from gin import config_parser

    parser = None
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        return list(parser)
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        raise _GinSyntaxError(line, f"syntax error: {message}") from None
    except SyntaxError as error:
        _, failed, token = error.msg.partition("Failed to parse token ")
        if failed:
            near = did_you_mean(token.strip("'"), ("True", "False", "None"))
            message = f"{token} is no value{near or ' (text needs quotes)'}"
        elif error.msg == "Unable to parse value.":
            message = "syntax error: no value that gin can read (text needs quotes)"
        else:
            message = f"syntax error: {error.msg}"
        raise _GinSyntaxError(error.lineno or 1, message) from None
    except TypeError as error:  # A list or dict as the key of a dict.
        line = parser.current_token.start[0] if parser else 1
        raise _GinSyntaxError(line, f"syntax error: {error}") from None


def _shipped_configs() -> Path:
    """The directory of t5g2's own gin files: in the package in a wheel, beside it in a checkout."""
    installed = _PACKAGE / "_configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def _find(name: str, search_paths: Sequence[str], origin: str) -> Path:
    relative = to_path(name)
    if is_remote(relative) and relative.is_file():
        return relative
    shipped = _shipped_configs()
    candidates = [relative, *(to_path(directory) / name for directory in search_paths)]
    if relative.parts[:1] == ("configs",):
        candidates.append(shipped.joinpath(*relative.parts[1:]))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = {f"configs/{p.relative_to(shipped).as_posix()}" for p in shipped.rglob("*.gin")}
    for directory in (".", *search_paths):
        beside = (to_path(directory) / relative.parent).glob("*.gin")
        known |= {str(relative.parent / path.name) for path in beside}
    searched = [str(Path.cwd()), *search_paths, f"{shipped} (as configs/)"]
    prefix = f"{origin}: " if origin else ""
    raise UserError(
        f"{prefix}no gin file {name!r} in {', '.join(searched)}{did_you_mean(name, sorted(known))}"
    )


def _map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map_leaves(function, item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_map_leaves(function, item) for item in value)
    return function(value)


def _canonical(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, separators=(",", ":"))


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
