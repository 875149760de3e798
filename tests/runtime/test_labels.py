import numpy as np
import pytest
from numpy.typing import NDArray

from tclkit.runtime.errors import InputError
from tclkit.runtime.fitted_masks import FittedMasks
from tclkit.runtime.labels import count_labels, labels_from_masks, scores_from_labels, without_contrast
from tclkit.runtime.upsample import resize_masks, resized_strips

MASKS = np.random.default_rng(0).random((4, 9, 13), np.float32)


@pytest.mark.parametrize("size", [(9, 13), (40, 31), (5, 4), (1, 1), (3000, 40)])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.6, 1.0])
def test_labels_are_the_argmax_with_a_background_channel(size: tuple[int, int], threshold: float | None) -> None:
    label_map = labels_from_masks(MASKS, size, threshold)
    resized = resize_masks(MASKS, size)
    if threshold is None:
        expected = resized.argmax(axis=0)
    else:
        background = np.full((1, *size), threshold, np.float32)
        expected = np.concatenate([background, resized]).argmax(axis=0) - 1
    assert label_map.dtype == np.int16
    differs = label_map != expected  # only where two masks are equal but for rounding
    second, first = np.sort(resized, axis=0)[-2:]
    assert (np.minimum(first - second, abs(first - (threshold or 0)))[differs] < 1e-6).all()
    pixels, scores = count_labels(label_map, 4), scores_from_labels(FittedMasks.from_array(MASKS), label_map)
    assert pixels[0] == (label_map == -1).sum()
    for index in range(4):
        is_label = label_map == index
        assert pixels[1 + index] == is_label.sum()
        assert scores[index] == pytest.approx(resized[index][is_label].mean() if is_label.any() else 0, abs=1e-6)


def labels_of_all(masks: NDArray[np.float32], size: tuple[int, int], threshold: float | None) -> NDArray[np.int16]:
    """Labels from every mask at full size, with the arithmetic of `resized_strips`: nothing is left out."""
    resized = np.empty((len(masks), *size), np.float32)
    for rows, strip in resized_strips(masks, size):
        resized[:, rows] = strip
    label_map, best = (
        np.full(size, -1, np.int16),
        np.full(size, -np.inf if threshold is None else threshold, np.float32),
    )
    for index, mask in enumerate(resized):
        label_map[mask > best] = index
        best = np.maximum(best, mask)
    return label_map


def blobs(count: int, height: int, width: int, seed: int) -> NDArray[np.float32]:
    """Smooth masks, some of them high somewhere, some nowhere, with plateaus at which they are equal."""
    noise = np.random.default_rng(seed).random((count, 4, 5), np.float32)
    return np.clip(np.round(resize_masks(noise, (height, width)) * 1.3, 2), 0, 1).astype(np.float32)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize(
    ("cell", "rows", "columns"),
    [
        ((4, 4), slice(0, 112), slice(0, 112)),
        ((4, 4), slice(25, 87), slice(0, 112)),  # padding above and below, which begins within a cell
        ((4, 4), slice(0, 112), slice(31, 82)),
        ((2, 8), slice(11, 44), slice(3, 201)),
        ((1, 1), slice(0, 28), slice(0, 28)),
    ],
)
@pytest.mark.parametrize("size", [(180, 320), (333, 77), (40, 21), (1, 1), (62, 112)])
def test_prompts_that_are_left_out_change_no_pixel(
    cell: tuple[int, int], rows: slice, columns: slice, size: tuple[int, int], count: int, threshold: float | None
) -> None:
    grid = blobs(count, 28, 28, seed=count)
    masks = FittedMasks(grid=grid, cell=cell, rows=rows, columns=columns)
    whole = resize_masks(grid, (28 * cell[0], 28 * cell[1]))[:, rows, columns]
    np.testing.assert_array_equal(
        labels_from_masks(masks, size, threshold), labels_of_all(np.ascontiguousarray(whole), size, threshold)
    )


def test_only_prompts_that_may_win_are_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = np.full((150, 28, 28), 0.1, np.float32)
    grid[7, :14], grid[9, 14:] = 0.9, 0.8
    asked = []
    band = FittedMasks.band

    def noting(self: FittedMasks, index: int, rows: slice) -> NDArray[np.float32]:
        asked.append(index)
        return band(self, index, rows)

    monkeypatch.setattr(FittedMasks, "band", noting)
    masks = FittedMasks(grid=grid, cell=(4, 4), rows=slice(0, 112), columns=slice(0, 112))
    assert set(np.unique(labels_from_masks(masks, (720, 1280), 0.5))) == {-1, 7, 9}  # between the two: background
    assert set(asked) == {7, 9}


def test_background_wins_ties_and_of_equal_prompts_the_first() -> None:
    masks = np.full((2, 1, 1), 0.5, np.float32)
    assert labels_from_masks(masks, (2, 2), 0.5).tolist() == [[-1, -1], [-1, -1]]
    assert labels_from_masks(masks, (1, 1), 0.4).tolist() == [[0]]
    assert labels_from_masks(np.zeros((2, 1, 1), np.float32), (1, 1), None).tolist() == [[0]]


def test_no_masks() -> None:
    with pytest.raises(InputError, match="there are 0 masks; a label map can hold 1 to 32767"):
        labels_from_masks(MASKS[:0], (4, 4), 0.5)


def test_contrast_prompts_give_their_pixels_to_the_background() -> None:
    label_map = labels_from_masks(MASKS, (9, 13), 0.6)
    cut = without_contrast(label_map, 3)
    np.testing.assert_array_equal(cut, np.where(label_map == 3, -1, label_map))
    assert cut.dtype == np.int16


def test_large_label_maps_are_counted_in_pieces() -> None:
    label_map = np.zeros((1500, 1000), np.int16)
    label_map[700:] = -1
    assert count_labels(label_map, 2).tolist() == [800_000, 700_000, 0]
