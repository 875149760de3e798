"""Bilinear resizing of soft masks, whole or in strips of rows that bound the memory.

Both follow torch's `interpolate(mode="bilinear", align_corners=False)`, which is OpenCV's INTER_LINEAR on floats.
"""

from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

_STRIP_BYTES = 1 << 20  # a strip of all masks stays in the processor's cache


def resize_masks(masks_Nhw: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize every mask to `size` (H, W), without antialiasing.

    Args:
        masks_Nhw: (N, h, w) float32.
        size: (H, W) in pixels.

    Returns:
        (N, H, W) float32; the input itself if it has that size already.
    """
    if masks_Nhw.shape[1:] == tuple(size):
        return masks_Nhw
    height, width = size
    resized = np.empty((len(masks_Nhw), height, width), np.float32)
    for plane, mask in zip(resized, masks_Nhw, strict=True):
        plane[:] = cv2.resize(mask, (width, height), interpolation=cv2.INTER_LINEAR)
    return resized


def resized_strips(
    masks_Nhw: NDArray[np.float32], size: tuple[int, int]
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield `resize_masks(masks_Nhw, size)` in strips: (rows, (N, len(rows), W) float32).

    Values are those of `resize_masks` to within rounding (1e-6). Strips are fresh arrays.
    """
    height, width = size
    source_height = masks_Nhw.shape[1]
    wide = resize_masks(masks_Nhw, (source_height, width))  # (N, h, W)
    position = np.maximum((np.arange(height) + 0.5) * (source_height / height) - 0.5, 0)
    above = np.minimum(position.astype(np.intp), source_height - 1)
    below = np.minimum(above + 1, source_height - 1)
    share = (position - above).astype(np.float32)[:, None]
    rows_per_strip = max(1, _STRIP_BYTES // (4 * width * max(1, len(masks_Nhw))))
    for start in range(0, height, rows_per_strip):
        rows = slice(start, min(start + rows_per_strip, height))
        strip = wide[:, below[rows]] - wide[:, above[rows]]
        strip *= share[rows]
        strip += wide[:, above[rows]]
        yield rows, strip
