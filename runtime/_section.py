"""One JSON object of bundle.json, read strictly: getters check types and name the key when it is wrong."""

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .errors import BundleError

AGAIN = "Fetch or export the bundle again with this version of tclkit"


class Section:
    """A JSON object with the path of its file and of its key, for messages."""

    def __init__(self, raw: Mapping[str, Any], where: str, prefix: str) -> None:
        self.raw, self._where, self._prefix = raw, where, prefix

    def value(self, key: str) -> Any:
        """Value of a key that has to be there."""
        if key not in self.raw:
            raise BundleError(f"{self._where} lacks the key {self._prefix + key!r}. {AGAIN}", key=self._prefix + key)
        return self.raw[key]

    def wrong(self, key: str, expected: str, found: object) -> BundleError:
        """Error for a value that is not `expected`."""
        shown = repr(found) if len(repr(found)) <= 60 else repr(found)[:57] + "..."
        return BundleError(
            f"{self._where}: {self._prefix + key!r} should be {expected}, found {shown}. {AGAIN}",
            key=self._prefix + key,
        )

    def refuse_unknown(self, known: Iterable[str]) -> None:
        """Refuse keys that are not among `known`, naming the nearest."""
        valid = list(known)
        for key in self.raw:
            if key not in valid:
                (nearest,) = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
                shown = (self._prefix + key)[:80]
                message = f"{self._where} has the unknown key {shown!r}, the nearest known one is {nearest!r}. {AGAIN}"
                raise BundleError(message, key=self._prefix + key)

    def section(self, key: str) -> "Section":
        """A JSON object."""
        found = self._checked(key, "an object", lambda value: isinstance(value, dict))
        return Section(found, self._where, f"{self._prefix}{key}.")

    def sections(self, key: str) -> "list[Section]":
        """A list of JSON objects."""
        found = self._checked(key, "a list of objects", _is_list_of(dict))
        return [Section(value, self._where, f"{self._prefix}{key}[{i}].") for i, value in enumerate(found)]

    def text(self, key: str) -> str:
        """A text."""
        return str(self._checked(key, "a text", lambda value: isinstance(value, str)))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts."""
        return tuple(self._checked(key, "a list of texts", _is_list_of(str)))

    def integer(self, key: str) -> int:
        """An integer."""
        return int(self._checked(key, "an integer", lambda value: type(value) is int))

    def positive(self, key: str) -> int:
        """An integer above 0."""
        return int(self._checked(key, "an integer above 0", lambda value: type(value) is int and value > 0))

    def fraction(self, key: str) -> float:
        """A number in [0, 1]."""
        return float(self._checked(key, "a number in [0, 1]", lambda value: _is_number(value) and 0 <= value <= 1))

    def triple(self, key: str) -> tuple[float, float, float]:
        """Three numbers."""
        found = self._checked(
            key,
            "three numbers",
            lambda value: isinstance(value, list) and len(value) == 3 and all(map(_is_number, value)),
        )
        return float(found[0]), float(found[1]), float(found[2])

    def _checked(self, key: str, expected: str, fits: Callable[[Any], bool]) -> Any:
        found = self.value(key)
        if not fits(found):
            raise self.wrong(key, expected, found)
        return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(item, kind) for item in value)
