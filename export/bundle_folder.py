"""The folder of a bundle while it is written: whole or not there, one writer at a time, nothing else overwritten."""

import contextlib
import glob
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tclkit.runtime.bundle import MANIFEST_NAME
from tclkit.runtime.errors import ExportError
from tclkit.runtime.files import atomic_folder


def require_replaceable(out: Path) -> None:
    """Refuse a target that holds anything but an older bundle: it would be lost."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; a bundle is a folder. Give another path")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_NAME).is_file():
        raise ExportError(f"{out} holds other files and would be replaced as a whole. Give a new folder, or empty it")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that takes the place of `out` at the end; what killed runs left beside it is removed first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    with contextlib.ExitStack() as until_renamed, atomic_folder(out) as folder:
        until_renamed.enter_context(_locked(folder))
        yield folder


def _remove_leftovers(out: Path) -> None:
    """Remove temporary folders of `out` whose writer is gone, which shows by their lock."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        with contextlib.suppress(OSError), _locked(folder):
            shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder; it ends with the process, however that ends.

    Raises:
        OSError: another process holds it.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def write_errors(out: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one ExportError that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"cannot write {out}: {error.strerror or error}. Free some space or give another folder", path=str(out)
        ) from error


def link_files(source: Path, target: Path) -> None:
    """Give a new folder the files of another, subfolders too, at no cost in space where the file system has links."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path.resolve(), place)
            except OSError:  # another file system, or one without links
                shutil.copy2(path, place)
