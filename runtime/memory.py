"""Memory that a library has let go of, given back to the system: a robot's other programs want it."""

import contextlib
import ctypes
import functools
import mmap
import sys
import threading
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
from numpy.typing import NDArray

_RELEASE_EVERY_S = 0.01  # in which a library reads some 10 MB


class MappedFile:
    """The rest of a file from an offset on, mapped to be read: pages come when they are touched, and can be let go of.

    Attributes:
        content: (N,) uint8, read-only.
    """

    content: NDArray[np.uint8]

    def __init__(self, stream: IO[bytes], offset: int) -> None:
        """Map an open file, which may be closed afterwards.

        Raises:
            ValueError: nothing lies behind the offset.
            OSError: it cannot be mapped.
        """
        self._mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._mapping) <= offset:
            raise ValueError(f"nothing lies behind byte {offset}")
        self.content = np.frombuffer(self._mapping, np.uint8, offset=offset)

    def insisted_on(self) -> NDArray[np.uint8]:
        """The same bytes as an array that says it may be written to, for a library that takes no other and only reads.

        Nothing can be written all the same: the system ends a process that tries. The array does not keep the mapping.
        """
        size, address = self.content.size, self.content.ctypes.data
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def release_pages(self) -> None:
        """Take its pages out of this process's memory; whoever reads one again gets it again from the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    @contextlib.contextmanager
    def releasing_pages(self) -> Iterator[None]:
        """Release them again and again, and at the end, while a library reads the file once."""
        done = threading.Event()

        def release() -> None:
            while not done.wait(_RELEASE_EVERY_S):
                self.release_pages()

        thread = threading.Thread(target=release, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.release_pages()


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
