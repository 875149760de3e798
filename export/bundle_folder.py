"""The folder of a bundle while it is written: whole or not there, one writer at a time, nothing else overwritten."""

import contextlib
import glob
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tclkit.runtime.bundle import ENGINES_FOLDER, MANIFEST_NAME, Bundle, read_manifest
from tclkit.runtime.cpu_records import CPU_RECORDS_FOLDER, cpu_misfit, read_cpu_records
from tclkit.runtime.engines import engine_misfit, read_engines
from tclkit.runtime.errors import BundleError, ExportError
from tclkit.runtime.files import atomic_folder

_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")  # of atomic_file, left by a killed run
_log = logging.getLogger(__name__)


def require_replaceable(out: Path) -> None:
    """Refuse a target that holds anything but an older bundle: it would be lost."""
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; a bundle is a folder. Give another path")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_NAME).is_file():
        raise ExportError(f"{out} holds other files and would be replaced as a whole. Give a new folder, or empty it")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that takes the place of `out` at the end; what killed runs left beside it is removed first.

    Raises:
        ExportError: another process is writing `out`; what it or this one makes would be lost. Or `out` holds, then or
            at the end, what would be lost by replacing it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with _writing(out):
        _remove_leftovers(out)
        with contextlib.ExitStack() as until_renamed, atomic_folder(out) as folder:
            until_renamed.enter_context(_locked(folder))
            require_replaceable(out)
            was_empty = _is_empty(out)
            yield folder
            require_replaceable(out)
            if was_empty and not _is_empty(out):
                raise ExportError(f"{out} was written by something else meanwhile, and is left as it is", path=str(out))


def _is_empty(out: Path) -> bool:
    return not out.is_dir() or not any(out.iterdir())


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Hold the lock of a bundle's folder, which need not be there: that of a file beside it.

    Raises:
        ExportError: another process holds it.
    """
    lock = out.with_name(f".{out.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked_file(lock))
        except BlockingIOError as error:
            message = f"{out} is being written by another tclkit just now. Wait until it has finished"
            raise ExportError(message, path=str(out)) from error
        yield


def _remove_leftovers(out: Path) -> None:
    """Remove temporary folders of `out` whose writer is gone, which shows by their lock."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        with contextlib.suppress(OSError), _locked(folder):
            shutil.rmtree(folder)


@contextlib.contextmanager
def _locked_file(path: Path) -> Iterator[None]:
    """Hold a lock on a file that is made for it and removed with it; a killed process leaves the file, but no lock.

    Raises:
        OSError: another process holds it (BlockingIOError), or the file cannot be made.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, handle):  # else its holder removed it between the two, and the lock is nobody's
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)  # still held: who opened it meanwhile sees that it is gone
                return
        finally:
            os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


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


def carry_over(bundle: Bundle, folder: Path, *, replaces: Path) -> None:
    """Give a new folder the files that a bundle lists, and what was built of them.

    By links where it replaces the bundle itself, else by copies: who changed a file of one would change the other's.

    Args:
        bundle: whose files they are.
        folder: the new one.
        replaces: whose place it will take.
    """
    give = _link if replaces.resolve() == bundle.folder else _copy
    listed = {name: bundle.path(name) for name in bundle.manifest.files}
    listed[MANIFEST_NAME] = bundle.folder / MANIFEST_NAME
    for engine in read_engines(bundle):
        misfit = engine_misfit(bundle, engine, engine.record.device)
        if misfit is None or misfit.reason == "not trusted":  # which is asked when it is to be loaded
            for path in (engine.path, engine.path.with_suffix(".json")):
                listed[f"{ENGINES_FOLDER}/{path.name}"] = path
    for record in read_cpu_records(bundle):
        if not cpu_misfit(bundle, record, record.identity):
            name = f"{CPU_RECORDS_FOLDER}/{record.name}.json"
            listed[name] = bundle.folder / name
    for name, path in listed.items():
        give(path.resolve(), folder / name)


def keep_other_files(out: Path, folder: Path) -> None:
    """Give a new folder what else lies in the one that it will replace: notes, licences, engines of any machine.

    To be called last, for bundle.json lists what lies in a folder when it is written. Temporary files of killed runs
    go; so does a file whose name the new bundle needs itself, which is announced.

    Args:
        out: the folder to be replaced; it may not be there.
        folder: takes its place.
    """
    if not out.is_dir():
        return
    listed = {MANIFEST_NAME, *_listed_files(out)}
    for place, folders, files in os.walk(out, onerror=_raise):
        inside = Path(place).relative_to(out)
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in folders:
            if name not in links:
                (folder / inside / name).mkdir(exist_ok=True)
        for name in (*files, *links):
            file = inside / name
            if file.as_posix() in listed or _TEMPORARY.fullmatch(name):
                continue
            if not os.path.lexists(folder / file):
                _link(out / file, folder / file)
            elif file.parts[0] != ENGINES_FOLDER:  # there, what was built now follows what was built before
                _log.warning("removed: %s of %s, which bundle.json did not list; the bundle has its own now", file, out)


def _raise(error: OSError) -> None:
    """For os.walk, which passes over what it may not read."""
    raise error


def _listed_files(folder: Path) -> list[str]:
    """Names of the files of the bundle in a folder, if there is one that can be read."""
    try:
        return list(read_manifest(folder).files)
    except BundleError:
        return []


def _link(path: Path, place: Path) -> None:
    """Put a file in a place, as a link where links can be made; a symbolic link stays one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, place, follow_symlinks=False)
    except (OSError, NotImplementedError):  # another file system, or one without links
        _copy(path, place)


def _copy(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, place, follow_symlinks=False)
