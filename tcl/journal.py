"""Journals of a run: files of one JSON object a line, that grow while it runs and go on where it goes on."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tclkit.runtime.files import atomic_file

_LOG = logging.getLogger(__name__)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The rows of a journal, none of a missing one; a torn line, as a killed process leaves it, is left out aloud."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            _LOG.warning("%s, line %d is torn and is left out", path, number)
    return rows


def add_to_journal(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row; a number that is not finite, which JSON does not know, is null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    line = json.dumps(finite, allow_nan=False)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def cut_journal(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Leave only the whole rows that `keep` says yes to: a run that goes on writes the later ones again."""
    if path.exists():
        rows = [row for row in read_journal(path) if keep(row)]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
