"""Dataclasses from plain dicts, where an unknown or missing key is refused instead of ignored."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

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
            the type that a field of int, float, str or bool says.
    """
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(fields)}."
            raise ConfigError(f"unknown key {key!r} in {where}; {hint}", key=key)
    for key, value in values.items():
        _require_scalar(key, value, fields[key].type, where)
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
}


def _require_scalar(key: str, value: object, wanted: object, where: str) -> None:
    kinds, name = _SCALARS.get(wanted, ((object,), ""))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds and name):
        raise ConfigError(f"{key} in {where} must be {name}, not {value!r}.", key=key)
