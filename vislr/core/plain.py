"""Frozen dataclasses out of plain JSON data: every key known, every value of its type, or a named error."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from vislr.core.errors import ConfigError, hint

T = TypeVar("T")


def from_plain(cls: type[T], data: Any, where: str) -> T:
    """An instance of a dataclass from what `vislr.core.arguments.plain_data` made of one.

    Fields may be texts, numbers, booleans, None, tuples of one type, other dataclasses, and unions of these.

    Args:
        where: what it is, for messages: "the cache plan".

    Raises:
        ConfigError: an unknown or missing key, or a value of another type; names it.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} is a {type(data).__name__}; expected a mapping")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown key '{key}' in {where}{hint(str(key), fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ConfigError(f"{where} has no '{name}'")
    return cls(**{name: _value(hints[name], value, f"'{name}' of {where}") for name, value in data.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        choices = typing.get_args(kind)
        if value is None and type(None) in choices:
            return None
        errors = []
        for choice in (choice for choice in choices if choice is not type(None)):
            try:
                return _value(choice, value, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} is a {type(value).__name__}; expected a list")
        return tuple(_value(typing.get_args(kind)[0], one, f"an entry of {where}") for one in value)
    if dataclasses.is_dataclass(kind):
        return from_plain(kind, value, where)  # type: ignore[arg-type]
    allowed = (int, float) if kind is float else kind
    wrong = not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool)
    if wrong or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{where} is {value!r}; expected {kind.__name__}")
    return value
