"""Pictures show what was counted: looked at once by eye, held here by their pixels."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

from tclkit.calib.benchmarks import Benchmark, benchmark_named
from tclkit.calib.pictures import GalleryItem, draw_confusion, draw_gallery
from tclkit.runtime.errors import InputError

CLASSES = ("background", "cat", "dog", "rare")
COUNTS = np.array([[90, 10, 0, 0], [0, 50, 50, 0], [0, 0, 0, 0], [0, 0, 0, 0], [3, 0, 0, 0]])


def cell_colours(picture: np.ndarray, count: int, cell: int) -> np.ndarray:
    """Most frequent colour of the first cells, up to 3 x 3; the matrix ends 12 pixels before both borders."""
    bottom, right = picture.shape[0] - 12, picture.shape[1] - 12
    shown = min(count, 3)
    found = np.empty((shown, shown, 3), int)
    for row in range(shown):
        for column in range(shown):
            top, left = bottom - (count - row) * cell, right - (count - column) * cell
            block = picture[top : top + cell, left : left + cell].reshape(-1, 3)
            colours, number = np.unique(block, axis=0, return_counts=True)
            found[row, column] = colours[number.argmax()]
    return found


@pytest.mark.parametrize(("count", "cell"), [(3, 34), (40, 20), (171, 13)])
def test_every_size_of_matrix(count: int, cell: int) -> None:
    counts = np.zeros((count + 1, count), np.int64)
    np.fill_diagonal(counts, 90)
    counts[0, 1] = 10
    picture = draw_confusion(counts, [f"class number {index:03}" for index in range(count)])
    assert picture.shape[1] > count * cell
    brightness = cell_colours(picture, count, cell).sum(axis=2)
    assert brightness[0, 0] < brightness[0, 1] < brightness[1, 0]
    assert (brightness.diagonal()[1:] < brightness[0, 0]).all()


def test_classes_that_do_not_occur_are_left_out() -> None:
    all_four = COUNTS.copy()
    all_four[3, 3] = 1
    assert draw_confusion(all_four, CLASSES).shape[0] == draw_confusion(COUNTS, CLASSES).shape[0] + 34


def test_nothing_counted_and_wrong_shapes() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw_confusion(np.zeros((4, 3), int), ("a", "b", "c")).ndim == 3
    with pytest.raises(InputError, match=r"the counts are \(4, 4\), but 3 classes need \(4, 3\)"):
        draw_confusion(np.zeros((4, 4), int), ("a", "b", "c"))


@pytest.fixture
def benchmark() -> Benchmark:
    return replace(benchmark_named("voc"), names=("cat", "dog"))


def item(height: int = 60, width: int = 80) -> GalleryItem:
    truth = np.zeros((height, width), np.uint8)
    truth[:, : width // 2] = 1
    truth[0] = 255
    predicted = np.full((height, width), 2)
    image = np.full((height, width, 3), 128, np.uint8)
    return GalleryItem(caption="one: mIoU 0.0 %", image_hwc=image, truth=truth, predicted=predicted)


def test_a_gallery_has_a_row_an_image(benchmark: Benchmark) -> None:
    one, three = (draw_gallery([item()] * count, benchmark) for count in (1, 3))
    assert three.shape[0] == 3 * (one.shape[0] - 24) + 24
    assert three.shape[1] == one.shape[1]
    tile = 26 + 24  # below the gap and the caption
    width = round(80 * 240 / 60)
    middle = tile + 120
    image, truth, predicted = (one[middle, 12 + number * (width + 6) + 20] for number in range(3))
    assert image.tolist() == [128, 128, 128]
    assert len({tuple(truth), tuple(predicted), tuple(image)}) == 3  # cat in orange, dog in blue
    assert one[middle, 12 + width + 6 + width - 20].tolist() == [128, 128, 128]  # the background keeps its colour


@pytest.mark.parametrize("size", [(1, 1), (500, 40), (40, 900)])
def test_a_gallery_of_odd_sizes(benchmark: Benchmark, size: tuple[int, int]) -> None:
    assert draw_gallery([item(*size), item()], benchmark).ndim == 3


def test_label_zero_that_is_reduced_has_no_colour(benchmark: Benchmark) -> None:
    reduced = replace(benchmark, background=False, reduce_zero_label=True)
    shown = item()
    picture = draw_gallery([replace(shown, predicted=np.zeros((60, 80), int))], reduced)
    assert picture[26 + 24 + 120, 12 + 320 + 6 + 300].tolist() == [128, 128, 128]


def test_an_empty_gallery(benchmark: Benchmark) -> None:
    with pytest.raises(InputError, match="one image or more"):
        draw_gallery([], benchmark)
