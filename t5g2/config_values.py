"""What a gin setting may hold: values checked against annotations, and written back as gin text."""

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class MismatchError(TypeError):
    """A value does not fit its annotation."""


def setting_types(cls: type) -> dict[str, Any]:
    """Returns the name and annotation of each constructor argument of a dataclass."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def final_settings(value: Any) -> dict[str, Any]:
    """Returns the constructor arguments of a dataclass instance, as `coerce` would give them."""
    settings = {}
    for name, annotation in setting_types(type(value)).items():
        try:
            settings[name] = _unmade(coerce(getattr(value, name), annotation))
        except MismatchError:
            raise TypeError(
                f"{type(value).__name__}.{name} = {getattr(value, name)!r} is not "
                f"{described(annotation)}"
            ) from None
    return settings


def _unmade(value: Any) -> Any:
    """A value as gin and JSON write it: a dataclass as the dict of its settings."""
    return final_settings(value) if dataclasses.is_dataclass(value) else value


def coerce(value: Any, annotation: Any) -> Any:
    """Checks a value against an annotation.

    Args:
        value: As gin or JSON reads it.
        annotation: bool, int, float (no NaN), str, None, Any, Literal, or a tuple, list, Sequence,
            dict, Mapping (keys str), a dataclass (a dict of its settings is made one) or union.

    Returns:
        The value; an int becomes a float and a list a tuple where the annotation asks for it.

    Raises:
        MismatchError: The value does not fit.
        ValueError: A dataclass refused its settings.
        TypeError: The annotation is none of these.
    """
    kind, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if kind is Any:
        return plain(value)
    if kind in (Union, types.UnionType):
        # A member of the value's very type comes first: 3 stays an int in `float | int`.
        for member in sorted(arguments, key=lambda member: type(value) is not member):
            try:
                return coerce(value, member)
            except MismatchError:
                continue
        raise MismatchError
    if kind is Literal:
        if any(type(value) is type(allowed) and value == allowed for allowed in arguments):
            return value
        raise MismatchError
    if kind in (tuple, list, Sequence):
        if not isinstance(value, tuple | list):
            raise MismatchError
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            if len(arguments) != len(value):
                raise MismatchError
            members = arguments
        else:
            members = (arguments[0] if arguments else Any,) * len(value)
        items = [coerce(item, member) for item, member in zip(value, members, strict=True)]
        return items if kind is list else tuple(items)
    if kind in (dict, Mapping) and (not arguments or arguments[0] is str):
        if not isinstance(value, Mapping):
            raise MismatchError
        member = arguments[1] if arguments else Any
        return {coerce(key, str): coerce(item, member) for key, item in value.items()}
    if dataclasses.is_dataclass(kind):
        return _made(value, kind)
    if kind is types.NoneType and value is None:
        return None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            raise MismatchError from None
        if math.isnan(number):  # Gin cannot write it, and it would differ from itself.
            raise MismatchError
        return number
    if kind in (bool, int, str) and isinstance(value, kind):
        if kind is int and isinstance(value, bool):
            raise MismatchError
        return kind(value)
    if kind in (types.NoneType, float, bool, int, str):
        raise MismatchError
    raise TypeError(f"settings annotated {annotation} are not supported in a gin section")


def _made(value: Any, cls: Any) -> Any:
    """The dataclass `cls` from a dict of its settings."""
    if isinstance(value, cls):
        return value
    annotations = setting_types(cls)
    if not isinstance(value, Mapping) or not value.keys() <= annotations.keys():
        raise MismatchError
    return cls(**{name: coerce(item, annotations[name]) for name, item in value.items()})


def plain(value: Any) -> Any:
    """Checks a value of a setting of any type: literals, tuples (lists become them) and dicts."""
    if isinstance(value, tuple | list):
        return tuple(plain(item) for item in value)
    if isinstance(value, Mapping):
        return {coerce(key, str): plain(item) for key, item in value.items()}
    return coerce(value, None | bool | int | float | str)


def literal(value: Any) -> str:
    """Returns the gin text of a value that `coerce` or `plain` returned."""
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"  # Gin has no word for it; this reads as infinity.
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {literal(item)}" for k, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        inner = ", ".join(map(literal, value))
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def described(annotation: Any) -> str:
    """Returns an annotation in words for a message: ``int or None``, ``one of 'a', 'b'``."""
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(map(described, get_args(annotation)))
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, get_args(annotation)))
    if annotation is types.NoneType:
        return "None"
    if dataclasses.is_dataclass(annotation):
        return f"a dict of {', '.join(field.name for field in dataclasses.fields(annotation))}"
    if get_origin(annotation) is None and isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")
