"""Masks in COCO's annotation format: polygons and both forms of run lengths, turned into pixels.

A pixel belongs to a polygon when its centre lies inside (even-odd rule); an object's polygons are united. pycocotools
instead walks the outline on a grid five times as fine, so the two may differ by a pixel along outlines. Run lengths are
exact. Neither needs pycocotools, which has to be compiled on some boards.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tclkit.runtime.errors import InputError

Mask = npt.NDArray[np.bool_]


def mask_from_segmentation(segmentation: Any, size: tuple[int, int]) -> Mask:
    """Pixels of one annotation.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...] in pixels, or {"size": [H, W], "counts": ...} with run lengths
            as a list or as COCO's text.
        size: (H, W) of the image.

    Returns:
        (H, W) bool.

    Raises:
        InputError: neither form, a polygon that is not pairs of numbers, or run lengths that do not fill the image.
    """
    if isinstance(segmentation, Mapping):
        return _mask_from_runs(segmentation, size)
    if isinstance(segmentation, list) and all(isinstance(polygon, list) for polygon in segmentation):
        mask: Mask = np.zeros(size, np.bool_)
        for polygon in segmentation:
            mask |= mask_from_polygon(polygon, size)
        return mask
    raise InputError(f"a segmentation is polygons or run lengths, found {type(segmentation).__name__}")


def mask_from_polygon(polygon: Sequence[float], size: tuple[int, int]) -> Mask:
    """Pixels whose centres lie inside a polygon x, y, x, y, ... (even-odd): (H, W) bool.

    Raises:
        InputError: it is not pairs of finite numbers.
    """
    height, width = size
    try:
        points = np.asarray(polygon, np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise InputError(f"a polygon is numbers x, y, x, y, ...: {error}") from error
    if not np.isfinite(points).all():
        raise InputError("a polygon has a corner that is not a finite number")
    x0, y0 = points.T
    x1, y1 = np.roll(points, -1, axis=0).T
    toggles = np.zeros((height, width + 1), np.int32)
    first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(np.int64)
    for edge in np.flatnonzero(last > first):
        rows = np.arange(first[edge], last[edge])
        slope = (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
        crossings = x0[edge] + (rows + 0.5 - y0[edge]) * slope
        columns = np.clip(np.ceil(crossings - 0.5), 0, width).astype(np.int64)
        np.add.at(toggles, (rows, columns), 1)
    return np.asarray(toggles[:, :-1].cumsum(axis=1) % 2 == 1)


def runs_from_text(text: str) -> list[int]:
    """Run lengths from COCO's text: six-bit characters, five bits of a signed number each, differences from the fourth.

    Raises:
        InputError: a character is not of this code, or the text breaks off.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            raise InputError(f"run lengths hold the character {character!r}, which is none of their code")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise InputError("run lengths break off in the middle of a number")
    return runs


def _mask_from_runs(segmentation: Mapping[str, Any], size: tuple[int, int]) -> Mask:
    counts = segmentation.get("counts")
    runs = runs_from_text(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or segmentation.get("size") != list(size):
        raise InputError(f"run lengths are for {segmentation.get('size')}, the image is {list(size)} (H, W)")
    try:
        lengths = np.asarray(runs, np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"run lengths are whole numbers: {error}") from error
    if lengths.ndim != 1 or lengths.sum() != size[0] * size[1] or (lengths < 0).any():
        raise InputError(f"run lengths cover {lengths.sum()} pixels, the image has {size[0] * size[1]}")
    values = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return np.ascontiguousarray(values.reshape(size[1], size[0]).T)  # column by column
