"""What an evaluation has counted so far, one line an image, so that a run that was killed goes on.

Every process appends to a file of its own and never to another's, so that no two write to one file, and all files of
one run are read together. A line is there when it ends; what a kill or a power cut left unfinished is not.
"""

import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

_log = logging.getLogger(__name__)
_FORMAT: Final = 1
_SUFFIX = ".jsonl"
_SYNC_EVERY_S = 1.0
_NAME_CHARACTERS = 16


@dataclass(kw_only=True, slots=True)
class Findings:
    """What the journals of one run say.

    images: record of each counted image, by index.
    problems: (name, reason) of each image that could not be used, by index.
    """

    images: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)


class Journal:
    """A new journal file; close it, or use it in a `with`.

    Args:
        folder: of the journals; made when missing.
        key: hex digest of all that the figures depend on.
        settings: the same in words, for people who open the file.
    """

    def __init__(self, folder: Path, key: str, settings: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{key[:_NAME_CHARACTERS]}-{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
        self._stream = (folder / name).open("x", encoding="utf-8")
        self._synced_s = time.monotonic()
        self._write({"format": _FORMAT, "key": key, "settings": dict(settings)})

    def add_image(self, index: int, name: str, counted: Mapping[str, Any]) -> None:
        """Note what was counted on one image."""
        self._write({"index": index, "name": name, "counted": dict(counted)})

    def add_problem(self, index: int, name: str, reason: str) -> None:
        """Note why one image cannot be used."""
        self._write({"index": index, "name": name, "problem": reason})

    def close(self) -> None:
        """Bring everything to the disk."""
        if not self._stream.closed:
            self._sync()
            self._stream.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        """One line reaches the operating system at once, so that a kill loses nothing, and the disk within a second."""
        self._stream.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._stream.flush()
        if time.monotonic() - self._synced_s >= _SYNC_EVERY_S:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._stream.fileno())
        self._synced_s = time.monotonic()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journals(folder: Path, key: str) -> Findings:
    """Read all journals of a run. An image that was counted anywhere is no problem, even where it was one before."""
    findings = Findings()
    for path in journal_files(folder, key):
        for line in _whole_lines(path):
            _note(findings, line, key, path)
    for index in findings.images:
        findings.problems.pop(index, None)
    return findings


def journal_files(folder: Path, key: str) -> list[Path]:
    """Journal files of a run, in a stable order."""
    return sorted(folder.glob(f"{key[:_NAME_CHARACTERS]}-*{_SUFFIX}"))


class LineCounter:
    """Counts what is added to the journals of a run, reading each byte once: the progress of other processes."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._sizes = {path: path.stat().st_size for path in journal_files(folder, key)}
        self._count = 0

    def count(self) -> int:
        """Images noted since this counter was made."""
        for path in journal_files(self._folder, self._key):
            with path.open("rb") as stream:
                known = self._sizes.get(path)
                stream.seek(known or 0)
                added = stream.read()
            self._sizes[path] = (known or 0) + len(added)
            self._count += added.count(b"\n") - (known is None and b"\n" in added)  # the first line is no image
        return self._count


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Parsed lines; one that a full disk or a power cut damaged counts as not written."""
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            parsed = json.loads(line)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            yield parsed
        else:
            _log.warning("%s has a damaged line, its image is counted anew", path)


def _note(findings: Findings, line: Mapping[str, Any], key: str, path: Path) -> None:
    if "key" in line:
        if line["key"] != key or line["format"] != _FORMAT:
            raise AssertionError(f"{path} belongs to another run")  # names begin with 64 bits of the key
    elif "problem" in line:
        findings.problems[int(line["index"])] = (str(line["name"]), str(line["problem"]))
    else:
        findings.images.setdefault(int(line["index"]), line["counted"])
