"""Memory that a library has let go of, given back to the system: a robot's other programs want it."""

import contextlib
import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

_SMAPS = Path("/proc/self/smaps")


class MappedFile:
    """The rest of a file from an offset on, mapped: pages are read when they are touched, and copied when written to.

    Attributes:
        content: (N,) uint8.
    """

    content: NDArray[np.uint8]

    def __init__(self, stream: IO[bytes], offset: int) -> None:
        """Map an open file, which may be closed afterwards.

        Raises:
            ValueError: nothing lies behind the offset.
            OSError: it cannot be mapped.
        """
        self._mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        if len(self._mapping) <= offset:
            raise ValueError(f"nothing lies behind byte {offset}")
        self.content = np.frombuffer(self._mapping, np.uint8, offset=offset)

    def release_pages(self) -> bool:
        """Take its pages out of this process's memory; whoever reads one again gets it again from the file.

        Nothing happens where a page was written to, for what was written would be lost, or where that cannot be known.

        Returns:
            Whether they were released.
        """
        if not hasattr(mmap, "MADV_DONTNEED") or not _is_clean(self.content.ctypes.data):
            return False
        self._mapping.madvise(mmap.MADV_DONTNEED)
        return True


def trim_heap() -> None:
    """Give the heap's free pages back to the system. glibc keeps them: after a model was loaded, hundreds of megabytes.

    Does nothing with another C library.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    with contextlib.suppress(OSError, AttributeError):
        trim = ctypes.CDLL(None).malloc_trim
        trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
        return trim
    return None


def _is_clean(address: int) -> bool:
    """Whether the mapping around an address is known to hold no page of this process's own."""
    try:
        lines = _SMAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    is_inside, own_kb = False, []
    for line in lines:
        name, _, value = line.partition(":")
        first, _, last = line.partition(" ")[0].partition("-")
        if last:
            is_inside = int(first, 16) <= address < int(last, 16)
        elif is_inside and name in ("Anonymous", "Swap"):
            own_kb.append(int(value.split()[0]))
    return own_kb == [0, 0]
