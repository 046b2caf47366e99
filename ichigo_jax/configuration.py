"""Strict conversion between plain dictionaries (JSON, ml_collections) and frozen config dataclasses.

Config dataclasses hold every number that changes a result and give none of them a default, so a field that is missing
is an error here and never a silent choice.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ichigo_jax.errors import InputError

T = TypeVar("T")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Builds the dataclass ``cls`` from ``values``; nested dataclasses from nested mappings.

    Args:
      cls: a dataclass without defaults.
      values: field name to value.
      where: how to name ``values`` in an error, e.g. ``"config.model"`` or a file name.

    Raises:
      InputError: naming every unknown field, missing field and value of the wrong type, all at once.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    faults = [f"unknown field {name!r}" for name in values if name not in names]
    faults += [f"missing field {name!r}" for name in names if name not in values]
    arguments = {}
    for name in names:
        if name in values:
            try:
                arguments[name] = _convert(hints[name], values[name], f"{where}.{name}")
            except InputError as error:
                faults.append(str(error))
    if faults:
        raise InputError(f"{where}: {'; '.join(faults)} (the fields of {cls.__name__} are {', '.join(names)})")
    try:
        return cls(**arguments)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def field_type(cls: type, path: Sequence[str]) -> Any:
    """The type of a field of a config dataclass, or of one nested in it; None: there is no such field, or it holds anything.

    ``field_type(RunConfig, ("train", "steps"))`` -> ``int``.
    """
    hint: Any = cls
    for name in path:
        nested = [option for option in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(option)]
        hint = typing.get_type_hints(nested[0]).get(name) if nested else None
    return None if hint is Any else hint


def parse(hint: Any, text: str, where: str) -> Any:
    """A value of the type ``hint``, as a flag gives it: text as it is, ``null`` for None, all else as JSON.

    Raises:
      InputError: the text is no such value; ``where`` begins the message.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if type(None) in options and text == "null":
        return None
    (hint,) = (option for option in options if option is not type(None))
    if hint is str or typing.get_origin(hint) is typing.Literal:
        return _convert(hint, text, where)
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    allowed, expected = _IN_JSON.get(typing.get_origin(hint) or hint, ((dict,), "a group of fields"))
    if type(value) not in allowed:
        also = " or null" if type(None) in options else ""
        raise InputError(f"{where}: found {text!r}, expected {expected}{also}")
    return _convert(hint, value, where) if hint in (bool, int, float) else value  # ``from_dict`` checks what is nested


# For the types of fields, those that JSON gives for them, and what they are called.
_IN_JSON: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "bool"),
    int: ((int,), "int"),
    float: ((int, float), "float"),
    tuple: ((list,), "a list"),
}


def checked_date(text: Any, where: str) -> str:
    """``text``, if it is a date such as 2026-11-27.

    Raises:
      InputError: anything else; ``where`` begins the message.
    """
    try:
        if datetime.date.fromisoformat(text).isoformat() == text:
            return text
    except (TypeError, ValueError):
        pass
    raise InputError(f"{where}: {text!r} found, expected a date like '2026-11-27'")


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as nested plain dictionaries, ready for JSON; ``from_dict`` is the inverse."""
    return dataclasses.asdict(config)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _convert(next(option for option in options if option is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: found {value!r}, expected a group of fields of {hint.__name__}")
        return from_dict(hint, value, where)
    if origin is typing.Literal:
        if value not in options:
            raise InputError(f"{where}: found {value!r}, expected one of {', '.join(map(repr, options))}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise InputError(f"{where}: found {value!r}, expected a list")
        return tuple(_convert(options[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise InputError(f"{where}: found an integer of {len(str(abs(value)))} digits, expected a number") from None
    if hint is float and isinstance(value, float) and math.isnan(value):
        raise InputError(f"{where}: found NaN, expected a number")
    if hint in (int, float, str, bool):
        if type(value) is not hint:
            raise InputError(f"{where}: found {value!r} ({type(value).__name__}), expected {hint.__name__}")
        return value
    return value
