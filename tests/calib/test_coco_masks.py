from types import ModuleType

import cv2
import numpy as np
import pytest

from tclkit.calib.coco_masks import mask_from_polygon, mask_from_segmentation, runs_from_text
from tclkit.runtime.errors import InputError


@pytest.mark.parametrize("seed", range(4))
def test_both_forms_of_run_lengths(mini: ModuleType, seed: int) -> None:
    mask = cv2.resize(np.random.default_rng(seed).random((5, 7)), (70, 50)) > 0.5
    for counts in (mini.run_lengths(mask), mini.run_text(mask)):
        found = mask_from_segmentation({"size": [50, 70], "counts": counts}, (50, 70))
        np.testing.assert_array_equal(found, mask)


@pytest.mark.parametrize("value", [False, True])
def test_a_mask_of_one_value(mini: ModuleType, value: bool) -> None:
    mask = np.full((3, 4), value)
    found = mask_from_segmentation({"size": [3, 4], "counts": mini.run_text(mask)}, (3, 4))
    np.testing.assert_array_equal(found, mask)


def test_run_lengths_from_cocos_text() -> None:
    """A text of COCO's own documentation: 6 1 40 4 5 4 5 4 21."""
    assert runs_from_text("61X13mN000`0") == [6, 1, 40, 4, 5, 4, 5, 4, 21]


def test_a_pixel_counts_when_its_centre_is_inside() -> None:
    square = mask_from_polygon([1.4, 1.6, 3.6, 1.6, 3.6, 3.4, 1.4, 3.4], (5, 6))
    expected = np.zeros((5, 6), bool)
    expected[2:3, 1:4] = True
    np.testing.assert_array_equal(square, expected)


def test_a_polygon_equals_a_point_in_polygon_test() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        points = rng.uniform(-5, 45, (7, 2)).astype(np.float32)  # crosses itself and the border
        found = mask_from_polygon(points.ravel().tolist(), (30, 40))
        inside = np.array(
            [[cv2.pointPolygonTest(points, (x + 0.5, y + 0.5), False) > 0 for x in range(40)] for y in range(30)]
        )
        assert (found == inside).mean() > 0.99  # OpenCV counts some crossings of self-intersections otherwise


def test_holes_and_pieces() -> None:
    pieces = mask_from_segmentation([[0, 0, 2, 0, 2, 2, 0, 2], [3, 3, 5, 3, 5, 5, 3, 5]], (5, 5))
    assert pieces.sum() == 8
    assert not mask_from_segmentation([], (5, 5)).any()
    assert not mask_from_polygon([1, 1, 2, 2], (5, 5)).any()


@pytest.mark.parametrize(
    ("segmentation", "text"),
    [
        ({"size": [2, 2], "counts": [5]}, "cover 5 pixels, the image has 4"),
        ({"size": [3, 2], "counts": [6]}, r"run lengths are for \[3, 2\], the image is \[2, 2\]"),
        ({"size": [2, 2], "counts": "~"}, "hold the character '~'"),
        ({"size": [2, 2], "counts": "X"}, "break off"),
        ("text", "polygons or run lengths, found str"),
    ],
)
def test_what_is_neither(segmentation: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        mask_from_segmentation(segmentation, (2, 2))
