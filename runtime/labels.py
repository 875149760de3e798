"""From soft masks to a label map: each pixel goes to the prompt whose soft mask is highest, or to the background."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .upsample import resized_strips

BACKGROUND = -1
_MAX_PROMPTS = np.iinfo(np.int16).max


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Labels:
    """A label map and what was counted on the way.

    Attributes:
        label_map: (H, W) int16; -1 is background, i the i-th prompt.
        pixels: (N,) int64, pixels of each prompt.
        scores: (N,) float64, mean of a prompt's soft mask over its own pixels; 0 where it has none.
    """

    label_map: NDArray[np.int16]
    pixels: NDArray[np.int64]
    scores: NDArray[np.float64]


def labels_from_masks(masks_Nhw: NDArray[np.float32], size: tuple[int, int], threshold: float | None) -> Labels:
    """Label an image from its soft masks.

    The masks are resized to the image strip by strip, so that N masks at image size never exist.

    Args:
        masks_Nhw: (N, h, w) float32 in [0, 1].
        size: (H, W) of the image in pixels.
        threshold: value of the background, which wins ties; None for no background. Of equal prompts the first wins.

    Raises:
        InputError: no masks, or more than an int16 label map can tell apart.

    Source: the background channel is that of TCL's evaluation (Cha et al., CVPR 2023): a constant beside the masks.
    """
    count = len(masks_Nhw)
    if not 0 < count <= _MAX_PROMPTS:
        raise InputError(f"there are {count} masks; a label map can hold 1 to {_MAX_PROMPTS}")
    label_map = np.empty(size, np.int16)
    pixels, sums = np.zeros(count + 1, np.int64), np.zeros(count + 1)
    floor = np.float32(-np.inf if threshold is None else threshold)
    for rows, strip_NHW in resized_strips(masks_Nhw, size):
        label, best = label_map[rows], np.full(strip_NHW.shape[1:], floor)
        label[:] = BACKGROUND
        for index, mask in enumerate(strip_NHW):
            is_higher = mask > best
            np.copyto(label, np.int16(index), where=is_higher)
            np.maximum(best, mask, out=best)
        bins = label.ravel().astype(np.intp) + 1
        pixels += np.bincount(bins, minlength=count + 1)
        sums += np.bincount(bins, weights=best.ravel(), minlength=count + 1)
    return Labels(label_map=label_map, pixels=pixels[1:], scores=sums[1:] / np.maximum(pixels[1:], 1))


def without_contrast(labels: Labels, count: int) -> Labels:
    """Give the pixels of all prompts from `count` on to the background; the first `count` keep theirs."""
    label_map = np.where(labels.label_map < count, labels.label_map, np.int16(BACKGROUND))
    return Labels(label_map=label_map, pixels=labels.pixels[:count], scores=labels.scores[:count])
