"""Arrays for results of one size after another: one that nobody has any longer is given out again.

Memory that comes fresh from the system is cleared page by page when it is first touched. Of 1,000 masks, 50 MB, that
took a third of the time (OpenVINO, two cores): 143 against 90 ms, measured once by a script outside the repository.
"""

import math
import sys

import numpy as np
from numpy.typing import NDArray

_SMALLEST = 1 << 20  # elements; smaller ones the C library reuses by itself
_MOST_KEPT = 6  # features and masks of the frame that is used, of the next, and one to spare


class ReusedArrays:
    """Gives out float32 arrays whose content is undefined. Not for use by two threads at once."""

    def __init__(self) -> None:
        self._kept: list[NDArray[np.float32]] = []

    def take(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An array (shape) float32 that is the caller's as long as he or a view of it holds it."""
        count = math.prod(shape)
        if count < _SMALLEST:
            return np.empty(shape, np.float32)
        for index in range(len(self._kept)):  # by index: a loop over arrays would hold them itself
            if self._kept[index].size == count and _references(self._kept, index) == _IDLE:
                return self._kept[index].reshape(shape)
        array = np.empty(count, np.float32)
        self._kept = [*self._kept, array][-_MOST_KEPT:]  # who has one that is dropped keeps it
        return array.reshape(shape)

    def clear(self) -> None:
        """Let go of all; those in use stay their users'."""
        self._kept.clear()


def _references(arrays: list[NDArray[np.float32]], index: int) -> int:
    return sys.getrefcount(arrays[index])


_IDLE = _references([np.empty(0, np.float32)], 0)
"""What `_references` finds of an array that only its list has; versions of Python count differently."""
