import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from tclkit.runtime.regions import Region, regions_from_label_map, ring_area, rings_from_mask, simplified_ring


def label_map_from_text(text: str) -> NDArray[np.int16]:
    rows = [[-1 if c == "." else int(c) for c in line] for line in text.split()]
    return np.array(rows, np.int16)


def painted(regions: list[Region], shape: tuple[int, int]) -> NDArray[np.int16]:
    """Draw polygons again: a pixel belongs to a region when its centre is inside (even-odd rule, exact by scaling)."""
    label_map = np.full(shape, -1, np.int16)
    for region in regions:
        inside = np.zeros(shape, bool)
        for ring in (region.outer, *region.holes):
            inside ^= crossings(ring, shape)
        label_map[inside] = region.index
    return label_map


def crossings(ring: NDArray[np.int32], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Whether pixel centres are inside an axis-parallel ring: parity of vertical edges to the left."""
    inside = np.zeros(shape, bool)
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        assert (x0 == x1) != (y0 == y1), "every edge is axis-parallel and not a point"
        if x0 == x1:
            inside[min(y0, y1) : max(y0, y1), x0:] ^= True
    return inside


def test_box_area_and_polygon() -> None:
    (region,) = regions_from_label_map(label_map_from_text("..... .000. .000. ....."), ["a"])
    assert (region.name, region.index, region.area_px, region.box) == ("a", 0, 6, (1, 1, 4, 3))
    assert region.outer.tolist() == [[1, 1], [4, 1], [4, 3], [1, 3]]
    assert region.outer.dtype == np.int32
    assert region.holes == ()


def test_one_pixel_and_the_whole_image() -> None:
    (region,) = regions_from_label_map(np.zeros((1, 1), np.int16), ["a"])
    assert region.outer.tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]
    (region,) = regions_from_label_map(np.zeros((30, 50), np.int16), ["a"])
    assert region.outer.tolist() == [[0, 0], [50, 0], [50, 30], [0, 30]]


def test_nothing_there() -> None:
    assert regions_from_label_map(np.full((4, 4), -1, np.int16), ["a", "b"]) == []
    assert regions_from_label_map(np.zeros((4, 4), np.int16), []) == []


def test_hole() -> None:
    (region,) = regions_from_label_map(label_map_from_text("000 0.0 000"), ["a"])
    assert region.area_px == 8
    assert [hole.tolist() for hole in region.holes] == [[[2, 1], [1, 1], [1, 2], [2, 2]]]
    assert ring_area(region.outer) == 9
    assert ring_area(region.holes[0]) == -1


def test_order_and_smallest_area() -> None:
    label_map = label_map_from_text("0.11 ..11 00.0 00.0")
    regions = regions_from_label_map(label_map, ["a", "b", "c"])
    assert [(region.name, region.area_px) for region in regions] == [("a", 4), ("a", 2), ("a", 1), ("b", 4)]
    assert [r.area_px for r in regions_from_label_map(label_map, ["a", "b"], min_area_px=2)] == [4, 2, 4]


def test_corners_do_not_connect() -> None:
    assert len(regions_from_label_map(label_map_from_text("0. .0"), ["a"])) == 2


@pytest.mark.parametrize(
    ("text", "holes"),
    [
        ("0000 0.00 00.0 0000", 2),  # holes that meet at a corner are two
        ("000 0.0 00.", 1),  # a bay that closes at a corner is a hole
        ("0000 0..0 00.0 000.", 1),
    ],
)
def test_rings_do_not_touch_themselves(text: str, holes: int) -> None:
    label_map = label_map_from_text(text)
    region = regions_from_label_map(label_map, ["a"])[0]
    assert len(region.holes) == holes
    for ring in (region.outer, *region.holes):
        assert len({tuple(corner) for corner in ring.tolist()}) == len(ring)


@pytest.mark.parametrize("seed", range(8))
def test_polygons_are_exact_on_noise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
    label_map = rng.integers(-1, 2, shape).astype(np.int16)
    if seed % 2:
        label_map = cv2.resize(label_map, None, fx=3, fy=2, interpolation=cv2.INTER_NEAREST)
    regions = regions_from_label_map(label_map, ["a", "b"])
    np.testing.assert_array_equal(painted(regions, label_map.shape), label_map)
    for region in regions:
        rings = (region.outer, *region.holes)
        assert sum(ring_area(ring) for ring in rings) == region.area_px
        assert ring_area(region.outer) > 0
        assert all(ring_area(hole) < 0 for hole in region.holes)
        assert (*region.outer.min(axis=0), *region.outer.max(axis=0)) == region.box
        for ring in rings:
            assert len({tuple(corner) for corner in ring.tolist()}) == len(ring)


def test_simplifying_saves_points_and_keeps_the_shape() -> None:
    y, x = np.mgrid[:200, :200]
    disc = (x - 100) ** 2 + (y - 100) ** 2 < 80**2
    (exact,) = rings_from_mask(disc)
    simple = simplified_ring(exact, 1.0)
    assert len(simple) < len(exact) / 4
    assert ring_area(simple) == pytest.approx(ring_area(exact), rel=0.02)
    label_map = np.where(disc, 0, -1).astype(np.int16)
    (region,) = regions_from_label_map(label_map, ["a"], simplify_px=1.0)
    np.testing.assert_array_equal(region.outer, simple)
    assert region.area_px == disc.sum()


def test_simplifying_never_leaves_less_than_a_triangle() -> None:
    (ring,) = rings_from_mask(np.ones((1, 1), bool))
    np.testing.assert_array_equal(simplified_ring(ring, 50), ring)
