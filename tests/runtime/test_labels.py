import numpy as np
import pytest

from tclkit.runtime.errors import InputError
from tclkit.runtime.labels import labels_from_masks, without_contrast
from tclkit.runtime.upsample import resize_masks

MASKS = np.random.default_rng(0).random((4, 9, 13), np.float32)


@pytest.mark.parametrize("size", [(9, 13), (40, 31), (5, 4), (1, 1), (3000, 40)])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.6, 1.0])
def test_labels_are_the_argmax_with_a_background_channel(size: tuple[int, int], threshold: float | None) -> None:
    labels = labels_from_masks(MASKS, size, threshold)
    resized = resize_masks(MASKS, size)
    if threshold is None:
        expected = resized.argmax(axis=0)
    else:
        background = np.full((1, *size), threshold, np.float32)
        expected = np.concatenate([background, resized]).argmax(axis=0) - 1
    assert labels.label_map.dtype == np.int16
    differs = labels.label_map != expected  # only where two masks are equal but for rounding
    second, first = np.sort(resized, axis=0)[-2:]
    assert (np.minimum(first - second, abs(first - (threshold or 0)))[differs] < 1e-6).all()
    for index in range(4):
        is_label = labels.label_map == index
        assert labels.pixels[index] == is_label.sum()
        assert labels.scores[index] == pytest.approx(resized[index][is_label].mean() if is_label.any() else 0, abs=1e-6)


def test_background_wins_ties_and_of_equal_prompts_the_first() -> None:
    masks = np.full((2, 1, 1), 0.5, np.float32)
    assert labels_from_masks(masks, (2, 2), 0.5).label_map.tolist() == [[-1, -1], [-1, -1]]
    assert labels_from_masks(masks, (1, 1), 0.4).label_map.tolist() == [[0]]
    assert labels_from_masks(np.zeros((2, 1, 1), np.float32), (1, 1), None).label_map.tolist() == [[0]]


def test_no_masks() -> None:
    with pytest.raises(InputError, match="there are 0 masks; a label map can hold 1 to 32767"):
        labels_from_masks(MASKS[:0], (4, 4), 0.5)


def test_contrast_prompts_give_their_pixels_to_the_background() -> None:
    labels = labels_from_masks(MASKS, (9, 13), 0.6)
    cut = without_contrast(labels, 3)
    np.testing.assert_array_equal(cut.label_map, np.where(labels.label_map == 3, -1, labels.label_map))
    assert cut.label_map.dtype == np.int16
    np.testing.assert_array_equal(cut.pixels, labels.pixels[:3])
    np.testing.assert_array_equal(cut.scores, labels.scores[:3])
