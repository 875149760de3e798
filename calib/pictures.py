"""Pictures of an evaluation: which class is taken for which, and the images that came out best and worst."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from tclkit.runtime.drawing import draw_overlay
from tclkit.runtime.errors import InputError
from tclkit.runtime.legend import load_font, printable_text
from tclkit.runtime.palette import label_colours

from .benchmarks import IGNORED, Benchmark
from .metrics import Counts

Picture = npt.NDArray[np.uint8]

_PAPER, _INK, _GRID = (255, 255, 255), (30, 30, 30), (222, 222, 222)
_LOW, _HIGH = np.array((247, 251, 255), np.float64), np.array((8, 48, 107), np.float64)
_CELL_PX = ((25, 34), (64, 20), (10_000, 13))  # up to so many classes, pixels of a cell
_SHOWN_SHARE = 0.005
_MARGIN_PX = 12
_TILE_HEIGHT_PX = 240
_TILE_GAP_PX = 6


def draw_confusion(counts: Counts, classes: Sequence[str], *, title: str = "") -> Picture:
    """Draw which share of each class's pixels was predicted as which class.

    Classes that are neither in truth nor in prediction are left out. Rows are the truth, columns the prediction.

    Args:
        counts: (K + 1, K) of `count_pixels`.
        classes: K names.
        title: written above.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        InputError: the counts are not of these classes.
    """
    count = len(classes)
    if counts.shape != (count + 1, count):
        raise InputError(f"the counts are {counts.shape}, but {count} classes need {(count + 1, count)}")
    seen = np.flatnonzero((counts[:count].sum(1) > 0) | (counts.sum(0) > 0)).tolist()
    square = counts[:count][np.ix_(seen, seen)].astype(np.float64)
    shares = square / np.maximum(counts[seen].sum(1, keepdims=True), 1)
    cell = next(pixels for up_to, pixels in _CELL_PX if len(seen) <= up_to)
    font = load_font(None, min(14, max(9, round(cell * 0.55))))
    names = [printable_text(classes[index], font) for index in seen]
    wide = math.ceil(max((font.getlength(name) for name in names), default=0)) + 2 * _MARGIN_PX
    absent = count - len(seen)
    note = f"; left out for not occurring: {absent}" if absent else ""
    heading = [title, f"rows: truth, columns: prediction{note}"]
    top = _MARGIN_PX + 20 * len(heading) + wide
    side = cell * len(seen)
    width = max(
        wide + side + _MARGIN_PX,
        2 * _MARGIN_PX + math.ceil(max(load_font(None, 14).getlength(line) for line in heading)),
    )
    picture = np.empty((top + side + _MARGIN_PX, width, 3), np.uint8)
    picture[:] = _PAPER
    colours = (_LOW + (_HIGH - _LOW) * np.sqrt(shares)[..., None]).astype(np.uint8)
    if len(seen):
        picture[top : top + side, wide : wide + side] = colours.repeat(cell, axis=0).repeat(cell, axis=1)
        picture[top : top + side : cell, wide : wide + side] = _GRID
        picture[top : top + side, wide : wide + side : cell] = _GRID
    canvas = Image.fromarray(picture)
    _write_names(canvas, names, font, cell, (wide, top))
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(heading):
        draw.text((_MARGIN_PX, _MARGIN_PX + 20 * number), line, fill=_INK, font=load_font(None, 14))
    if cell >= _CELL_PX[0][1]:
        _write_shares(draw, shares, cell, (wide, top))
    return np.asarray(canvas)


def _write_names(
    canvas: Image.Image, names: Sequence[str], font: ImageFont.FreeTypeFont, cell: int, corner: tuple[int, int]
) -> None:
    """Names left of the rows, and above the columns from bottom to top."""
    left, top = corner
    draw = ImageDraw.Draw(canvas)
    for number, name in enumerate(names):
        middle = round((number + 0.5) * cell)
        draw.text((left - _MARGIN_PX // 2, top + middle), name, fill=_INK, font=font, anchor="rm")
        strip = Image.new("RGB", (max(1, math.ceil(font.getlength(name))), cell), _PAPER)
        ImageDraw.Draw(strip).text((0, cell // 2), name, fill=_INK, font=font, anchor="lm")
        upright = strip.transpose(Image.Transpose.ROTATE_90)
        canvas.paste(upright, (left + number * cell, top - _MARGIN_PX // 2 - upright.height))


def _write_shares(
    draw: ImageDraw.ImageDraw, shares: npt.NDArray[np.float64], cell: int, corner: tuple[int, int]
) -> None:
    font = load_font(None, 11)
    for (row, column), share in np.ndenumerate(shares):
        if share >= _SHOWN_SHARE:
            place = (corner[0] + (column + 0.5) * cell, corner[1] + (row + 0.5) * cell)
            ink = _PAPER if share > 0.25 else _INK
            draw.text(place, f"{share * 100:.0f}", fill=ink, font=font, anchor="mm")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GalleryItem:
    """One image of a gallery.

    caption: written above it.
    image_hwc: (H, W, 3) uint8.
    truth: (H, W) integers as the label file holds them.
    predicted: (H, W) integers in 0..K-1.
    """

    caption: str
    image_hwc: Picture
    truth: npt.NDArray[np.integer]
    predicted: npt.NDArray[np.integer]


def draw_gallery(items: Sequence[GalleryItem], benchmark: Benchmark) -> Picture:
    """Draw images one below the other: the picture, its truth, its prediction, and the colours of their classes.

    Raises:
        InputError: there are no images.
    """
    if not items:
        raise InputError("a gallery needs one image or more")
    rows = [_gallery_row(item, benchmark) for item in items]
    width = max(row.shape[1] for row in rows)
    gap = np.full((2 * _MARGIN_PX, width, 3), 255, np.uint8)
    parts: list[Picture] = []
    for row in rows:
        padded = np.full((row.shape[0], width, 3), 255, np.uint8)
        padded[:, : row.shape[1]] = row
        parts += [gap, padded]
    return np.concatenate([*parts, gap])


def _gallery_row(item: GalleryItem, benchmark: Benchmark) -> Picture:
    truth = _class_indices(item.truth, benchmark)
    shown_truth = _without_background(truth, benchmark)
    shown_predicted = _without_background(item.predicted.astype(np.int64), benchmark)
    present = sorted({*np.unique(shown_truth).tolist(), *np.unique(shown_predicted).tolist()} - {-1})
    names = [benchmark.classes[index] for index in present]
    overlays = [
        draw_overlay(item.image_hwc, _renumbered(labels, present), names or ["nothing"], legend=False)
        for labels in (shown_truth, shown_predicted)
    ]
    tiles = [_tile(picture) for picture in (item.image_hwc, *overlays)]
    width = sum(tile.shape[1] for tile in tiles) + 2 * _TILE_GAP_PX + 2 * _MARGIN_PX
    width = max(width, 480)
    lines = _legend_lines(names, width)
    picture = np.full((26 + _TILE_HEIGHT_PX + 22 * len(lines), width, 3), 255, np.uint8)
    left = _MARGIN_PX
    for tile in tiles:
        picture[26 : 26 + _TILE_HEIGHT_PX, left : left + tile.shape[1]] = tile
        left += tile.shape[1] + _TILE_GAP_PX
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    heading = f"{item.caption}   (image, truth, prediction)"
    draw.text((_MARGIN_PX, 4), printable_text(heading, load_font(None, 14)), fill=_INK, font=load_font(None, 14))
    _write_legend(draw, lines, names, 26 + _TILE_HEIGHT_PX + 4)
    return np.asarray(canvas)


def _class_indices(truth: npt.NDArray[np.integer], benchmark: Benchmark) -> npt.NDArray[np.int64]:
    """Class of each pixel, -1 where the truth names none."""
    indices = truth.astype(np.int64) - int(benchmark.reduce_zero_label)
    is_class = (truth != IGNORED) & (indices >= 0) & (indices < len(benchmark.classes))
    return np.where(is_class, indices, -1)


def _without_background(labels: npt.NDArray[np.int64], benchmark: Benchmark) -> npt.NDArray[np.int64]:
    return np.where(labels == 0, -1, labels) if benchmark.background else labels


def _renumbered(labels: npt.NDArray[np.int64], present: Sequence[int]) -> npt.NDArray[np.int16]:
    renumbered = np.full(labels.shape, -1, np.int16)
    for number, index in enumerate(present):
        renumbered[labels == index] = number
    return renumbered


def _tile(picture: Picture) -> Picture:
    height, width = picture.shape[:2]
    shrinks = height > _TILE_HEIGHT_PX
    size = (max(1, round(width * _TILE_HEIGHT_PX / height)), _TILE_HEIGHT_PX)
    way = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST
    return cv2.resize(picture, size, interpolation=way).astype(np.uint8, copy=False)


def _legend_lines(names: Sequence[str], width: int) -> list[list[tuple[int, int]]]:
    """(number of the name, x) of every name, line by line."""
    font = load_font(None, 12)
    lines: list[list[tuple[int, int]]] = [[]]
    x = _MARGIN_PX
    for number, name in enumerate(names):
        needed = 18 + math.ceil(font.getlength(printable_text(name, font))) + 14
        if lines[-1] and x + needed > width:
            lines.append([])
            x = _MARGIN_PX
        lines[-1].append((number, x))
        x += needed
    return lines


def _write_legend(
    draw: ImageDraw.ImageDraw, lines: Sequence[Sequence[tuple[int, int]]], names: Sequence[str], top: int
) -> None:
    font, colours = load_font(None, 12), label_colours(len(names))
    for row, line in enumerate(lines):
        y = top + 22 * row
        for number, x in line:
            draw.rectangle((x, y + 2, x + 12, y + 14), fill=colours[number])
            draw.text((x + 18, y + 8), printable_text(names[number], font), fill=_INK, font=font, anchor="lm")
