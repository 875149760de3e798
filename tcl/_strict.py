"""Dataclasses from plain dicts, where an unknown or missing key is refused instead of ignored."""

import dataclasses
import difflib
from collections.abc import Mapping
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin

from tclkit.runtime.errors import ConfigError

T = TypeVar("T")


def dataclass_from_dict(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the dataclass `kind` from `values`.

    Args:
        kind: a dataclass type.
        values: one entry a field; fields with a default may be left out.
        where: what the values belong to, for the message.

    Raises:
        ConfigError: a key is unknown (the nearest valid name is given), a required one is missing, or a value is not of
            the type that its field says: int, float, str, bool, a dataclass, a list of those, or None.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(fields)}."
            raise ConfigError(f"unknown key {key!r} in {where}; {hint}", key=key)
    for key, value in values.items():
        _require_type(key, value, fields[key].type, where)
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}; add them.", missing=missing)
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{error.message} (in {where})", **error.values) from error


_SCALARS: dict[object, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    type(None): ((type(None),), "nothing"),
}


def _require_type(key: str, value: object, wanted: Any, where: str) -> None:
    if not _fits(value, wanted):
        raise ConfigError(f"{key} in {where} must be {_name(wanted)}, not {value!r}.", key=key)


def _fits(value: object, wanted: Any) -> bool:
    if isinstance(wanted, UnionType):
        return any(_fits(value, one) for one in get_args(wanted))
    if get_origin(wanted) is list:
        return isinstance(value, (list, tuple)) and all(_fits(item, *get_args(wanted)) for item in value)
    if dataclasses.is_dataclass(wanted):
        return isinstance(value, cast(type, wanted))
    kinds, _ = _SCALARS.get(wanted, ((object,), ""))
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds or object in kinds)


def _name(wanted: Any) -> str:
    if isinstance(wanted, UnionType):
        return " or ".join(_name(one) for one in get_args(wanted))
    if get_origin(wanted) is list:
        return f"a list, each of it {_name(*get_args(wanted))}"
    return "a section" if dataclasses.is_dataclass(wanted) else _SCALARS[wanted][1]
