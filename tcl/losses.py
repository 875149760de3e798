"""TCL's losses, in the direct form: one mask for every pair of image and text, all of them in memory at once.

Shapes: B batch of pairs, N texts (N = B), D embedding, h w mask grid.
Source: TCL (Cha et al., CVPR 2023), section 3.3.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tclkit.runtime.errors import ConfigError

_MAX_LOGIT_SCALE = 100.0
_AREA_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """How much each loss counts; the defaults are the authors'.

    tcl: the image-level and the feature-level contrastive loss.
    area: both area losses.
    tv: both total variation losses.
    area_prior: share of the image that a text which belongs to it should cover, in 0..1.
    """

    tcl: float = 0.1
    area: float = 0.4
    tv: float = 1.0
    area_prior: float = 0.4

    def __post_init__(self) -> None:
        for name in ("tcl", "area", "tv"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss weight {name} must not be negative, not {getattr(self, name)!r}.", key=name)
        if not 0 <= self.area_prior <= 1:
            raise ConfigError(f"area_prior must be in 0..1, not {self.area_prior!r}.", key="area_prior")


def sample_hard_masks(logits: Tensor, noise_uniform: Tensor) -> Tensor:
    """Draw masks of 0 and 1 whose gradient is that of the noisy soft mask (straight-through Gumbel, temperature 1).

    Args:
        logits: masks before the sigmoid, any shape.
        noise_uniform: uniform in 0..1, the same shape; it becomes logistic noise.
    """
    noise = noise_uniform.log() - torch.log1p(-noise_uniform)
    soft = torch.sigmoid(logits + noise)
    hard = (soft > 0.5).to(soft.dtype)
    return hard - soft.detach() + soft


def contrastive_loss(similarity_BN: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE; pair i is row i with column i.

    Args:
        similarity_BN: (B, B) cosines, images by texts.
        logit_scale: scalar, logarithm of the inverse temperature (which is held at 100 at most).
    """
    logits_BN = similarity_BN * logit_scale.exp().clamp(max=_MAX_LOGIT_SCALE)
    target_B = torch.arange(len(logits_BN), device=logits_BN.device)
    return (F.cross_entropy(logits_BN, target_B) + F.cross_entropy(logits_BN.T, target_B)) / 2


def image_level_loss(masked_image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor) -> Tensor:
    """Contrast CLIP's embeddings of the masked images with those of the texts; neither needs to be normalised."""
    similarity_BN = F.normalize(masked_image_BD, dim=-1) @ F.normalize(text_BD, dim=-1).T
    return contrastive_loss(similarity_BN, logit_scale)


def pool_by_masks(embedding_BDhw: Tensor, masks_BNhw: Tensor) -> Tensor:
    """Mean embedding under every soft mask, (B, N, D); the embeddings are not normalised first."""
    total_BND = torch.einsum("bnhw,bdhw->bnd", masks_BNhw, embedding_BDhw)
    return total_BND / (masks_BNhw.sum(dim=(2, 3)) + _AREA_EPSILON).unsqueeze(-1)


def feature_level_loss(embedding_BDhw: Tensor, masks_BNhw: Tensor, text_ND: Tensor, logit_scale: Tensor) -> Tensor:
    """Contrast the texts with what their own masks pool from every image.

    Args:
        embedding_BDhw: (B, D, h, w) by the grounder, not normalised.
        masks_BNhw: (B, N, h, w) soft masks of every text on every image, N = B.
        text_ND: (N, D).
        logit_scale: see `contrastive_loss`.
    """
    pooled_BND = F.normalize(pool_by_masks(embedding_BDhw, masks_BNhw), dim=-1)
    similarity_BN = torch.einsum("bnd,nd->bn", pooled_BND, F.normalize(text_ND, dim=-1))
    return contrastive_loss(similarity_BN, logit_scale)


def area_losses(masks_BNhw: Tensor, prior: float) -> tuple[Tensor, Tensor]:
    """How far the mean area of matching pairs is from the prior, and that of all other pairs from zero.

    Args:
        masks_BNhw: (B, N, h, w) soft masks, N = B; pair i is image i with text i. B of 2 at least.
        prior: share of the image, in 0..1.

    Returns:
        Two scalars. The means run over the whole batch: single images may stray as long as the batch does not.
    """
    area_BN = masks_BNhw.mean(dim=(2, 3))
    count = len(area_BN)
    own = area_BN.diagonal().sum()
    others = (area_BN.sum() - own) / (count * (count - 1))
    return (own / count - prior).abs(), others.abs()


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of horizontal neighbours plus that of vertical ones, over the last two axes."""
    return x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()
