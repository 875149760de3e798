"""TCL's losses. Where they take masks they are in the direct form: one for every pair of image and text, all of them in
memory at once; tiled_losses.py computes the same without that.

Shapes: B batch of pairs, N texts (N = B), D embedding, h w mask grid.
Source: TCL (Cha et al., CVPR 2023), section 3.3.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tclkit.runtime.errors import ConfigError

AREA_EPSILON = 1e-6  # added to the area that a pooled embedding is divided by
NORM_EPSILON = 1e-6  # lengths of embeddings and texts are raised to this before masks are made
POOL_EPSILON = 1e-12  # lengths of pooled embeddings and of the texts they are compared with are raised to this
_MAX_LOGIT_SCALE = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """How much each loss counts; the defaults are the authors'.

    tcl: the image-level and the feature-level contrastive loss.
    image_level, feature_level: whether each of these two is computed; False is for ablations.
    area: both area losses.
    tv: both total variation losses.
    area_prior: share of the image that a text which belongs to it should cover, in 0..1.
    tile: texts whose masks are in memory at a time, which changes rounding only; 0 computes all masks at once, which
        takes memory for images x texts. Which is faster depends on the machine: tests/bench/tiled_loss.py tells.
    reference_bugs: over several processes, compute the feature-level loss, the area loss and the average of gradients
        as the authors' code does, for comparison with it: text to image, their feature-level loss pairs a text with
        the mask of another process's text; their area loss judges each process's mean by itself; and the tensors of
        the grounder's CLIP block are not averaged. One process computes the same either way.
    """

    tcl: float = 0.1
    image_level: bool = True
    feature_level: bool = True
    area: float = 0.4
    tv: float = 1.0
    area_prior: float = 0.4
    tile: int = 0
    reference_bugs: bool = False

    def __post_init__(self) -> None:
        for name in ("tcl", "area", "tv"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss weight {name} must not be negative, not {getattr(self, name)!r}.", key=name)
        if not 0 <= self.area_prior <= 1:
            raise ConfigError(f"area_prior must be in 0..1, not {self.area_prior!r}.", key="area_prior")
        if self.tile < 0:
            raise ConfigError(f"tile must be a number of texts, or 0 for all at once, not {self.tile!r}.", key="tile")


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


def contrastive_loss(
    similarity_BN: Tensor, logit_scale: Tensor, *, columns_BN: Tensor | None = None, first_own: int = 0
) -> Tensor:
    """Symmetric InfoNCE; image i belongs to text first_own + i.

    Args:
        similarity_BN: (B, N) cosines, images by texts.
        logit_scale: scalar, logarithm of the inverse temperature (which is held at 100 at most).
        columns_BN: (B, N) cosines, the own texts by N images of which the own begin at first_own too. None: there are
            no other images than these B, so they are the columns of similarity_BN that belong to the own texts.
        first_own: index of image 0's text; not 0 where other processes hold the texts before it.
    """
    factor = logit_scale.exp().clamp(max=_MAX_LOGIT_SCALE)
    count, texts = similarity_BN.shape
    target_B = torch.arange(count, device=similarity_BN.device)
    rows_BN = similarity_BN * factor
    row_loss = F.cross_entropy(rows_BN, target_B + first_own)
    if columns_BN is not None:
        column_loss = F.cross_entropy(columns_BN * factor, target_B + first_own)
    else:
        square_BN = rows_BN if count == texts else rows_BN[:, first_own : first_own + count]
        column_loss = F.cross_entropy(square_BN.T, target_B)
    return (row_loss + column_loss) / 2


def image_similarity(masked_image_BD: Tensor, text_ND: Tensor) -> Tensor:
    """Cosines of CLIP's embeddings of the masked images with those of the texts, (B, N).

    The image-level loss contrasts these; neither needs to be normalised.
    """
    return F.normalize(masked_image_BD, dim=-1) @ F.normalize(text_ND, dim=-1).T


def pool_by_masks(embedding_BDhw: Tensor, masks_BNhw: Tensor) -> Tensor:
    """Mean embedding under every soft mask, (B, N, D); the embeddings are not normalised first."""
    total_BND = torch.einsum("bnhw,bdhw->bnd", masks_BNhw, embedding_BDhw)
    return total_BND / (masks_BNhw.sum(dim=(2, 3)) + AREA_EPSILON).unsqueeze(-1)


def pooled_similarity(embedding_BDhw: Tensor, masks_BNhw: Tensor, text_ND: Tensor) -> Tensor:
    """Cosine of every text with what its own mask pools from every image, (B, N).

    The feature-level loss contrasts these.

    Args:
        embedding_BDhw: (B, D, h, w) by the grounder, not normalised.
        masks_BNhw: (B, N, h, w) soft masks of every text on every image.
        text_ND: (N, D).
    """
    pooled_BND = F.normalize(pool_by_masks(embedding_BDhw, masks_BNhw), dim=-1)
    return torch.einsum("bnd,nd->bn", pooled_BND, F.normalize(text_ND, dim=-1))


def mean_areas(area_BN: Tensor, first_own: int = 0) -> tuple[Tensor, Tensor]:
    """Mean area of the masks of matching pairs, and of all other pairs.

    Args:
        area_BN: (B, N) mean of every soft mask; image i belongs to text first_own + i. N of 2 at least.
        first_own: see `contrastive_loss`.
    """
    count, texts = area_BN.shape
    own = area_BN.diagonal(first_own).sum()
    others = (area_BN.sum() - own) / (count * (texts - 1))
    return own / count, others


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of horizontal neighbours plus that of vertical ones, over the last two axes."""
    return x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()
