"""What TCL's losses need of every pair of image and text, without the pairs' masks ever being in memory together.

The feature-level, area and total variation losses look at a mask for each pair: B·N maps. All they take from a map is
three numbers, so the maps are made a tile of texts at a time, reduced, and dropped; the backward pass makes them again.
Memory then grows with B and the tile, not with B·N·h·w. The price is two of the seven large matrix products.

Shapes: B batch of images, N texts, n texts of one tile, b images of one group, K texts that a mask's pool is compared
with, D embedding, h w mask grid, P = h·w its cells.
Source: the losses are TCL's (Cha et al., CVPR 2023, section 3.3); the tiles are ours.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tclkit.runtime.errors import InputError

from .losses import AREA_EPSILON, NORM_EPSILON, POOL_EPSILON

# Cells that are worked on at once. A CPU wants them in its cache; a GPU wants enough to be busy.
_CELLS_AT_ONCE_CPU, _CELLS_AT_ONCE_GPU = 1 << 18, 1 << 25


@dataclass(frozen=True, slots=True)
class PairStatistics:
    """What the losses take from the masks of all pairs.

    similarity_KBN: (K, B, N) cosine of what mask (b, n) pools from image b with text (k, n) of those to compare with.
    area_BN: (B, N) mean of mask (b, n).
    variation_BN: (B, N) mean absolute difference of its horizontal neighbours plus that of its vertical ones.
    own_logits_Bhw: (B, h, w) the masks of image b and its own text, before the sigmoid.
    """

    similarity_KBN: Tensor  # noqa: N815
    area_BN: Tensor  # noqa: N815
    variation_BN: Tensor  # noqa: N815
    own_logits_Bhw: Tensor  # noqa: N815


def pair_statistics(
    embedding_BDhw: Tensor,
    text_ND: Tensor,
    compared_KND: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    tile: int,
    first_own: int = 0,
) -> PairStatistics:
    """Reduce the masks of every pair, `tile` texts at a time; gradients reach the embedding, scale and shift.

    Under autocast the matrix products run in its precision, everything between them in float32.

    Args:
        embedding_BDhw: (B, D, h, w) by the grounder, not normalised.
        text_ND: (N, D) of length 1, which make the masks. Texts learn nothing.
        compared_KND: (K, N, D) of length 1, which the pooled embeddings are compared with; usually text_ND alone.
        scale, shift: scalars, the line from a cosine to a mask's logit.
        tile: texts at a time, 1 or more; it need not divide N.
        first_own: the index of image 0's own text; image i has text first_own + i.

    Raises:
        InputError: shapes or the tile do not fit, or a text asks for a gradient.
    """
    _require_fitting(embedding_BDhw, text_ND, compared_KND, tile, first_own)
    kind = embedding_BDhw.device.type
    autocast = torch.is_autocast_enabled(kind)
    product_dtype = torch.get_autocast_dtype(kind) if autocast else embedding_BDhw.dtype
    similarity_KBN, area_BN, variation_BN, own_BP = _PairStatistics.apply(
        embedding_BDhw, scale, shift, text_ND, compared_KND, first_own, tile, product_dtype
    )
    grid = (embedding_BDhw.shape[2], embedding_BDhw.shape[3])
    return PairStatistics(similarity_KBN, area_BN, variation_BN, _as_maps(own_BP, grid))


def _require_fitting(embedding_BDhw: Tensor, text_ND: Tensor, compared_KND: Tensor, tile: int, first_own: int) -> None:
    if tile < 1:
        raise InputError(f"tile must be 1 or more texts, not {tile!r}.", tile=tile)
    count, width = embedding_BDhw.shape[:2]
    texts = len(text_ND)
    if text_ND.shape != (texts, width) or compared_KND.shape[1:] != text_ND.shape:
        raise InputError(
            f"for embeddings of width {width} texts must be (N, {width}) and those to compare with (K, N, {width}), "
            f"not {tuple(text_ND.shape)} and {tuple(compared_KND.shape)}."
        )
    if not 0 <= first_own <= texts - count:
        raise InputError(f"the own texts of {count} images cannot begin at {first_own} of {texts} texts.")
    if torch.is_grad_enabled() and (text_ND.requires_grad or compared_KND.requires_grad):
        raise InputError("texts are not learned here: detach them, or use the direct form of the losses.")


class _Work:
    """The tensors of one call in the types they are worked on, and the masks of one group and tile."""

    def __init__(self, embedding_BDhw: Tensor, scale: Tensor, shift: Tensor, product_dtype: torch.dtype) -> None:
        self.grid = (embedding_BDhw.shape[2], embedding_BDhw.shape[3])
        self.embedding_BDP = embedding_BDhw.flatten(2)
        self.dtype = torch.promote_types(embedding_BDhw.dtype, torch.float32)
        self.product_dtype = product_dtype
        self.scale, self.shift = scale.to(self.dtype), shift.to(self.dtype)

    def groups(self, tile: int) -> list[slice]:
        """Images taken together."""
        count, _, cells = self.embedding_BDP.shape
        at_once = _CELLS_AT_ONCE_CPU if self.embedding_BDP.device.type == "cpu" else _CELLS_AT_ONCE_GPU
        size = max(1, at_once // (tile * cells))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Matrix product in the chosen precision."""
        product: Tensor = a.to(self.product_dtype) @ b.to(self.product_dtype)
        return product.to(self.dtype)

    def inverse_norm(self, embedding_bDP: Tensor) -> Tensor:
        """What brings every cell's embedding to length 1, (b, 1, P)."""
        norm_b1P = torch.linalg.vector_norm(embedding_bDP, dim=1, keepdim=True, dtype=self.dtype)
        inverse_b1P: Tensor = norm_b1P.clamp_(min=NORM_EPSILON).reciprocal_()
        return inverse_b1P

    def pool(self, masks_bnP: Tensor, embedding_bDP: Tensor) -> tuple[Tensor, Tensor]:
        """Mean embedding under every mask, (b, n, D), and the masks' sums, (b, n, 1)."""
        sums_bn1 = masks_bnP.sum(dim=2, keepdim=True)
        pooled_bnD = self.product(masks_bnP, embedding_bDP.mT) / (sums_bn1 + AREA_EPSILON)
        return pooled_bnD, sums_bn1


class _PairStatistics(torch.autograd.Function):
    """See `pair_statistics`; the maps are (B, P) here."""

    @staticmethod
    def forward(
        ctx: Any,
        embedding_BDhw: Tensor,
        scale: Tensor,
        shift: Tensor,
        text_ND: Tensor,
        compared_KND: Tensor,
        first_own: int,
        tile: int,
        product_dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(embedding_BDhw, scale, shift, text_ND, compared_KND)
        ctx.first_own, ctx.tile, ctx.product_dtype = first_own, tile, product_dtype
        with torch.autocast(embedding_BDhw.device.type, enabled=False):
            return _reduce(_Work(embedding_BDhw, scale, shift, product_dtype), text_ND, compared_KND, first_own, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        embedding_BDhw, scale, shift, text_ND, compared_KND = ctx.saved_tensors
        with torch.autocast(embedding_BDhw.device.type, enabled=False):
            work = _Work(embedding_BDhw, scale, shift, ctx.product_dtype)
            grad_BDhw, grad_scale, grad_shift = _backward(
                work, text_ND, compared_KND, ctx.first_own, ctx.tile, [grad.to(work.dtype) for grad in grads]
            )
        return (grad_BDhw, grad_scale.to(scale.dtype), grad_shift.to(shift.dtype), *[None] * 5)


def _reduce(work: _Work, text_ND: Tensor, compared_KND: Tensor, first_own: int, tile: int) -> tuple[Tensor, ...]:
    count, _, cells = work.embedding_BDP.shape
    like = work.embedding_BDP.new_empty(0, dtype=work.dtype)
    similarity_KBN = like.new_empty(len(compared_KND), count, len(text_ND))
    area_BN, variation_BN = like.new_empty(similarity_KBN.shape[1:]), like.new_empty(similarity_KBN.shape[1:])
    own_BP = like.new_empty(count, cells)
    for images in work.groups(tile):
        embedding_bDP = work.embedding_BDP[images]
        inverse_b1P = work.inverse_norm(embedding_bDP)
        for start in range(0, len(text_ND), tile):
            texts = slice(start, start + tile)
            logits_bnP = work.product(text_ND[texts], embedding_bDP)
            logits_bnP.mul_(inverse_b1P * work.scale).add_(work.shift)
            for image, text in _own_pairs(images, texts, first_own, len(own_BP)):
                own_BP[image] = logits_bnP[image - images.start, text - start]
            masks_bnP = logits_bnP.sigmoid_()
            pooled_bnD, sums_bn1 = work.pool(masks_bnP, embedding_bDP)
            length_bn = torch.linalg.vector_norm(pooled_bnD, dim=2).clamp_(min=POOL_EPSILON)
            for k, compared_ND in enumerate(compared_KND):
                similarity_KBN[k, images, texts] = (pooled_bnD * compared_ND[texts]).sum(dim=2) / length_bn
            area_BN[images, texts] = sums_bn1.squeeze(2) / cells
            variation_BN[images, texts] = _variation(_as_maps(masks_bnP, work.grid))
    return similarity_KBN, area_BN, variation_BN, own_BP


def _backward(
    work: _Work, text_ND: Tensor, compared_KND: Tensor, first_own: int, tile: int, grads: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_similarity_KBN, grad_area_BN, grad_variation_BN, grad_own_BP = grads
    grad_BDP = torch.empty_like(work.embedding_BDP)
    grad_scale, grad_shift = torch.zeros_like(work.scale), torch.zeros_like(work.shift)
    cells = work.embedding_BDP.shape[2]
    for images in work.groups(tile):
        embedding_bDP = work.embedding_BDP[images]
        inverse_b1P = work.inverse_norm(embedding_bDP)
        grad_bDP = torch.zeros_like(embedding_bDP, dtype=work.dtype)
        along_b1P = torch.zeros_like(inverse_b1P)  # of the logits along the dot products, summed over the texts
        for start in range(0, len(text_ND), tile):
            texts = slice(start, start + tile)
            text_nD = text_ND[texts]
            dots_bnP = work.product(text_nD, embedding_bDP)
            masks_bnP = torch.sigmoid(torch.addcmul(work.shift, dots_bnP, inverse_b1P * work.scale))
            pooled_bnD, sums_bn1 = work.pool(masks_bnP, embedding_bDP)
            grad_pooled_bnD = _pooled_gradient(
                pooled_bnD, compared_KND[:, texts], grad_similarity_KBN[:, images, texts]
            )
            grad_total_bnD = grad_pooled_bnD / (sums_bn1 + AREA_EPSILON)
            even_bn1 = grad_area_BN[images, texts].unsqueeze(2) / cells
            even_bn1 = even_bn1 - (grad_total_bnD * pooled_bnD).sum(dim=2, keepdim=True)
            grad_bnP = work.product(grad_total_bnD, embedding_bDP).add_(even_bn1)
            _add_variation_gradient(
                _as_maps(grad_bnP, work.grid), _as_maps(masks_bnP, work.grid), grad_variation_BN[images, texts]
            )
            grad_bnP.mul_(masks_bnP).mul_(1 - masks_bnP)  # now of the logits
            for image, text in _own_pairs(images, texts, first_own, len(grad_own_BP)):
                grad_bnP[image - images.start, text - start] += grad_own_BP[image]
            grad_shift += grad_bnP.sum()
            along_b1P += dots_bnP.mul_(grad_bnP).sum(dim=1, keepdim=True)
            grad_bnP.mul_(inverse_b1P * work.scale)  # now of the dot products
            _add_product(work, grad_bDP, grad_total_bnD.mT, masks_bnP)
            _add_product(work, grad_bDP, text_nD.mT.expand(len(grad_bDP), -1, -1), grad_bnP)
        grad_scale += (along_b1P * inverse_b1P).sum()
        # Of 1/length; a length that was raised to the smallest allowed has no gradient.
        pull_b1P = (along_b1P * work.scale * inverse_b1P**3).masked_fill_(inverse_b1P >= 1 / NORM_EPSILON, 0)
        grad_BDP[images] = grad_bDP.addcmul_(embedding_bDP.to(work.dtype), pull_b1P, value=-1)
    return _as_maps(grad_BDP, work.grid), grad_scale, grad_shift


def _add_product(work: _Work, total_bDP: Tensor, a_bDn: Tensor, b_bnP: Tensor) -> None:
    if work.product_dtype == work.dtype:
        total_bDP.baddbmm_(a_bDn, b_bnP)
    else:
        total_bDP.add_(work.product(a_bDn, b_bnP))


def _own_pairs(images: slice, texts: slice, first_own: int, count: int) -> list[tuple[int, int]]:
    """The pairs (image, its own text) inside a group and a tile."""
    first = max(images.start, texts.start - first_own)
    end = min(images.stop, texts.stop - first_own, count)
    return [(image, image + first_own) for image in range(first, end)]


def _pooled_gradient(pooled_bnD: Tensor, compared_KnD: Tensor, grad_similarity_Kbn: Tensor) -> Tensor:
    """Gradient of the cosines with respect to what the masks pool, (b, n, D)."""
    length_bn1 = torch.linalg.vector_norm(pooled_bnD, dim=2, keepdim=True)
    held_bn1 = length_bn1.clamp(min=POOL_EPSILON)
    unit_bnD = pooled_bnD / held_bn1
    grad_bnD = torch.zeros_like(pooled_bnD)
    for compared_nD, grad_bn in zip(compared_KnD, grad_similarity_Kbn, strict=True):
        grad_bnD.addcmul_(compared_nD.to(grad_bnD.dtype), grad_bn.unsqueeze(2))
    turning_bn1 = (grad_bnD * unit_bnD).sum(dim=2, keepdim=True).masked_fill_(length_bn1 < POOL_EPSILON, 0)
    return grad_bnD.addcmul_(unit_bnD, turning_bn1, value=-1).div_(held_bn1)


def _as_maps(x_xP: Tensor, grid: tuple[int, int]) -> Tensor:
    """View cells as a grid, (..., h, w)."""
    return x_xP.view(*x_xP.shape[:-1], *grid)


def _variation(masks_bnhw: Tensor) -> Tensor:
    """Total variation of every mask, (b, n)."""
    across = masks_bnhw.diff(dim=-1).abs_().mean(dim=(2, 3))
    return across + masks_bnhw.diff(dim=-2).abs_().mean(dim=(2, 3))


def _add_variation_gradient(grad_bnhw: Tensor, masks_bnhw: Tensor, grad_variation_bn: Tensor) -> None:
    for dim in (-1, -2):
        sign = masks_bnhw.diff(dim=dim).sign_()
        sign.mul_((grad_variation_bn / sign[0, 0].numel())[..., None, None])
        length = sign.shape[dim]
        grad_bnhw.narrow(dim, 1, length).add_(sign)
        grad_bnhw.narrow(dim, 0, length).sub_(sign)
