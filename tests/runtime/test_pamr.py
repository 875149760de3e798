from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tclkit.runtime.errors import InputError
from tclkit.runtime.pamr import affinities, highest_refined, local_std, refine_masks, resize_with_corners

TOLERANCE = 1e-5  # measured: 1.9e-6
Arrays = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def reference(golden: Path) -> Arrays:
    with np.load(golden / "pamr.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def image(reference: Arrays) -> NDArray[np.float32]:
    return reference["image"][0].transpose(1, 2, 0)


def test_ten_iterations(reference: Arrays, image: NDArray[np.float32]) -> None:
    refined = refine_masks(image, reference["mask"][0])
    assert refined.dtype == np.float32
    np.testing.assert_allclose(refined, reference["out_iter10_d1_2_4_8_12_24"][0], rtol=0, atol=TOLERANCE)


def test_one_iteration_of_two_dilations(reference: Arrays, image: NDArray[np.float32]) -> None:
    refined = refine_masks(image, reference["mask"][0], iterations=1, dilations=(1, 2))
    np.testing.assert_allclose(refined, reference["out_iter1_d1_2"][0], rtol=0, atol=TOLERANCE)


def test_masks_of_another_size(reference: Arrays, image: NDArray[np.float32]) -> None:
    refined = refine_masks(image, reference["lowres_mask"][0])
    np.testing.assert_allclose(refined, reference["out_lowres"][0], rtol=0, atol=TOLERANCE)


def test_constant_image(reference: Arrays, image: NDArray[np.float32]) -> None:
    constant = np.broadcast_to(reference["const_image"][0].transpose(1, 2, 0), image.shape)
    np.testing.assert_allclose(
        refine_masks(constant, reference["mask"][0]), reference["out_const"][0], rtol=0, atol=TOLERANCE
    )


def test_standard_deviation_and_weights(reference: Arrays, image: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(local_std(image), reference["std_1x3x1xHxW"][0, :, 0], rtol=0, atol=1e-6)
    weights = affinities(image)
    np.testing.assert_allclose(weights[:, 20, 28], reference["weights_sample_center"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(weights[:, 0, 0], reference["weights_corner"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=0, atol=1e-5)


def test_scale_and_offset_of_the_image_do_not_matter(reference: Arrays, image: NDArray[np.float32]) -> None:
    """So bytes may go in where the reference takes normalised images."""
    masks = reference["mask"][0]
    scaled = image * np.array([58.395, 57.12, 57.375], np.float32) + np.array([123.675, 116.28, 103.53], np.float32)
    np.testing.assert_allclose(refine_masks(scaled, masks), refine_masks(image, masks), rtol=0, atol=TOLERANCE)


def test_each_mask_is_refined_on_its_own(reference: Arrays, image: NDArray[np.float32]) -> None:
    masks = reference["mask"][0]
    before = masks.copy()
    np.testing.assert_array_equal(refine_masks(image, masks)[2:3], refine_masks(image, masks[2:3]))
    np.testing.assert_array_equal(masks, before)


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 50, 1)])
def test_small_images(shape: tuple[int, int, int]) -> None:
    masks = np.full((2, *shape[:2]), 0.25, np.float32)
    np.testing.assert_allclose(refine_masks(np.ones(shape, np.float32), masks), masks, atol=1e-6)
    assert refine_masks(np.ones(shape, np.float32), masks[:0]).shape == (0, *shape[:2])


def test_wrong_arguments() -> None:
    plane = np.zeros((4, 4), np.float32)
    with pytest.raises(InputError, match=r"image \(H, W, C\) and masks \(N, h, w\), got \(4, 4\)"):
        refine_masks(plane, plane[None])
    with pytest.raises(InputError, match="one or more dilations of at least 1 pixel"):
        refine_masks(plane[..., None], plane[None], dilations=())


def test_resize_keeps_the_corners() -> None:
    resized = resize_with_corners(np.array([[[0, 1], [2, 3]]], np.float32), (3, 5))
    np.testing.assert_allclose(resized[0], [[0, 0.25, 0.5, 0.75, 1], [1, 1.25, 1.5, 1.75, 2], [2, 2.25, 2.5, 2.75, 3]])
    np.testing.assert_array_equal(resize_with_corners(resized, (1, 1)), [[[0]]])


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_any_number_of_masks(image: NDArray[np.float32], count: int) -> None:
    """Masks are taken a few at a time; the last few may be fewer."""
    masks = np.random.default_rng(0).random((count, *image.shape[:2]), np.float32)
    together = refine_masks(image, masks)
    for index in range(count):
        np.testing.assert_array_equal(together[index : index + 1], refine_masks(image, masks[index : index + 1]))


def test_no_refined_value_passes_the_bound(image: NDArray[np.float32]) -> None:
    masks = np.random.default_rng(1).random((6, *image.shape[:2]), np.float32) ** 4
    bound = highest_refined(masks)
    np.testing.assert_array_equal(bound, masks.max(axis=(1, 2)))
    for iterations in (1, 10):
        refined = refine_masks(image, masks, iterations=iterations)
        assert (refined.max(axis=(1, 2)) <= bound + 1e-6).all()


def test_no_iterations_give_the_masks(image: NDArray[np.float32], reference: Arrays) -> None:
    masks = reference["mask"][0]
    np.testing.assert_array_equal(refine_masks(image, masks, iterations=0), masks)
