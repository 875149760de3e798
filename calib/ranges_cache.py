"""Measured ranges on disk, so that a second build with the same graph and images skips the measuring."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tclkit.runtime.files import atomic_file, cache_folder

logger = logging.getLogger(__name__)

# Part of every key: raise it when the measuring changes, and old entries are never found again.
_FORMAT = 1

Values = dict[str, float | list[float]]


def remembered(key: Mapping[str, Any], measure: Callable[[], Values]) -> Values:
    """Return what was measured under this key before, or measure it now and keep it.

    A damaged entry is announced, measured again and replaced. A cache folder that cannot be written is announced.

    Args:
        key: JSON values that settle the result.
        measure: returns numbers, 0 or more, infinite or NaN, or lists of such, by tensor.
    """
    full_key = {"format": _FORMAT, **key}
    path = _path_of(full_key)
    values = _values_from_file(path, full_key)
    if values is not None:
        logger.info("activation ranges of the same graph and images are taken from %s", path)
        return values
    values = measure()
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps({"key": full_key, "values": values}, indent=1), encoding="utf-8")
    except OSError as error:
        logger.warning("activation ranges cannot be kept in %s (%s), so they will be measured again", path, error)
    return values


def _path_of(key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "calibration" / f"ranges-{digest[:32]}.json"


def _values_from_file(path: Path, key: Mapping[str, Any]) -> Values | None:
    """The entry's values; None if there is no entry, or none that can be used."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry["key"] != key:
            raise ValueError("it holds another key")
        values: Values = entry["values"]
        if set(values) != set(key["tensors"]) or not all(map(_is_range, values.values())):
            raise ValueError("its values are incomplete")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s is damaged (%s); the activation ranges are measured again", path, error)
        return None
    return values


def _is_range(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_range, value)) and not any(isinstance(item, list) for item in value)
    return isinstance(value, float) and not value < 0  # NaN too: what a graph that overflows shows
