"""Files that are never half written, and the folders tclkit keeps its own files in."""

import contextlib
import errno
import logging
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import InputError

_CHUNK_BYTES = 1 << 20
_ABANDONED_AFTER_S = 24 * 3600.0  # nobody writes a file for so long
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # what network file systems say of flushing a folder
_log = logging.getLogger(__name__)


def models_folder() -> Path:
    """Folder that holds installed bundles: $TCLKIT_HOME/models, else ~/.local/share/tclkit/models (XDG).

    Raises:
        InputError: $TCLKIT_HOME is there and no folder.
    """
    if home := _home():
        return home / "models"
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "tclkit" / "models"


def cache_folder() -> Path:
    """Folder for what can be made again: $TCLKIT_HOME/cache, else ~/.cache/tclkit (XDG).

    Raises:
        InputError: $TCLKIT_HOME is there and no folder.
    """
    if home := _home():
        return home / "cache"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "tclkit"


def _home() -> Path | None:
    named = os.environ.get("TCLKIT_HOME")
    if not named:
        return None
    home = Path(named)
    if home.exists() and not home.is_dir():
        raise InputError(f"TCLKIT_HOME is {named}, which is no folder. Name a folder, or unset it")
    return home


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
            _flush(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path` whole, else it is removed.

    All that is in it is flushed first, so that a power cut leaves no empty file behind. An existing folder is moved
    aside then and removed last: it is lost only once its successor stands. A process killed between the two leaves it
    aside; the next call for the same path brings it back. If it cannot be removed, that is announced, no error.
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
        _flush_folder(temporary)
        is_replaced = target.exists()
        if is_replaced:
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
        temporary.rename(target)
        _flush(target.parent)
        if is_replaced:
            _remove_replaced(aside)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_replaced(aside: Path) -> None:
    try:
        shutil.rmtree(aside)
    except OSError as error:  # its successor stands, and is whole
        _log.warning("the replaced folder %s cannot be removed: %s. Remove it by hand", aside, error.strerror or error)


def _flush_folder(folder: Path) -> None:
    """Have the system write a folder to its disk, and all files and folders in it; links and the like have no data."""
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place) / name
            if stat.S_ISREG(path.lstat().st_mode):
                with contextlib.suppress(PermissionError):  # none that was written now: a link to one we may not read
                    _flush(path)
        _flush(Path(place))


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to its disk."""
    if sys.platform == "win32" and path.is_dir():  # which opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(handle)
