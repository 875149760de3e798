"""Pixel-adaptive mask refinement (PAMR), without torch: masks are pulled to the edges of the image, nothing is learnt.

Every pixel takes a weighted mean of its neighbours in the mask, again and again; the weights come from how alike the
image is there. They depend on the image alone and are shared by all masks. Memory for the weights is 4 bytes x 8
neighbours x dilations a pixel (192 bytes a pixel by default), whatever the number of masks.

Source: Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, as TCL uses it.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from .errors import InputError

ITERATIONS = 10
DILATIONS = (1, 2, 4, 8, 12, 24)
_MASKS_TOGETHER = 4  # measured: 112 x 112 masks and their borders fit the second-level cache
_NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))  # (dy, dx)


def refine_masks(
    image_hwc: NDArray[np.float32],
    masks_Nhw: NDArray[np.float32],
    *,
    iterations: int = ITERATIONS,
    dilations: Sequence[int] = DILATIONS,
) -> NDArray[np.float32]:
    """Refine soft masks along the edges of an image.

    Args:
        image_hwc: (H, W, C) float32, on any scale: what counts is differences relative to their local spread.
        masks_Nhw: (N, h, w) float32; resized to the image (corners aligned) where the sizes differ.
        iterations: how often; 0 returns the masks.
        dilations: distances of the neighbours in pixels.

    Returns:
        (N, H, W) float32.

    Raises:
        InputError: the arrays are not (H, W, C) and (N, h, w), or no dilation is given.
    """
    if image_hwc.ndim != 3 or masks_Nhw.ndim != 3:
        raise InputError(f"PAMR takes image (H, W, C) and masks (N, h, w), got {image_hwc.shape} and {masks_Nhw.shape}")
    if not dilations or min(dilations) < 1:
        raise InputError(f"PAMR needs one or more dilations of at least 1 pixel, got {tuple(dilations)}")
    masks = resize_with_corners(masks_Nhw, (image_hwc.shape[0], image_hwc.shape[1]))
    refined = np.array(masks, np.float32, order="C")
    if len(refined) and iterations:
        _refine_in_place(refined, affinities(image_hwc, dilations), iterations, dilations)
    return refined


def _refine_in_place(
    masks_NHW: NDArray[np.float32], weights_PHW: NDArray[np.float32], iterations: int, dilations: Sequence[int]
) -> None:
    """Iterate on a few masks at a time: a weight is read once for all of them, and they stay in the processor's cache.

    OpenCV's accumulateProduct multiplies and adds in one pass over memory, where numpy takes two.
    """
    height, width = masks_NHW.shape[1:]
    reach = max(dilations)
    offsets = [(reach + dy * dilation, reach + dx * dilation) for dilation in dilations for dy, dx in _NEIGHBOURS]
    together = min(_MASKS_TOGETHER, len(masks_NHW))
    padded = [np.empty((height + 2 * reach, width + 2 * reach), np.float32) for _ in range(together)]
    shifted = [[plane[top : top + height, left : left + width] for plane in padded] for top, left in offsets]
    for start in range(0, len(masks_NHW), together):
        masks = list(masks_NHW[start : start + together])
        for _ in range(iterations):
            for mask_HW, plane in zip(masks, padded, strict=False):
                cv2.copyMakeBorder(mask_HW, reach, reach, reach, reach, cv2.BORDER_REPLICATE, plane)
                mask_HW.fill(0)
            for weight_HW, neighbours in zip(weights_PHW, shifted, strict=True):
                for mask_HW, neighbour_HW in zip(masks, neighbours, strict=False):
                    cv2.accumulateProduct(weight_HW, neighbour_HW, mask_HW)


def highest_refined(masks_Nhw: NDArray[np.float32]) -> NDArray[np.float32]:
    """Upper bound of every mask's refined values, (N,) float32: its own maximum.

    A refined value is a weighted mean of the mask's values with weights that are not negative and sum to 1, so no
    iteration passes the maximum (but by rounding, 1e-6). Mixing masks, averaging windows and bilinear resizing are such
    means, too. So a prompt whose bound stays at or below the background's threshold in every window of an image cannot
    label a pixel, refined or not, and need not be refined for a label map.
    """
    return np.asarray(masks_Nhw.reshape(len(masks_Nhw), -1).max(axis=1), np.float32)


def affinities(image_hwc: NDArray[np.float32], dilations: Sequence[int] = DILATIONS) -> NDArray[np.float32]:
    """Weights of the neighbours of every pixel: (8 x dilations, H, W) float32, summing to 1 over the first axis.

    The order is dilation by dilation, and in each the eight neighbours row by row.
    """
    height, width, channels = image_hwc.shape
    std_CHW = local_std(image_hwc, dilations)
    scale_CHW = 1 / (np.float32(1e-8) + np.float32(0.1) * std_CHW)
    reach = max(dilations)
    weights = np.zeros((len(_NEIGHBOURS) * len(dilations), height, width), np.float32)
    for channel in range(channels):
        plane = np.ascontiguousarray(image_hwc[..., channel], np.float32)
        padded = np.pad(plane, reach, mode="edge")
        offsets = ((dy * dilation, dx * dilation) for dilation in dilations for dy, dx in _NEIGHBOURS)
        for weight_HW, (dy, dx) in zip(weights, offsets, strict=True):
            difference = padded[reach + dy : reach + dy + height, reach + dx : reach + dx + width] - plane
            weight_HW -= np.abs(difference) * scale_CHW[channel]
    weights /= channels
    weights -= weights.max(axis=0)
    np.exp(weights, out=weights)
    weights /= weights.sum(axis=0)
    return weights


def local_std(image_hwc: NDArray[np.float32], dilations: Sequence[int] = DILATIONS) -> NDArray[np.float32]:
    """Unbiased standard deviation over each pixel and its neighbours, the pixel counted once a dilation: (C, H, W)."""
    height, width, channels = image_hwc.shape
    reach = max(dilations)
    offsets = [(dy * dilation, dx * dilation) for dilation in dilations for dy, dx in (*_NEIGHBOURS, (0, 0))]
    std = np.empty((channels, height, width), np.float32)
    for channel in range(channels):
        padded = np.pad(np.ascontiguousarray(image_hwc[..., channel], np.float32), reach, mode="edge")
        shifts = [padded[reach + dy : reach + dy + height, reach + dx : reach + dx + width] for dy, dx in offsets]
        mean = np.zeros((height, width), np.float32)
        for shifted in shifts:
            mean += shifted
        mean /= len(shifts)
        squares = np.zeros((height, width), np.float32)
        for shifted in shifts:
            squares += np.square(shifted - mean)
        np.sqrt(squares / (len(shifts) - 1), out=std[channel])
    return std


def resize_with_corners(planes_Nhw: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize bilinearly, the centres of the corner pixels staying (torch's align_corners=True): (N, H, W) float32."""
    if planes_Nhw.shape[1:] == tuple(size):
        return planes_Nhw
    rows_above, rows_below, row_share = _corner_taps(planes_Nhw.shape[1], size[0])
    columns_left, columns_right, column_share = _corner_taps(planes_Nhw.shape[2], size[1])
    upper, lower = planes_Nhw[:, rows_above], planes_Nhw[:, rows_below]
    tall = upper + (lower - upper) * row_share[:, None]
    left, right = tall[..., columns_left], tall[..., columns_right]
    return np.asarray(left + (right - left) * column_share, np.float32)


def _corner_taps(source: int, target: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    position = np.linspace(0, source - 1, target) if target > 1 else np.zeros(1)
    first = np.minimum(position.astype(np.intp), source - 1)
    second = np.minimum(first + 1, source - 1)
    return first, second, (position - first).astype(np.float32)
