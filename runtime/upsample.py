"""Bilinear resizing of soft masks, whole or in strips of rows that bound the memory.

All follow torch's `interpolate(mode="bilinear", align_corners=False)`, which is OpenCV's INTER_LINEAR on floats.
"""

from collections.abc import Iterator
from dataclasses import dataclass

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
        cv2.resize(mask, (width, height), dst=plane, interpolation=cv2.INTER_LINEAR)
    return resized


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowMix:
    """Of which two source rows, and in what shares, each of H rows of a resized mask is made.

    Attributes:
        above: (H,) the upper source row.
        below: (H,) the lower source row, at most one further.
        share: (H, 1) float32, of the lower row.
    """

    above: NDArray[np.intp]
    below: NDArray[np.intp]
    share: NDArray[np.float32]

    def sources(self, rows: slice) -> slice:
        """Source rows that these rows are made of; two at least, where there are two."""
        start, stop = int(self.above[rows.start]), int(self.below[rows.stop - 1]) + 1
        return slice(max(0, start - 1) if stop - start == 1 else start, stop)  # OpenCV rounds a lone row otherwise


def row_mix(source_height: int, height: int) -> RowMix:
    """Plan how `source_height` rows become `height`; for columns it says between which two each lies."""
    position = np.maximum((np.arange(height) + 0.5) * (source_height / height) - 0.5, 0)
    above = np.minimum(position.astype(np.intp), source_height - 1)
    below = np.minimum(above + 1, source_height - 1)
    return RowMix(above=above, below=below, share=(position - above).astype(np.float32)[:, None])


def widen_rows(mask_hw: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Resize every row of a mask to `width`: (h, W) float32; the input itself if it is that wide already."""
    if mask_hw.shape[1] == width:
        return mask_hw
    wide = cv2.resize(mask_hw, (width, len(mask_hw)), interpolation=cv2.INTER_LINEAR)
    return wide.astype(np.float32, copy=False)


def mix_rows(
    wide_hW: NDArray[np.float32], mix: RowMix, rows: slice, *, first: int = 0, columns: slice = slice(None)
) -> NDArray[np.float32]:
    """Make rows of a resized mask from widened ones: (len(rows), len(columns)) float32, a fresh array.

    Args:
        wide_hW: source rows from `first` on, at full width, all that `mix` asks for; leading axes are kept.
        mix: from `row_mix`, of the whole mask.
        rows: of the resized mask.
        first: number of the first row of `wide_hW`.
        columns: of the resized mask.
    """
    upper = wide_hW[..., mix.above[rows] - first, columns]
    mixed = wide_hW[..., mix.below[rows] - first, columns]
    mixed -= upper
    mixed *= mix.share[rows]
    mixed += upper
    return mixed


def resized_strips(
    masks_Nhw: NDArray[np.float32], size: tuple[int, int]
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield `resize_masks(masks_Nhw, size)` in strips: (rows, (N, len(rows), W) float32).

    Values are those of `resize_masks` to within rounding (1e-6). Strips are fresh arrays.
    """
    height, width = size
    wide = resize_masks(masks_Nhw, (masks_Nhw.shape[1], width))  # (N, h, W)
    mix = row_mix(masks_Nhw.shape[1], height)
    rows_per_strip = max(1, _STRIP_BYTES // (4 * width * max(1, len(masks_Nhw))))
    for start in range(0, height, rows_per_strip):
        rows = slice(start, min(start + rows_per_strip, height))
        yield rows, mix_rows(wide, mix, rows)
