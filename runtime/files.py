"""Files that are never half written, and the folders tclkit keeps its own files in."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_CHUNK_BYTES = 1 << 20
_ABANDONED_AFTER_S = 24 * 3600.0  # nobody writes a file for so long


def models_folder() -> Path:
    """Folder that holds installed bundles: $TCLKIT_HOME/models, else ~/.local/share/tclkit/models (XDG)."""
    home = os.environ.get("TCLKIT_HOME")
    if home:
        return Path(home) / "models"
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "tclkit" / "models"


def cache_folder() -> Path:
    """Folder for what can be made again: $TCLKIT_HOME/cache, else ~/.cache/tclkit (XDG)."""
    home = os.environ.get("TCLKIT_HOME")
    if home:
        return Path(home) / "cache"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "tclkit"


def sha256_from_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    with Path(path).open("rb") as stream:
        return sha256_from_stream(stream)


def sha256_from_stream(stream: IO[bytes]) -> str:
    """Hex SHA-256 of the rest of an open file, read in pieces."""
    import hashlib  # loads OpenSSL, which most commands never need

    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def keep_within(folder: Path, pattern: str, most_bytes: int, *, newest: Path) -> None:
    """Remove the entries of a cache that were used least lately until the others fit; the newest stays in any case.

    Temporary files that killed processes left in it go as well. What another process removes meanwhile counts as gone,
    and what cannot be removed stays.

    Args:
        folder: of the cache.
        pattern: of its entries' names, for `Path.glob`.
        most_bytes: for all of them.
        newest: the entry that was written just now.
    """
    left = most_bytes - _time_and_size(newest)[1]
    others = {path: _time_and_size(path) for path in folder.glob(pattern) if path != newest}
    for path, (_, size_bytes) in sorted(others.items(), key=lambda item: item[1], reverse=True):
        left -= size_bytes
        if left < 0:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):
        if time.time() - _time_and_size(path)[0] > _ABANDONED_AFTER_S:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _time_and_size(path: Path) -> tuple[float, int]:
    """Time of the last use and size; of a file that is gone, now and 0."""
    try:
        status = path.stat()
    except OSError:
        return time.time(), 0
    return status.st_mtime, status.st_size


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")


@contextlib.contextmanager
def _errors_naming(target: Path, temporary: Path) -> Iterator[None]:
    """Errors of the operating system name what the caller knows, not the temporary."""
    try:
        yield
    except OSError as error:
        if error.filename in (temporary, str(temporary)):
            error.filename = str(target)
        raise


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed over `path`, else removed.

    The temporary name does not keep the target's suffix: write in an explicit format.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_sibling(target)
    with _errors_naming(target, temporary):
        try:
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path` whole, else it is removed.

    An existing folder there is moved aside first and removed last: it is lost only once its successor stands. A process
    killed between the two leaves it aside; the next call for the same path brings it back.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.old")
    if aside.exists() and not target.exists():
        aside.rename(target)
    temporary = _temporary_sibling(target)
    with _errors_naming(target, temporary):
        temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
            temporary.rename(target)
            shutil.rmtree(aside)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
