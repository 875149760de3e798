"""PAMR: pixel-adaptive mask refinement, which pulls soft masks towards the image's edges. No learned part.

Shapes: B batch, N prompts, C colours, H W pixels, K neighbours.
Source: Araslanov & Roth, CVPR 2020; the settings are those of TCL.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DILATIONS = (1, 2, 4, 8, 12, 24)
ITERATIONS = 10
_OFFSETS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
_EPSILON = 1e-8
_STD_FACTOR = 0.1


def refine_masks(
    images_BCHW: Tensor, masks_BNHW: Tensor, *, iterations: int = ITERATIONS, dilations: Sequence[int] = DILATIONS
) -> Tensor:
    """Replace every mask value by the mean of its neighbours, weighted by likeness of colour, several times.

    Args:
        images_BCHW: (B, C, H, W) float, normalised.
        masks_BNHW: (B, N, h, w) soft masks in 0..1; resized to the image first when they are smaller.
        iterations: how often.
        dilations: distances in pixels at which the eight neighbours are taken.

    Returns:
        (B, N, H, W) soft masks.
    """
    masks_BNHW = F.interpolate(masks_BNHW, size=images_BCHW.shape[-2:], mode="bilinear", align_corners=True)
    weights_BKHW = neighbour_weights(images_BCHW, dilations)
    for _ in range(iterations):
        masks_BNHW = _weighted_neighbours(masks_BNHW, weights_BKHW, dilations)
    return masks_BNHW


def refine_many_masks(
    image_CHW: Tensor, masks_NHW: Tensor, *, iterations: int = ITERATIONS, dilations: Sequence[int] = DILATIONS
) -> Tensor:
    """The same for many masks of one image at its own size, as products with one sparse matrix: three times faster.

    Args:
        image_CHW: (C, H, W) float, normalised.
        masks_NHW: (N, H, W) soft masks in 0..1.
        iterations, dilations: as in `refine_masks`, whose values these are to within rounding.
    """
    count, height, width = masks_NHW.shape
    weights_KHW = neighbour_weights(image_CHW[None], dilations)[0]
    places_HW = torch.arange(height * width).view(1, 1, height, width).float()  # exact in float32 below 2**24 pixels
    columns = torch.cat(_neighbours(places_HW, dilations, centre=False), dim=1)[0].flatten(1).long()  # (K, HW)
    rows = torch.arange(height * width).expand_as(columns)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        matrix = torch.sparse_coo_tensor(
            torch.stack([rows.flatten(), columns.flatten()]),
            weights_KHW.flatten(),
            (height * width, height * width),
            check_invariants=True,
        )
        matrix = matrix.coalesce().to_sparse_csr()  # beyond the border one pixel is several neighbours at once
    masks_PN = masks_NHW.flatten(1).T.contiguous()
    for _ in range(iterations):
        masks_PN = matrix @ masks_PN
    return masks_PN.T.reshape(count, height, width)


def neighbour_weights(images_BCHW: Tensor, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Weights of every pixel's neighbours, (B, K, H, W), summing to 1 over K = 8 · len(dilations), dilation first."""
    std_BCHW = local_std(images_BCHW, dilations)
    scale_BCHW = _EPSILON + _STD_FACTOR * std_BCHW
    likeness = [
        -(images_BCHW - near_BCHW).abs().div(scale_BCHW).mean(dim=1)
        for near_BCHW in _neighbours(images_BCHW, dilations, centre=False)
    ]
    return torch.softmax(torch.stack(likeness, dim=1), dim=1)


def local_std(images_BCHW: Tensor, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Unbiased standard deviation over nine samples a dilation (the pixel itself counts every time), (B, C, H, W)."""
    return torch.stack(_neighbours(images_BCHW, dilations, centre=True)).std(dim=0)


def _neighbours(x_BCHW: Tensor, dilations: Sequence[int], *, centre: bool) -> list[Tensor]:
    """The map shifted to every neighbour's place; beyond the border the nearest pixel repeats."""
    height, width = x_BCHW.shape[-2:]
    shifted = []
    for dilation in dilations:
        padded = F.pad(x_BCHW, (dilation,) * 4, mode="replicate")
        for dy, dx in _OFFSETS:
            if centre or (dy, dx) != (0, 0):
                top, left = dilation * (1 + dy), dilation * (1 + dx)
                shifted.append(padded[..., top : top + height, left : left + width])
    return shifted


def _weighted_neighbours(masks_BNHW: Tensor, weights_BKHW: Tensor, dilations: Sequence[int]) -> Tensor:
    total = torch.zeros_like(masks_BNHW)
    for k, near_BNHW in enumerate(_neighbours(masks_BNHW, dilations, centre=False)):
        total += weights_BKHW[:, k : k + 1] * near_BNHW
    return total
