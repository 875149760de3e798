"""PAMR against the authors'."""

import pytest
import torch

from tclkit.tcl.pamr import local_std, neighbour_weights, refine_many_masks, refine_masks


@pytest.fixture
def data(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays("pamr.npz").items()}


def test_refined_masks_are_the_authors(data, check):
    image, mask = data["image"], data["mask"]
    check("PAMR", refine_masks(image, mask), data["out_iter10_d1_2_4_8_12_24"])
    check("PAMR", refine_masks(image, mask, iterations=1, dilations=(1, 2)), data["out_iter1_d1_2"])
    check("PAMR", refine_masks(image, data["lowres_mask"]), data["out_lowres"])
    check("PAMR", refine_masks(data["const_image"].expand_as(image), mask), data["out_const"])
    check("PAMR", refine_many_masks(image[0], mask[0])[None], data["out_iter10_d1_2_4_8_12_24"])


def test_weights_are_the_authors(data, check):
    check("PAMR standard deviation", local_std(data["image"]), data["std_1x3x1xHxW"][:, :, 0])
    weights = neighbour_weights(data["image"])[0]
    check("PAMR weights", weights[:, 20, 28], data["weights_sample_center"])
    check("PAMR weights", weights[:, 0, 0], data["weights_corner"])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 3)])
def test_images_smaller_than_the_dilations(size):
    image, mask = torch.randn(2, 3, *size), torch.rand(2, 4, *size)
    refined = refine_masks(image, mask)
    assert refined.shape == mask.shape
    assert refined.min() >= 0
    assert refined.max() <= 1 + 1e-6
    for one, masks, expected in zip(image, mask, refined, strict=True):
        torch.testing.assert_close(refine_many_masks(one, masks), expected, atol=1e-5, rtol=0)
