"""The bytes of an unfinished download on disk, with a note of where they come from."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tclkit.runtime.errors import DownloadError
from tclkit.runtime.files import atomic_file


def part_path(target: Path) -> Path:
    """Where the bytes of an unfinished `target` are kept."""
    return target.with_name(target.name + ".part")


class PartFile:
    """`NAME.part` and the note `NAME.part.json` beside it; bytes are only ever appended, unbuffered."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.path = path
        self._stream = stream
        self._note_path = path.with_name(path.name + ".json")

    @property
    def size(self) -> int:
        """Bytes so far."""
        return os.fstat(self._stream.fileno()).st_size

    def note(self) -> dict[str, Any]:
        """Return what is known of the bytes' origin: empty when nothing is, or the note cannot be read."""
        try:
            note = json.loads(self._note_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def begin(self, note: Mapping[str, Any]) -> None:
        """Empty the file and note where the bytes to come are from."""
        self.restart()
        with atomic_file(self._note_path) as path:
            path.write_text(json.dumps(dict(note)), encoding="utf-8")

    def restart(self) -> None:
        """Empty the file; the note goes first, so that bytes never stand beside another file's note."""
        self._note_path.unlink(missing_ok=True)
        self._stream.truncate(0)

    def append(self, chunk: bytes) -> None:
        """Write at the end."""
        view = memoryview(chunk)
        while view:  # an unbuffered write may take fewer bytes than it was given
            view = view[self._stream.write(view) :]

    def discard(self) -> None:
        """Remove the file and its note."""
        self._note_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def become(self, target: Path) -> None:
        """Put the file in the place of `target`."""
        os.fsync(self._stream.fileno())
        self._stream.close()
        self.path.replace(target)
        self._note_path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_part_file(target: Path) -> Iterator[PartFile]:
    """Yield the part file of `target`, held against other processes; it stays unless it is empty or became the target.

    Raises:
        DownloadError: another process holds it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    path = part_path(target)
    with path.open("ab", buffering=0) as stream:
        _lock(stream, path)
        part = PartFile(path, stream)
        try:
            yield part
        finally:
            if not stream.closed and part.size == 0:
                part.discard()


def _lock(stream: IO[bytes], path: Path) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        # The last holder may have renamed the file between our opening it and our holding it.
        if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
            return
    raise DownloadError(
        f"another process is downloading {path.stem} to {path.parent}: wait for it, then run this again", path=str(path)
    )
