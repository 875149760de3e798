import cv2
import numpy as np
import pytest

from tclkit.runtime.upsample import resize_masks, resized_strips

SIZES = [(37, 53), (200, 311), (20, 30), (1, 1), (5000, 70), (18, 26), (74, 9000)]


@pytest.mark.parametrize("size", SIZES)
def test_strips_equal_the_whole(size: tuple[int, int]) -> None:
    masks = np.random.default_rng(0).random((2, 37, 53), np.float32)
    whole = resize_masks(masks, size)
    assert whole.shape == (2, *size)
    assert whole.dtype == np.float32
    strips = list(resized_strips(masks, size))
    assert [rows.start for rows, _ in strips] == [0, *(rows.stop for rows, _ in strips[:-1])]
    np.testing.assert_allclose(np.concatenate([strip for _, strip in strips], axis=1), whole, atol=1e-6)


def test_resize_is_opencvs() -> None:
    masks = np.random.default_rng(0).random((2, 7, 9), np.float32)
    np.testing.assert_array_equal(resize_masks(masks, (20, 31))[1], cv2.resize(masks[1], (31, 20)))


def test_same_size_is_not_copied_but_strips_are() -> None:
    masks = np.random.default_rng(0).random((2, 7, 9), np.float32)
    assert resize_masks(masks, (7, 9)) is masks
    ((_, strip),) = resized_strips(masks, (7, 9))
    assert not np.shares_memory(strip, masks)


def test_no_masks_and_one_pixel() -> None:
    assert resize_masks(np.zeros((0, 4, 4), np.float32), (8, 8)).shape == (0, 8, 8)
    np.testing.assert_array_equal(resize_masks(np.full((1, 1, 1), 0.5, np.float32), (3, 2)), np.full((1, 3, 2), 0.5))


def test_strips_are_small_for_large_images() -> None:
    masks = np.zeros((3, 8, 8), np.float32)
    assert max(strip.nbytes for _, strip in resized_strips(masks, (3000, 4000))) <= 1 << 20
