"""Text embeddings kept on disk, so that a prompt is embedded once per machine: one SQLite file, safe across processes.

The cache only saves work. A file that is damaged, locked, of a newer tclkit or in a folder that cannot be written is
announced as a warning, and tclkit goes on without it.
"""

import contextlib
import hashlib
import json
import logging
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .files import cache_folder

_SCHEMA_VERSION = 1
_BUSY_SECONDS = 10.0
_KEYS_PER_QUERY = 30_000 if sqlite3.sqlite_version_info >= (3, 32) else 900  # the most variables of a statement
_TABLE = """CREATE TABLE IF NOT EXISTS embeddings (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, vector BLOB NOT NULL, crc32 INTEGER NOT NULL)"""
_log = logging.getLogger(__name__)


def cache_key(encoder_hash: str, texts: Sequence[str]) -> str:
    """Key of one prompt: what encodes it, and the texts its templates make of it."""
    return hashlib.sha256(json.dumps([encoder_hash, *texts]).encode()).hexdigest()


class TextCache:
    """Vectors by key, in one file that any number of processes share.

    Connections are opened per call, so a cache may be used after a fork and from any thread.

    Args:
        path: the SQLite file; None takes text-embeddings.sqlite in `cache_folder()`. Made at the first write.
        max_entries: beyond this many the oldest are dropped.
    """

    def __init__(self, path: str | Path | None = None, *, max_entries: int = 20_000) -> None:
        self.path = Path(path) if path is not None else cache_folder() / "text-embeddings.sqlite"
        self.max_entries = max_entries
        self.problem: str | None = None
        """Why the cache is out of use; None while it works."""

    def read(self, keys: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Return the vectors that are there, (D,) float32 each; a damaged one counts as absent."""
        found: dict[str, NDArray[np.float32]] = {}
        with self._announced():
            if self.problem is None and self.path.exists():
                with self._opened() as database:
                    for start in range(0, len(keys), _KEYS_PER_QUERY):
                        found |= _read_some(database, keys[start : start + _KEYS_PER_QUERY])
        return found

    def write(self, vectors: Mapping[str, NDArray[np.float32]]) -> None:
        """Store vectors, (D,) float32 each, over what was there; all of them or, after a failure, none."""
        if self.problem is not None or not vectors:
            return
        rows = [(key, blob, zlib.crc32(blob)) for key, blob in ((k, _blob(v)) for k, v in vectors.items())]
        with self._announced():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._opened() as database:
                database.execute("BEGIN IMMEDIATE")
                database.executemany("INSERT OR REPLACE INTO embeddings (key, vector, crc32) VALUES (?, ?, ?)", rows)
                database.execute(
                    "DELETE FROM embeddings WHERE id <= (SELECT id FROM embeddings ORDER BY id DESC LIMIT 1 OFFSET ?)",
                    (self.max_entries,),
                )
                database.execute("COMMIT")

    def count(self) -> int:
        """Number of vectors kept; 0 for a cache that is not there or out of use."""
        with self._announced():
            if self.problem is None and self.path.exists():
                with self._opened() as database:
                    return int(database.execute("SELECT COUNT(*) FROM embeddings").fetchone()[0])
        return 0

    @contextlib.contextmanager
    def _announced(self) -> Iterator[None]:
        """Turn a failure of the cache into one warning, and stop using it."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            self.problem = str(error)
            _log.warning(
                "the text cache %s cannot be used (%s). Going on without it: prompts are embedded anew each time. "
                "Delete the file, or set TCLKIT_HOME to a folder that can be written",
                self.path,
                error,
            )

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)) as database:
            _prepare(database)
            yield database


def _prepare(database: sqlite3.Connection) -> None:
    """Make the table in a new file; refuse the file of another schema."""
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, _SCHEMA_VERSION):
        raise sqlite3.DatabaseError(f"it has schema {version}, this tclkit reads {_SCHEMA_VERSION}")
    if version == 0:
        _use_wal(database)
        database.execute("BEGIN IMMEDIATE")
        database.execute(_TABLE)
        database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        database.execute("COMMIT")
    database.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last writes, never the file


def _use_wal(database: sqlite3.Connection) -> None:
    """Switch a new file to write-ahead logging; SQLite does not wait for locks here, so this does."""
    give_up = time.monotonic() + _BUSY_SECONDS
    while not _is_wal_now(database, last_try=time.monotonic() > give_up):
        time.sleep(0.01)


def _is_wal_now(database: sqlite3.Connection, *, last_try: bool) -> bool:
    try:
        database.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error) or last_try:
            raise
        return False
    return True


def _read_some(database: sqlite3.Connection, keys: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    marks = ",".join("?" * len(keys))
    rows = database.execute(f"SELECT key, vector, crc32 FROM embeddings WHERE key IN ({marks})", list(keys))
    return {key: np.frombuffer(blob, "<f4").astype(np.float32) for key, blob, crc in rows if zlib.crc32(blob) == crc}


def _blob(vector: NDArray[np.float32]) -> bytes:
    return np.ascontiguousarray(vector, "<f4").tobytes()
