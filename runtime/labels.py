"""From soft masks to a label map: each pixel goes to the prompt whose soft mask is highest, or to the background."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .fitted_masks import FittedMasks
from .upsample import RowMix, mix_rows, row_mix, widen_rows

BACKGROUND = -1
_MAX_PROMPTS = np.iinfo(np.int16).max
_BAND_BYTES = 1 << 18  # one mask of a band stays in the processor's second cache
_COUNTED_BYTES = 1 << 20  # of a label map at once: counting makes it four times as large
_ROUNDING = 1e-5  # far above what rounding does to a mix of values in [0, 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """A prompt that may win pixels of a band, and the columns outside which it cannot."""

    index: int
    columns: slice


def labels_from_masks(
    masks: FittedMasks | NDArray[np.float32], size: tuple[int, int], threshold: float | None
) -> NDArray[np.int16]:
    """Label an image from its soft masks: (H, W) int16; -1 is background, i the i-th prompt.

    The image is labelled in bands of rows, so that N masks at image size never exist. An interpolated value lies
    between the values around it, so the grid tells which prompts can win in a band, and between which columns: only
    these are resized there. The label map is that of resizing all.

    Args:
        masks: N soft masks in [0, 1], also as an array (N, h, w) float32.
        size: (H, W) of the image in pixels.
        threshold: value of the background, which wins ties; None for no background. Of equal prompts the first wins.

    Raises:
        InputError: no masks, or more than an int16 label map can tell apart.

    Source: the background channel is that of TCL's evaluation (Cha et al., CVPR 2023): a constant beside the masks.
    """
    masks = masks if isinstance(masks, FittedMasks) else FittedMasks.from_array(masks)
    if not 0 < len(masks) <= _MAX_PROMPTS:
        raise InputError(f"there are {len(masks)} masks; a label map can hold 1 to {_MAX_PROMPTS}")
    height, width = size
    label_map = np.full(size, BACKGROUND, np.int16)
    floor = np.float32(-np.inf if threshold is None else threshold)
    mix = row_mix(masks.size[0], height)
    cell_of_column = masks.grid_column(row_mix(masks.size[1], width).above)
    best = np.empty((_rows_per_band(width), width), np.float32)
    for rows in _bands(size):
        highest = best[: rows.stop - rows.start]
        highest[:] = floor
        for candidate in _candidates(masks.grid[:, masks.grid_rows(mix.sources(rows))], cell_of_column, floor):
            mask = _resized_band(masks, candidate.index, mix, rows, width, candidate.columns)
            before = highest[:, candidate.columns]
            np.copyto(label_map[rows, candidate.columns], np.int16(candidate.index), where=mask > before)
            np.maximum(before, mask, out=before)
    return label_map


def scores_from_labels(masks: FittedMasks, label_map: NDArray[np.int16]) -> NDArray[np.float64]:
    """Mean of each soft mask over the pixels that carry its label: (N,) float64, 0 where there are none.

    Args:
        masks: N soft masks.
        label_map: (H, W) int16, labels from -1 to N - 1.
    """
    size = label_map.shape[0], label_map.shape[1]
    sums, pixels = np.zeros(len(masks)), np.zeros(len(masks), np.int64)
    mix = row_mix(masks.size[0], size[0])
    for rows in _bands(size):
        label = label_map[rows]
        counted = count_labels(label, len(masks))[1:]
        pixels += counted
        for index in np.flatnonzero(counted).tolist():
            is_own = label == index
            own = np.flatnonzero(is_own.any(axis=0))
            columns = slice(int(own[0]), int(own[-1]) + 1)
            mask = _resized_band(masks, index, mix, rows, size[1], columns)
            sums[index] += mask.sum(where=is_own[:, columns], dtype=np.float64)
    return np.asarray(sums / np.maximum(pixels, 1))


def count_labels(label_map: NDArray[np.int16], count: int) -> NDArray[np.int64]:
    """Pixels of the background and of each of `count` prompts: (1 + count,) int64.

    Args:
        label_map: (H, W) integers from -1 on; those from `count` on are not counted.
        count: N.
    """
    flat, total = label_map.ravel(), np.zeros(1 + count, np.int64)
    step = _COUNTED_BYTES // flat.itemsize
    for start in range(0, len(flat), step):
        shifted = flat[start : start + step].astype(np.intp)
        shifted -= BACKGROUND
        total += np.bincount(shifted, minlength=1 + count)[: 1 + count]
    return total


def without_contrast(label_map: NDArray[np.int16], count: int) -> NDArray[np.int16]:
    """Give the pixels of all prompts from `count` on to the background; the first `count` keep theirs."""
    return np.where(label_map < count, label_map, np.int16(BACKGROUND))


def _rows_per_band(width: int) -> int:
    return max(1, _BAND_BYTES // (4 * width))


def _bands(size: tuple[int, int]) -> Iterator[slice]:
    step = _rows_per_band(size[1])
    for start in range(0, size[0], step):
        yield slice(start, min(start + step, size[0]))


def _candidates(
    grid_Nhw: NDArray[np.float32], cell_of_column: NDArray[np.intp], floor: np.float32
) -> Iterator[_Candidate]:
    """Prompts that may win a pixel of a band; the others stay below the background or some prompt all over it.

    Args:
        grid_Nhw: (N, rows, w) float32, the rows of the grid that the band is mixed of.
        cell_of_column: (W,) the first of the three columns of the grid that each column of the image is mixed of.
        floor: of the background.
    """
    highest = _over_three(np.maximum, grid_Nhw.max(axis=1))  # (N, w)
    lowest = _over_three(np.minimum, grid_Nhw.min(axis=1))
    bar = np.maximum(lowest.max(axis=0), floor) - np.float32(_ROUNDING)
    may_win = highest >= bar  # (N, w)
    for index in np.flatnonzero(may_win.any(axis=1)).tolist():
        cells = np.flatnonzero(may_win[index])
        left, right = np.searchsorted(cell_of_column, [cells[0], cells[-1] + 1])
        if left < right:  # padding, and cells of a shrunken image, hold no column
            yield _Candidate(index=index, columns=slice(int(left), int(right)))


def _over_three(choose: np.ufunc, values_Nw: NDArray[np.float32]) -> NDArray[np.float32]:
    """The highest or lowest of each column and the two after it."""
    chosen = values_Nw.copy()
    for ahead in (1, 2):
        choose(chosen[:, :-ahead], values_Nw[:, ahead:], out=chosen[:, :-ahead])
    return chosen


def _resized_band(
    masks: FittedMasks, index: int, mix: RowMix, rows: slice, width: int, columns: slice
) -> NDArray[np.float32]:
    """Some rows and columns of one mask at image size."""
    sources = mix.sources(rows)
    wide = widen_rows(masks.band(index, sources), width)
    return mix_rows(wide, mix, rows, first=sources.start, columns=columns)
