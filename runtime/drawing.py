"""Overlays: a picture with its labelled pixels in colour, and a legend that tells which colour is which prompt."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .labels import BACKGROUND, count_labels
from .legend import PANEL_RGB, LegendRow, draw_legend
from .palette import label_colours
from .preprocess import check_image

_LONG_SIDE = 512  # tiny pictures are magnified to about this, so that a legend is in proportion
_SHORT_SIDE_AT_LEAST = 48
_LONG_SIDE_AT_MOST = 4096  # where magnifying stops
_FONT_SHARE = 0.028
_SMALLEST_FONT_PX = 14
_CONTOUR_SHARE = 0.004
_STRIP_PIXELS = 1 << 20
_LIST_ALL_UP_TO = 24
_LUMA = np.array([77, 151, 28], np.uint16)  # of Rec. 601, summing to 256
Scalar = TypeVar("Scalar", bound=np.generic)


def draw_overlay(
    image_hwc: NDArray[np.uint8],
    label_map: NDArray[np.int16],
    names: Sequence[str],
    *,
    opacity: float = 0.6,
    legend: bool = True,
    compare: bool = False,
    font: str | Path | None = None,
) -> NDArray[np.uint8]:
    """Colour the labelled pixels of a picture, outline them, and add a legend with prompts and percent of area.

    Under a colour the picture turns grey, so that the colour is that of the legend whatever the picture's own. A dark
    line outside the outline keeps it visible on any ground.

    Args:
        image_hwc: (H, W, 3) uint8 RGB.
        label_map: (H, W) integers; -1 is background, i the i-th name.
        names: the prompts.
        opacity: of the colours, in [0, 1]; 0 leaves outlines alone.
        legend: add a panel outside the picture, below a wide one, right of others. Tiny pictures are then magnified by
            a whole number.
        compare: put the untouched picture before the coloured one, left of it or above a very wide one.
        font: a font file for prompts in scripts that the built-in font lacks; without it they are spelled out.

    Returns:
        (H', W', 3) uint8; of the picture's own size with neither legend nor comparison.

    Raises:
        InputError: not an image, a label map of another size or with labels that have no name, or a bad opacity.
    """
    image_hwc = check_image(image_hwc)
    _check_labels(image_hwc, label_map, names)
    if not 0 <= opacity <= 1:
        raise InputError(f"opacity is a number from 0 to 1, got {opacity}")
    zoom = _zoom(*label_map.shape) if legend else 1
    picture = _magnified(image_hwc, zoom)
    labels = _magnified(label_map, zoom)
    overlay = _coloured(picture, labels, len(names), opacity)
    if compare:
        overlay = _beside(picture, overlay)
    if not legend:
        return overlay
    return _with_legend(overlay, _legend_rows(label_map, names), font)


def _check_labels(image_hwc: NDArray[np.uint8], label_map: NDArray[np.int16], names: Sequence[str]) -> None:
    if label_map.shape != image_hwc.shape[:2] or not np.issubdtype(label_map.dtype, np.integer):
        raise InputError(
            f"the label map is {label_map.dtype} {label_map.shape}, the image needs integers {image_hwc.shape[:2]}"
        )
    lowest, highest = int(label_map.min()), int(label_map.max())
    if lowest < -1 or highest >= len(names):
        raise InputError(f"labels go from {lowest} to {highest}, but {len(names)} names allow -1 to {len(names) - 1}")


def _zoom(height: int, width: int) -> int:
    short, long = sorted((height, width))
    wanted = max(_LONG_SIDE // long, math.ceil(_SHORT_SIDE_AT_LEAST / short))
    return max(1, min(wanted, _LONG_SIDE_AT_MOST // long))


def _magnified(array: NDArray[Scalar], zoom: int) -> NDArray[Scalar]:
    return array if zoom == 1 else array.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _coloured(picture: NDArray[np.uint8], labels: NDArray[np.int16], count: int, opacity: float) -> NDArray[np.uint8]:
    """Fill and outline; works in strips, so that a huge picture needs little more memory than its copy."""
    height, width = labels.shape
    thickness = max(1, round(_CONTOUR_SHARE * math.sqrt(height * width)))
    labels = np.ascontiguousarray(labels, np.int16)
    inner = _near_edges(labels, thickness)
    outer = _near_edges(labels, max(1, thickness // 2))
    count = max(1, count)  # a table cannot be empty
    paints = _paints(count, opacity)
    overlay = np.empty_like(picture)
    rows_per_strip = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows_per_strip):
        rows = slice(top, top + rows_per_strip)
        strip, label = picture[rows], labels[rows]
        chosen = label + np.int32(0)
        np.copyto(chosen, chosen + count, where=inner[rows])  # a line's colours stand behind those of the fills
        chosen *= 256
        chosen += _grey(strip)
        painted = paints.take(chosen, mode="clip").view(np.uint8).reshape(*label.shape, 4)  # background is overwritten
        painted_rgb = cv2.cvtColor(painted, cv2.COLOR_RGBA2RGB)
        is_background = label == BACKGROUND
        cv2.copyTo(strip, is_background.view(np.uint8), painted_rgb)
        dark = is_background & outer[rows]
        cv2.copyTo(strip // 4, dark.view(np.uint8), painted_rgb)
        overlay[rows] = painted_rgb
    return overlay


def _paints(count: int, opacity: float) -> NDArray[np.uint32]:
    """Every colour an overlay can have over a grey: (2 * count * 256,) RGBA as one number; fills, then outlines."""
    paint = round(256 * opacity)
    colours = np.array(label_colours(count), np.uint16)[:, None]  # (count, 1, 3)
    greys = np.arange(256, dtype=np.uint16)[:, None]  # (256, 1)
    paints = np.zeros((2, count, 256, 4), np.uint8)
    paints[0, ..., :3] = (colours * paint + greys * (256 - paint)) >> 8
    paints[1, ..., :3] = colours
    return paints.view(np.uint32).ravel()


def _grey(picture: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Brightness of an RGB picture: (H, W, 3) uint8 -> (H, W) uint16, at most 255."""
    red, green, blue = cv2.split(picture)
    grey = red * _LUMA[0]
    grey += green * _LUMA[1]
    grey += blue * _LUMA[2]
    grey >>= 8
    return np.asarray(grey)


def _near_edges(labels: NDArray[np.int16], distance: int) -> NDArray[np.bool_]:
    """Pixels with another label within a square of `distance` pixels around them."""
    kernel = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    return np.asarray(cv2.dilate(labels, kernel) != cv2.erode(labels, kernel))


def _beside(picture: NDArray[np.uint8], overlay: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    axis = 0 if width > 2 * height else 1
    gap_shape = [height, width, 3]
    gap_shape[axis] = max(2, round(_CONTOUR_SHARE * math.sqrt(height * width)) * 2)
    gap = np.empty(gap_shape, np.uint8)
    gap[:] = PANEL_RGB
    return np.concatenate([picture, gap, overlay], axis=axis)


def _legend_rows(label_map: NDArray[np.int16], names: Sequence[str]) -> list[LegendRow]:
    """All prompts, or of very many only those that are there; and how much of the picture is none of them."""
    pixels = count_labels(label_map, len(names)) / label_map.size
    rows = [
        LegendRow(colour=colour, name=name, fraction=float(fraction))
        for colour, name, fraction in zip(label_colours(len(names)), names, pixels[1:], strict=True)
    ]
    if len(rows) > _LIST_ALL_UP_TO:
        found = [row for row in rows if row.fraction > 0]
        missing = LegendRow(colour=None, name=f"{len(rows) - len(found)} prompts not found", fraction=0.0)
        rows = [*found, missing] if len(found) < len(rows) else found
    if pixels[0] > 0:
        rows.append(LegendRow(colour=None, name="none of these", fraction=float(pixels[0])))
    return rows


def _with_legend(overlay: NDArray[np.uint8], rows: Sequence[LegendRow], font: str | Path | None) -> NDArray[np.uint8]:
    height, width = overlay.shape[:2]
    font_px = max(_SMALLEST_FONT_PX, round(_FONT_SHARE * math.sqrt(height * width)))
    if width > 1.1 * height:
        return np.concatenate([overlay, draw_legend(rows, font_px=font_px, width=width, font=font)])
    panel = draw_legend(rows, font_px=font_px, height=height, font=font)
    below = np.empty((len(panel) - height, width, 3), np.uint8)
    below[:] = PANEL_RGB
    return np.concatenate([np.concatenate([overlay, below]), panel], axis=1)
