"""Large JSON annotation files, read piece by piece: what is held is one element at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tclkit.runtime.errors import InputError

_CHUNK_CHARACTERS = 1 << 20
_SPACE = " \t\r\n"
_AFTER_VALUE = tuple(f"{_SPACE},:]}}")


def stream_arrays(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (key, element) for every element of every array of a JSON object, in the file's order.

    Values that are no arrays are yielded whole, as one element.

    Raises:
        InputError: the file is missing, broken off, or no JSON object.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            yield from _Reader(stream, path).elements()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", path=str(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", path=str(path)) from error


class _Reader:
    """A window on the text; `_at` is the next character that is not yet used."""

    def __init__(self, stream: TextIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._text, self._at, self._ended = "", 0, False
        self._decoder = json.JSONDecoder()

    def elements(self) -> Iterator[tuple[str, Any]]:
        self._take("{")
        if self._peek() == "}":
            return
        while True:
            key = self._value()
            if not isinstance(key, str):
                raise self._broken("a key is expected")
            self._take(":")
            if self._peek() == "[":
                yield from ((key, element) for element in self._array())
            else:
                yield key, self._value()
            if self._take(",}") == "}":
                return

    def _array(self) -> Iterator[Any]:
        self._take("[")
        if self._peek() == "]":
            self._take("]")
            return
        while True:
            yield self._value()
            if self._take(",]") == "]":
                return

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self._broken(error.msg) from error
                self._more()
                continue
            if self._text[end : end + 1] not in _AFTER_VALUE and not self._ended:  # a number goes on in the next piece
                self._more()
                continue
            self._at = end
            return value

    def _peek(self) -> str:
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                raise self._broken("it ends too early")
            self._more()

    def _take(self, wanted: str) -> str:
        found = self._peek()
        if found not in wanted:
            raise self._broken(f"found {found!r} where {' or '.join(wanted)} is expected")
        self._at += 1
        return found

    def _more(self) -> None:
        # Twice as much each time, so that an element longer than a piece is not begun anew too often.
        piece = self._stream.read(max(_CHUNK_CHARACTERS, len(self._text) - self._at))
        self._ended = not piece
        self._text, self._at = self._text[self._at :] + piece, 0

    def _broken(self, why: str) -> InputError:
        return InputError(f"{self._path} is no complete JSON object: {why}. Fetch it again", path=str(self._path))
