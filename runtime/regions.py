"""Connected regions of a label map as boxes and polygons.

Regions are 4-connected: pixels that touch only at a corner belong to different regions. Polygons run along the edges of
the pixels, in corner coordinates: (0, 0) is the upper left corner of the image, (W, H) the lower right. So the area
inside the outer ring minus the holes is the number of pixels, a box is the polygon's bounds, and no ring crosses or
touches itself (rings of one region may meet at single points).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .labels import count_labels

Ring = NDArray[np.int32]  # (K, 2) x, y


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Region:
    """One connected region of a prompt.

    Attributes:
        name: the prompt.
        index: number of the prompt.
        area_px: pixels.
        box: (x0, y0, x1, y1) in pixels, x1 and y1 just outside.
        outer: outer ring, (K, 2) int32 of x, y, clockwise on the screen, not closed.
        holes: rings of the holes, counterclockwise.
    """

    name: str
    index: int
    area_px: int
    box: tuple[int, int, int, int]
    outer: Ring
    holes: tuple[Ring, ...]


def regions_from_label_map(
    label_map: NDArray[np.int16], names: Sequence[str], *, min_area_px: int = 1, simplify_px: float = 0.0
) -> list[Region]:
    """Find the connected regions of every prompt, in the order of the prompts, the largest of each first.

    Args:
        label_map: (H, W) integers; -1 is background, i the i-th name.
        names: the prompts.
        min_area_px: smaller regions are left out; holes stay, however small.
        simplify_px: rings may deviate this many pixels from the edges, which saves most of their points; 0 is exact. A
            simplified ring is no longer guaranteed not to touch others.
    """
    regions: list[Region] = []
    for index in _present(label_map, len(names)):
        mask, left, top = _cropped_mask(label_map, index)
        _, components, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
        for component in _largest_first(stats, min_area_px):
            x, y, width, height, area_px = (int(value) for value in stats[component])
            inside = components[y : y + height, x : x + width] == component
            offset = np.array([left + x, top + y], np.int32)
            outer, *holes = (simplified_ring(ring + offset, simplify_px) for ring in rings_from_mask(inside))
            box = (left + x, top + y, left + x + width, top + y + height)
            regions.append(
                Region(name=names[index], index=index, area_px=area_px, box=box, outer=outer, holes=tuple(holes)),
            )
    return regions


def count_regions(label_map: NDArray[np.int16], count: int, *, min_area_px: int = 1) -> list[int]:
    """Number of regions of each prompt, as many as `regions_from_label_map` finds, without tracing them.

    Args:
        label_map: (H, W) integers; -1 is background, i the i-th prompt.
        count: prompts.
        min_area_px: smaller regions are left out.
    """
    counts = [0] * count
    for index in _present(label_map, count):
        mask, _, _ = _cropped_mask(label_map, index)
        _, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
        counts[index] = len(_largest_first(stats, min_area_px))
    return counts


def _present(label_map: NDArray[np.int16], count: int) -> list[int]:
    return [int(index) for index in np.flatnonzero(count_labels(label_map, count)[1:])]


def _largest_first(stats: "cv2.typing.MatLike", min_area_px: int) -> list[int]:
    """Components that are large enough, as OpenCV numbers them; number 0 is the background."""
    areas = stats[:, cv2.CC_STAT_AREA].tolist()
    order = sorted(range(1, len(areas)), key=lambda component: -areas[component])
    return [component for component in order if areas[component] >= max(1, min_area_px)]


def _cropped_mask(label_map: NDArray[np.int16], index: int) -> tuple[NDArray[np.uint8], int, int]:
    """Pixels of one label, cut to where they are, with the left column and top row of the cut."""
    mask = label_map == index
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.zeros((1, 1), np.uint8), 0, 0
    cut = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.ascontiguousarray(cut).view(np.uint8), int(columns[0]), int(rows[0])


def simplified_ring(ring: Ring, tolerance_px: float) -> Ring:
    """Drop points of a ring that lie within a tolerance of it (Douglas-Peucker); never fewer than 3 remain."""
    if tolerance_px <= 0:
        return ring
    simple = cv2.approxPolyDP(ring[:, None].astype(np.int32), tolerance_px, True)[:, 0]
    return simple.astype(np.int32) if len(simple) >= 3 else ring


def ring_area(ring: Ring) -> float:
    """Area inside a ring in pixels, positive when it runs clockwise on the screen."""
    x, y = ring.T.astype(np.int64)
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2


def rings_from_mask(mask: NDArray[np.bool_]) -> list[Ring]:
    """Trace the pixel edges of one 4-connected region: the outer ring, then its holes, in corner coordinates.

    The border consists of straight segments between corners at which it turns. Along each grid line these corners pair
    up to segments, so that only the linking of segments to rings is a loop.

    Args:
        mask: (H, W) bool, not empty.
    """
    padded = np.pad(mask, 1).astype(np.uint8)
    upper_left, upper_right = padded[:-1, :-1], padded[:-1, 1:]
    lower_left, lower_right = padded[1:, :-1], padded[1:, 1:]
    inside = upper_left + upper_right + lower_left + lower_right  # (H+1, W+1) pixels of the region around each corner
    is_saddle = (inside == 2) & (upper_left == lower_right)
    is_turn = (inside == 1) | (inside == 3) | is_saddle
    starts, directions, ends = _segments(is_turn, is_saddle, upper_right == 0, lower_left != 0)
    # The region is on the right: turn right round a single pixel, left where three are inside; and left at a saddle,
    # where two pixels of the region meet at a corner: that keeps rings from touching themselves.
    turned = np.where(inside.ravel()[ends] == 1, directions + 1, directions + 3) % 4
    keys = starts * 4 + directions
    order = np.argsort(keys)
    following = order[np.searchsorted(keys, ends * 4 + turned, sorter=order)]
    corners = np.stack([starts % is_turn.shape[1], starts // is_turn.shape[1]], axis=1).astype(np.int32)
    rings = [corners[cycle] for cycle in _cycles(following.tolist())]
    return sorted(rings, key=ring_area, reverse=True)


def _segments(
    is_turn: NDArray[np.bool_],
    is_saddle: NDArray[np.bool_],
    is_open_above: NDArray[np.bool_],
    is_filled_left: NDArray[np.bool_],
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Directed segments between turns, region on the right: start corners, directions (0 E, 1 S, 2 W, 3 N), ends.

    Args:
        is_turn: (H+1, W+1) corners at which the border turns.
        is_saddle: corners that both end one segment and start the next on their line.
        is_open_above: whether the pixel to the upper right of a corner is outside.
        is_filled_left: whether the pixel to the lower left of a corner is inside.
    """
    height, width = is_turn.shape
    repeats = 1 + is_saddle.ravel().astype(np.intp)
    by_row = np.flatnonzero(is_turn)
    by_row = np.repeat(by_row, repeats[by_row])
    left, right = by_row[0::2], by_row[1::2]
    by_column = np.flatnonzero(is_turn.T)
    by_column = (by_column % height) * width + by_column // height
    by_column = np.repeat(by_column, repeats[by_column])
    top, bottom = by_column[0::2], by_column[1::2]
    is_east = is_open_above.ravel()[left]  # the region is below the segment
    is_south = is_filled_left.ravel()[top]  # the region is left of the segment
    starts = np.concatenate([np.where(is_east, left, right), np.where(is_south, top, bottom)])
    ends = np.concatenate([np.where(is_east, right, left), np.where(is_south, bottom, top)])
    directions = np.concatenate([np.where(is_east, 0, 2), np.where(is_south, 1, 3)])
    return starts, directions.astype(np.intp), ends


def _cycles(following: list[int]) -> list[list[int]]:
    """Split a permutation into its cycles."""
    cycles: list[list[int]] = []
    seen = bytearray(len(following))
    for first in range(len(following)):
        if seen[first]:
            continue
        cycle, current = [], first
        while not seen[current]:
            seen[current] = 1
            cycle.append(current)
            current = following[current]
        cycles.append(cycle)
    return cycles
