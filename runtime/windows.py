"""Sliding windows over an image: where they lie, and the average where they overlap.

Source: mmsegmentation 0.27, `slide_inference`, as the published protocol of TCL uses it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Window(NamedTuple):
    """A rectangle of pixels, half open: rows top..bottom, columns left..right."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def height(self) -> int:
        """Rows."""
        return self.bottom - self.top

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left


def window_positions(
    image_size: tuple[int, int], window_size: tuple[int, int], stride: tuple[int, int]
) -> tuple[Window, ...]:
    """Cover an image with windows, row by row; the last of a row or column is shifted back to the border.

    Args:
        image_size: (H, W) in pixels.
        window_size: (H, W) in pixels; where the image is smaller, so are the windows.
        stride: (vertical, horizontal) in pixels, at least 1.
    """
    return tuple(
        Window(top, bottom, left, right)
        for top, bottom in _intervals(image_size[0], window_size[0], stride[0])
        for left, right in _intervals(image_size[1], window_size[1], stride[1])
    )


def _intervals(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    count = max(length - window + stride - 1, 0) // stride + 1
    ends = [min(index * stride + window, length) for index in range(count)]
    return [(max(end - window, 0), end) for end in ends]


class WindowAverage:
    """The mean of soft masks over all windows that cover a pixel, gathered window by window.

    Args:
        count: masks, N.
        size: (H, W) of the whole in pixels.
    """

    def __init__(self, count: int, size: tuple[int, int]) -> None:
        self._sum_NHW = np.zeros((count, *size), np.float32)
        self._windows_HW = np.zeros(size, np.float32)

    def add(self, window: Window, masks_Nhw: NDArray[np.float32]) -> None:
        """Add the masks of one window, (N, window.height, window.width) float32."""
        self._sum_NHW[:, window.top : window.bottom, window.left : window.right] += masks_Nhw
        self._windows_HW[window.top : window.bottom, window.left : window.right] += 1

    def mean(self) -> NDArray[np.float32]:
        """(N, H, W) float32; call it once, when the windows cover every pixel."""
        assert self._windows_HW.min() > 0, "a pixel lies in no window"
        self._sum_NHW /= self._windows_HW
        return self._sum_NHW
