"""Soft masks at the size the model saw an image, made from the model's mask grid row by row, where they are needed.

A picture is labelled by few of the prompts that are asked for, and by those only in a part of it. So the masks stay on
the grid, a sixteenth of the pixels, until somebody asks for a prompt's rows.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FittedMasks:
    """N soft masks of (h, w) pixels, which are a rectangle of a resized grid.

    Attributes:
        grid: (N, gh, gw) float32, finite; or the masks themselves, see `from_array`.
        cell: (vertical, horizontal) pixels of a cell of the grid; masks are the grid resized bilinearly by it.
        rows: of the resized grid that belong to the image; the others are padding.
        columns: likewise.
    """

    grid: NDArray[np.float32]
    cell: tuple[int, int]
    rows: slice
    columns: slice

    @classmethod
    def from_array(cls, masks_Nhw: NDArray[np.float32]) -> "FittedMasks":
        """Take masks that are there already, (N, h, w) float32.

        Raises:
            InputError: another dtype or number of axes.
        """
        if masks_Nhw.dtype != np.float32 or masks_Nhw.ndim != 3:
            raise InputError(f"masks should be float32 (N, h, w), found {masks_Nhw.dtype} {masks_Nhw.shape}")
        _, height, width = masks_Nhw.shape
        return cls(grid=masks_Nhw, cell=(1, 1), rows=slice(0, height), columns=slice(0, width))

    def __len__(self) -> int:
        return len(self.grid)

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) in pixels."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def first(self, count: int) -> "FittedMasks":
        """The first `count` masks."""
        return FittedMasks(grid=self.grid[:count], cell=self.cell, rows=self.rows, columns=self.columns)

    def array(self) -> NDArray[np.float32]:
        """All masks, (N, h, w) float32 contiguous; the array itself where they are there already."""
        if self.cell == (1, 1) and self.size == self.grid.shape[1:]:
            return self.grid
        masks = np.empty((len(self), *self.size), np.float32)
        for index, mask in enumerate(masks):
            mask[:] = self.band(index, slice(0, len(mask)))
        return masks

    def band(self, index: int, rows: slice) -> NDArray[np.float32]:
        """Some rows of one mask: (len(rows), w) float32, bit for bit those of the whole; may be a view.

        Args:
            index: of the mask.
            rows: of the mask, in pixels.
        """
        start, stop = rows.start + self.rows.start, rows.stop + self.rows.start
        if self.cell == (1, 1):
            return self.grid[index, start:stop, self.columns]
        cells = self.grid_rows(rows)
        some, (height, width) = self.grid[index, cells], self.cell
        resized = cv2.resize(some, (some.shape[1] * width, len(some) * height), interpolation=cv2.INTER_LINEAR)
        offset = cells.start * height
        return resized[start - offset : stop - offset, self.columns].astype(np.float32, copy=False)

    def grid_rows(self, rows: slice) -> slice:
        """Rows of the grid that these rows of the masks are mixed of; two at least, where there are two."""
        start = max(0, _cell_before(rows.start + self.rows.start, self.cell[0]))
        stop = min(_cell_before(rows.stop + self.rows.start - 1, self.cell[0]) + 2, self.grid.shape[1])
        if stop - start == 1:  # OpenCV (5.0 and before) rounds otherwise where there is one row to resize
            start, stop = (0, min(2, self.grid.shape[1])) if start == 0 else (start - 1, stop)
        return slice(start, stop)

    def grid_column(self, column: NDArray[np.intp]) -> NDArray[np.intp]:
        """The first column of the grid that a column of the masks, or the one after it, is mixed of; three do for both.

        Args:
            column: of the masks, any shape.
        """
        cell = self.cell[1]
        return np.asarray(np.maximum((2 * (column + self.columns.start) + 1 - cell) // (2 * cell), 0), np.intp)


def _cell_before(pixel: int, cell: int) -> int:
    """The last cell whose middle is not beyond the pixel's: floor((pixel + 1/2) / cell - 1/2), -1 before the first."""
    return (2 * pixel + 1 - cell) // (2 * cell)
