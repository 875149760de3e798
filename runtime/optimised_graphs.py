"""Graphs as ONNX Runtime has optimised them, kept on disk, so that the next process need not do it again.

Only graphs of some megabytes are kept. Measured on tcl-shapes (6 MB) a session is made in 32 instead of 54 ms; a small
graph has nothing to save, and on ViT-B/16 (445 MB) the 0.25 s saved go into the hash that is checked first.

An entry is one file, named by what it depends on: the graph, the version of ONNX Runtime, and the processor, for whose
instructions the optimiser chooses memory layouts. It begins with the hash of the rest. What is damaged is announced,
dropped and made anew; a folder that cannot be written is announced, and nothing is kept.
"""

import hashlib
import json
import logging
import os
import platform
from pathlib import Path

from .files import atomic_file, cache_folder, keep_within, sha256_from_file

WORTHWHILE_BYTES = range(4 << 20, 16 << 20)
"""Sizes of graphs that are kept."""

_MAX_TOTAL_BYTES = 128 << 20
_HASH_BYTES = 32
_SUFFIX = ".optimised"
_log = logging.getLogger(__name__)


class OptimisedGraphs:
    """Optimised graphs by what they depend on, in one folder that any number of processes share.

    Args:
        folder: None takes optimised-graphs in `cache_folder()`. Made at the first write.
        max_total_bytes: beyond it the entries that were used least lately are dropped.
    """

    def __init__(self, folder: str | Path | None = None, *, max_total_bytes: int = _MAX_TOTAL_BYTES) -> None:
        self.folder = Path(folder) if folder is not None else cache_folder() / "optimised-graphs"
        self.max_total_bytes = max_total_bytes

    def entry(self, graph: Path, runtime: str) -> Path:
        """File that keeps the optimised form of a graph; it need not be there.

        Args:
            graph: the ONNX file; all of it is hashed.
            runtime: name, version and options of what optimises.
        """
        parts = [sha256_from_file(graph), runtime, platform.machine(), _processor()]
        return self.folder / (hashlib.sha256(json.dumps(parts).encode()).hexdigest() + _SUFFIX)

    def read(self, entry: Path) -> bytes | None:
        """The optimised graph; None where there is none, or none that can be used."""
        try:
            content = entry.read_bytes()
            os.utime(entry)  # used just now
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("the optimised graph %s cannot be read (%s); it is made anew", entry, error.strerror)
            return None
        graph = content[_HASH_BYTES:]
        if hashlib.sha256(graph).digest() != content[:_HASH_BYTES]:
            _log.warning("the optimised graph %s is damaged; it is dropped and made anew", entry)
            self.drop(entry)
            return None
        return graph

    def write(self, entry: Path, graph: bytes) -> None:
        """Keep an optimised graph, whole or not at all, and drop what no longer fits."""
        try:
            with atomic_file(entry) as temporary:
                temporary.write_bytes(hashlib.sha256(graph).digest() + graph)
            keep_within(self.folder, f"*{_SUFFIX}", self.max_total_bytes, newest=entry)
        except OSError as error:
            _log.warning("the optimised graph %s cannot be kept (%s); it is made anew each time", entry, error.strerror)

    def drop(self, entry: Path) -> None:
        """Remove an entry, where it can be."""
        try:
            entry.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("the optimised graph %s cannot be removed (%s)", entry, error.strerror)


def _processor() -> str:
    """Model and instructions of this processor, as far as the system tells."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            told: dict[str, str] = {}
            for line in lines:
                name, _, value = line.partition(":")
                if not name.strip():  # the next processor
                    break
                if name.strip() in ("model name", "flags", "Features", "CPU part"):
                    told[name.strip()] = value.strip()
        return json.dumps(told)
    except OSError:
        return platform.processor()
