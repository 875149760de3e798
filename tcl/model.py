"""TCL: a frozen CLIP and a grounder that together say, for every text, which pixels it means.

Shapes: B batch, N prompts, T templates, M texts, L tokens, C channels, D embedding, H W pixels, h w grid.
Source: TCL (Cha et al., CVPR 2023); equal to the authors' code (kakaobrain/tcl) within fp32 rounding.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor, nn

from tclkit.runtime.errors import CheckpointError, ConfigError, InputError

from ._strict import dataclass_from_dict
from .clip import ClipConfig, build_clip, config_from_clip
from .distributed import Place, current_place, gather
from .grounder import Grounder
from .losses import (
    NORM_EPSILON,
    LossWeights,
    contrastive_loss,
    image_similarity,
    mean_areas,
    pooled_similarity,
    sample_hard_masks,
    total_variation,
)
from .pamr import refine_masks
from .tiled_losses import pair_statistics
from .vision import KP_ATTENTIONS, dense_embedding, global_embedding, run_blocks, run_trunk

_KP_SCALE, _KP_SHIFT = 10.0, -2.5  # sigmoid(10·(cos - 0.25))
_LOGIT_SCALE = math.log(1 / 0.07)  # both contrastive losses start at CLIP's initial temperature


@dataclass(frozen=True, kw_only=True, slots=True)
class TCLConfig:
    """What a TCL model is made of.

    clip: sizes of its CLIP.
    decoder_blocks: doublings of the grid; the authors' two make masks four times finer than the patches.
    kp_w: default weight of the KP branch (CLIP's own dense similarity) in the masks, in 0..1.
    """

    clip: ClipConfig
    decoder_blocks: int = 2
    kp_w: float = 0.3

    def __post_init__(self) -> None:
        if type(self.decoder_blocks) is not int or self.decoder_blocks < 1:
            raise ConfigError(f"decoder_blocks must be a positive whole number, not {self.decoder_blocks!r}.")
        if not 0 <= self.kp_w <= 1:
            raise ConfigError(f"kp_w must be in 0..1, not {self.kp_w!r}.")

    @property
    def mask_scale(self) -> int:
        """Cells of the mask's grid a patch side."""
        return int(2**self.decoder_blocks)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TCLConfig":
        """Build from `to_dict`'s result; unknown or missing keys raise ConfigError."""
        values = dict(values)
        if isinstance(values.get("clip"), Mapping):
            values["clip"] = ClipConfig.from_dict(values["clip"])
        return dataclass_from_dict(cls, values, "model")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, one entry a field; clip is a dict."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """Embeddings of one batch of images, not normalised.

    grounded_BDhw: (B, D, s·h, s·w) by the grounder, on the mask's grid.
    kp_BDhw: (B, D, h, w) by CLIP, on the patch grid.
    """

    grounded_BDhw: Tensor  # noqa: N815
    kp_BDhw: Tensor  # noqa: N815


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """All that the losses take from B images and N texts: small, however large images and masks are.

    image_similarity_BN: (B, N) cosines of CLIP's embedding of each masked image with every text; None when not wanted.
    similarity_KBN: (K, B, N) cosines of what a text's mask pools from each image with K texts, the mask's own first.
    area_BN: (B, N) mean of every soft mask.
    embedding_variation, mask_variation: scalars, total variation of the embeddings and of the masks.
    """

    image_similarity_BN: Tensor | None  # noqa: N815
    similarity_KBN: Tensor  # noqa: N815
    area_BN: Tensor  # noqa: N815
    embedding_variation: Tensor
    mask_variation: Tensor


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What the losses take from the masks of every image with every text."""

    similarity_KBN: Tensor  # noqa: N815
    area_BN: Tensor  # noqa: N815
    variation: Tensor
    own_logits_Bhw: Tensor  # noqa: N815


class TCL(nn.Module):
    """The model. CLIP stays frozen and in eval mode; the grounder and two loss temperatures learn."""

    def __init__(self, config: TCLConfig, clip: CLIP | None = None) -> None:
        """Build around `clip`, or around a fresh random one.

        Raises:
            CheckpointError: `clip` is not of the config's sizes, or of a kind that cannot carry TCL.
        """
        super().__init__()
        if clip is not None:
            _require_same_clip(config.clip, config_from_clip(clip))
        self.config = config
        self.clip = (clip if clip is not None else build_clip(config.clip)).float()
        self.clip.requires_grad_(False)
        self.grounder = Grounder(self.clip.visual, config.decoder_blocks)
        self.grounder.requires_grad_(True)
        self.logit_scales = nn.ParameterDict({name: torch.tensor(_LOGIT_SCALE) for name in ("image", "feature")})
        self.kp_attention = "self"
        self.train_stage("decoder")
        self.eval()

    def use_kp_attention(self, attention: str) -> None:
        """Choose how CLIP's last block attends in the KP branch, one of `KP_ATTENTIONS`; no part of a checkpoint.

        Raises:
            ConfigError: unknown.
        """
        if attention not in KP_ATTENTIONS:
            raise ConfigError(f"unknown KP attention {attention!r}; choose {' or '.join(KP_ATTENTIONS)}")
        self.kp_attention = attention

    def train(self, mode: bool = True) -> "TCL":
        """Switch modes; CLIP stays in eval mode."""
        super().train(mode)
        self.clip.eval()
        return self

    def train_stage(self, stage: Literal["decoder", "full"]) -> None:
        """Choose what learns: everything but the grounder's CLIP block, or that too (the authors' two stages)."""
        if stage not in ("decoder", "full"):
            raise ConfigError(f"unknown training stage {stage!r}; the stages are 'decoder' and 'full'.")
        self.grounder.block.requires_grad_(stage == "full")

    def encode_text(self, token_ids_ML: Tensor) -> Tensor:
        """Embed texts.

        Args:
            token_ids_ML: (M, L) int64, L at most the context; the end-of-text id is the largest of the vocabulary.
                What stands after it cannot change the result, so a batch may be cut to its longest text.

        Returns:
            (M, D) float, not normalised.

        Raises:
            InputError: not 2-D, or longer than the context.
        """
        return encode_text(self.clip, token_ids_ML)

    @torch.no_grad()
    def build_text_embeddings(self, token_ids_NTL: Tensor) -> Tensor:
        """Embed prompts: the raw embeddings of a prompt's T templates are averaged, then normalised once.

        Args:
            token_ids_NTL: (N, T, L) int64.

        Returns:
            (N, D) float, of length 1.
        """
        if token_ids_NTL.ndim != 3:
            raise InputError(f"token ids must be (N, T, L), not {tuple(token_ids_NTL.shape)}.")
        raw_MD = self.encode_text(token_ids_NTL.flatten(0, 1))
        raw_NTD = raw_MD.reshape(*token_ids_NTL.shape[:2], -1)
        return normalize(raw_NTD.mean(dim=1), dim=-1)

    def image_features(self, images_BCHW: Tensor) -> ImageFeatures:
        """Embed images, both branches on one trunk.

        Args:
            images_BCHW: (B, 3, H, W) float, normalised with ImageNet's mean and std; H and W multiples of the patch.

        Raises:
            InputError: the size is no multiple of the patch.
        """
        trunk_BLC, h, w = self._run_trunk(images_BCHW)
        return ImageFeatures(self.grounder(trunk_BLC, h, w), self._kp_embedding(trunk_BLC, h, w))

    def _kp_embedding(self, trunk_BLC: Tensor, h: int, w: int) -> Tensor:
        return dense_embedding(self.clip.visual, trunk_BLC, h, w, self.kp_attention)

    @torch.no_grad()
    def generate_masks(
        self, images_BCHW: Tensor, text_embeddings_ND: Tensor, *, kp_w: float = 0.3, pamr: bool = False
    ) -> Tensor:
        """Say for every prompt and pixel how well they fit.

        Args:
            images_BCHW: (B, 3, H, W) float, normalised with ImageNet's mean and std, any size.
            text_embeddings_ND: (N, D), by `build_text_embeddings`.
            kp_w: weight of the KP branch in 0..1; at 0 it is not run.
            pamr: whether the grounder's masks are refined along the image's edges.

        Returns:
            (B, N, H, W) soft masks in 0..1.

        Raises:
            InputError: a shape or kp_w is wrong.
        """
        if not 0 <= kp_w <= 1:
            raise InputError(f"kp_w must be in 0..1, not {kp_w!r}.")
        _require_shape("images", images_BCHW, (None, 3, None, None))
        _require_shape("text embeddings", text_embeddings_ND, (None, self.config.clip.embed_dim))
        padded_BCHW, (left, top) = pad_to_patch(images_BCHW, self.config.clip.patch_size)
        trunk_BLC, h, w = self._run_trunk(padded_BCHW)
        masks_BNhw = torch.sigmoid(self.grounder.mask(similarity(self.grounder(trunk_BLC, h, w), text_embeddings_ND)))
        if pamr:
            masks_BNhw = _refine_at_mask_size(padded_BCHW, masks_BNhw)
        if kp_w > 0:
            kp_BNhw = kp_masks(self._kp_embedding(trunk_BLC, h, w), text_embeddings_ND)
            masks_BNhw = mix_masks(masks_BNhw, kp_BNhw, kp_w)
        masks_BNHW = F.interpolate(masks_BNhw, size=padded_BCHW.shape[-2:], mode="bilinear", align_corners=False)
        height, width = images_BCHW.shape[-2:]
        return masks_BNHW[..., top : top + height, left : left + width]

    def forward(
        self,
        images_BCHW: Tensor,
        token_ids_BL: Tensor,
        *,
        noise_uniform: Tensor | None = None,
        weights: LossWeights | None = None,
    ) -> dict[str, Tensor]:
        """Losses of one batch of pairs.

        With several processes (torch.distributed) each gives its own part of the batch, B pairs of N, and gets its
        share of the losses: their mean over the processes is what one process finds on the whole batch, and so is
        that of their gradients.

        Args:
            images_BCHW: (B, 3, H, W) float, normalised with ImageNet's mean and std; sides are multiples of the patch.
            token_ids_BL: (B, L) int64, text i belongs to image i.
            noise_uniform: (B, N, s·h, s·w) uniform in 0..1 for drawing hard masks, of which that of each image's own
                text counts; or (B, s·h, s·w), these alone. None: drawn by torch's generator of the device, which must
                be in the same state on all processes.
            weights: how much each loss counts and how it is computed; None: the authors' choice.

        Returns:
            Scalars, already weighted, to be summed: tcli_loss (image level) and tclf_loss (feature level), where they
            are wanted, area_loss, neg_area_loss, tv_img_loss, tv_mask_loss.

        Raises:
            InputError: fewer than two pairs (nothing to contrast), or a shape is wrong.
        """
        count, place = len(images_BCHW), current_place()
        if count < 2:
            raise InputError(f"training needs at least two pairs a batch, not {count}.")
        weights = weights or LossWeights()
        with torch.no_grad():
            text_BD = self.encode_text(token_ids_BL)
            _require_shape("text embeddings", text_BD, (count, None))
            text_ND = gather(text_BD)
        statistics = self.statistics(
            images_BCHW,
            text_ND,
            first_own=place.rank * count,
            noise_Bhw=_own_noise(noise_uniform, count, self.mask_grid(images_BCHW), place, images_BCHW.device),
            weights=weights,
            compared_KND=_compared_by_reference(text_ND, place) if _is_faulty(weights, place) else None,
        )
        return self.losses_from_statistics(statistics, weights)

    def mask_grid(self, images_BCHW: Tensor) -> tuple[int, int]:
        """Height and width of the masks of these images.

        Raises:
            InputError: a shape is wrong, or a side is no multiple of the patch.
        """
        _require_shape("images", images_BCHW, (None, 3, None, None))
        patch, scale = self.config.clip.patch_size, self.config.mask_scale
        height, width = images_BCHW.shape[-2:]
        if height % patch or width % patch or not height or not width:
            raise InputError(
                f"the image's sides must be multiples of the patch ({patch}), not {height}x{width}; pad it."
            )
        return height // patch * scale, width // patch * scale

    def statistics(
        self,
        images_BCHW: Tensor,
        text_ND: Tensor,
        *,
        first_own: int,
        noise_Bhw: Tensor,
        weights: LossWeights,
        compared_KND: Tensor | None = None,
    ) -> BatchStatistics:
        """Compare images with texts, as far as that can be done without the other images of the batch.

        Args:
            images_BCHW: (B, 3, H, W) float, normalised; sides are multiples of the patch.
            text_ND: (N, D) embeddings of the whole batch's texts, not normalised.
            first_own: index of image 0's text; image i belongs to text first_own + i.
            noise_Bhw: (B, s·h, s·w) uniform in 0..1, for drawing each image's hard mask of its own text.
            weights: says what is wanted, and how many masks are in memory at a time.
            compared_KND: (K, N, D) texts that pooled embeddings are compared with; None: each with its mask's.
        """
        with torch.no_grad():
            trunk_BLC, h, w = self._run_trunk(images_BCHW)
        embedding_BDhw = self.grounder(trunk_BLC, h, w)
        if compared_KND is None:
            compared_KND = text_ND.unsqueeze(0)
        pairs = self._pairs(embedding_BDhw, text_ND, compared_KND, weights.tile, first_own)
        similarity_BN = None
        if weights.image_level:
            masked_BD = self._embed_masked_images(images_BCHW, sample_hard_masks(pairs.own_logits_Bhw, noise_Bhw))
            similarity_BN = image_similarity(masked_BD, text_ND)
        return BatchStatistics(
            image_similarity_BN=similarity_BN,
            similarity_KBN=pairs.similarity_KBN,
            area_BN=pairs.area_BN,
            embedding_variation=total_variation(embedding_BDhw),
            mask_variation=pairs.variation,
        )

    def losses_from_statistics(self, statistics: BatchStatistics, weights: LossWeights) -> dict[str, Tensor]:
        """Losses of this process's whole part of the batch; see `forward`."""
        place, faulty = current_place(), _is_faulty(weights, current_place())
        losses: dict[str, Tensor] = {}
        if statistics.image_similarity_BN is not None:
            losses["tcli_loss"] = weights.tcl * self._contrast("image", statistics.image_similarity_BN, None, place)
        if weights.feature_level:
            similarity_KBN = statistics.similarity_KBN
            columns_BN = _columns_by_reference(similarity_KBN, place) if faulty else None
            losses["tclf_loss"] = weights.tcl * self._contrast("feature", similarity_KBN[0], columns_BN, place)
        own_area, other_area = mean_areas(statistics.area_BN, place.rank * len(statistics.area_BN))
        if not faulty:
            own_area = gather(own_area.view(1)).mean()
        return losses | {
            "area_loss": weights.area * (own_area - weights.area_prior).abs(),
            "neg_area_loss": weights.area * other_area,
            "tv_img_loss": weights.tv * statistics.embedding_variation,
            "tv_mask_loss": weights.tv * statistics.mask_variation,
        }

    def _contrast(self, level: str, similarity_BN: Tensor, columns_BN: Tensor | None, place: Place) -> Tensor:
        if columns_BN is None:
            columns_BN = _own_columns(similarity_BN, place)
        first_own = place.rank * len(similarity_BN)
        return contrastive_loss(similarity_BN, self.logit_scales[level], columns_BN=columns_BN, first_own=first_own)

    def _pairs(
        self, embedding_BDhw: Tensor, text_ND: Tensor, compared_KND: Tensor, tile: int, first_own: int
    ) -> _Pairs:
        if tile:
            return self._pairs_in_tiles(embedding_BDhw, text_ND, compared_KND, tile, first_own)
        logits_BNhw = self.grounder.mask(similarity(embedding_BDhw, text_ND))
        masks_BNhw = torch.sigmoid(logits_BNhw)
        area_BN = masks_BNhw.mean(dim=(2, 3))  # in this order: it is the order in which gradients are added up
        return _Pairs(
            similarity_KBN=torch.stack(
                [pooled_similarity(embedding_BDhw, masks_BNhw, text_ND) for text_ND in compared_KND]
            ),
            area_BN=area_BN,
            variation=total_variation(masks_BNhw),
            own_logits_Bhw=_diagonal(logits_BNhw, first_own),
        )

    def _pairs_in_tiles(
        self, embedding_BDhw: Tensor, text_ND: Tensor, compared_KND: Tensor, tile: int, first_own: int
    ) -> _Pairs:
        found = pair_statistics(
            embedding_BDhw,
            normalize(text_ND, -1),
            F.normalize(compared_KND, dim=-1),
            self.grounder.mask.scale,
            self.grounder.mask.shift,
            tile=tile,
            first_own=first_own,
        )
        return _Pairs(
            similarity_KBN=found.similarity_KBN,
            area_BN=found.area_BN,
            variation=found.variation_BN.mean(),
            own_logits_Bhw=found.own_logits_Bhw,
        )

    def _embed_masked_images(self, images_BCHW: Tensor, masks_Bhw: Tensor) -> Tensor:
        """CLIP's embedding of what the masks leave, (B, D); gradients reach the masks through the frozen CLIP."""
        masks_B1HW = F.interpolate(masks_Bhw.unsqueeze(1), size=images_BCHW.shape[-2:], mode="nearest")
        trunk_BLC, _, _ = self._run_trunk(images_BCHW * masks_B1HW)
        return global_embedding(self.clip.visual, trunk_BLC)

    def _run_trunk(self, images_BCHW: Tensor) -> tuple[Tensor, int, int]:
        height, width = self.mask_grid(images_BCHW)
        scale = self.config.mask_scale
        return run_trunk(self.clip.visual, images_BCHW), height // scale, width // scale


def encode_text(clip: CLIP, token_ids_ML: Tensor) -> Tensor:
    """Embed texts with CLIP's text tower, for texts cut to any length; see `TCL.encode_text`."""
    context = len(clip.positional_embedding)
    if token_ids_ML.ndim != 2 or not 1 <= token_ids_ML.shape[1] <= context:
        raise InputError(f"token ids must be (M, L) with L in 1..{context}, not {tuple(token_ids_ML.shape)}.")
    length = token_ids_ML.shape[1]
    x_MLC = clip.token_embedding(token_ids_ML) + clip.positional_embedding[:length]
    causal_LL = clip.attn_mask[:length, :length]
    x_MLC = run_blocks(clip.transformer, clip.transformer.resblocks, x_MLC, attn_mask=causal_LL)
    end_M = token_ids_ML.argmax(dim=-1)  # the first of them
    x_MC = x_MLC[torch.arange(len(x_MLC), device=x_MLC.device), end_M]
    embedding_MD: Tensor = clip.ln_final(x_MC) @ clip.text_projection
    return embedding_MD


def normalize(x: Tensor, dim: int) -> Tensor:
    """Scale vectors to length 1 the authors' way: the length is raised to 1e-6 at least."""
    return F.normalize(x, dim=dim, eps=NORM_EPSILON)


def similarity(embedding_BDhw: Tensor, text_embeddings_ND: Tensor) -> Tensor:
    """Cosine of every cell with every text, (B, N, h, w)."""
    return torch.einsum("bdhw,nd->bnhw", normalize(embedding_BDhw, 1), normalize(text_embeddings_ND, -1))


def pad_to_patch(images_BCHW: Tensor, patch_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Pad with zeros to multiples of the patch, half (rounded down) left and top; also returns (left, top)."""
    height, width = images_BCHW.shape[-2:]
    extra_y, extra_x = -height % patch_size, -width % patch_size
    left, top = extra_x // 2, extra_y // 2
    return F.pad(images_BCHW, (left, extra_x - left, top, extra_y - top)), (left, top)


def _diagonal(x_BNhw: Tensor, first_own: int) -> Tensor:
    own_B = torch.arange(len(x_BNhw), device=x_BNhw.device)
    return x_BNhw[own_B, own_B + first_own]


def _is_faulty(weights: LossWeights, place: Place) -> bool:
    return weights.reference_bugs and place.count > 1


def _own_noise(
    noise_uniform: Tensor | None, count: int, grid: tuple[int, int], place: Place, device: torch.device
) -> Tensor:
    first_own = place.rank * count
    if noise_uniform is None:
        # Every process draws for all, so that their generators stay in step and the draw is that of one process.
        return torch.rand(count * place.count, *grid, device=device)[first_own : first_own + count]
    if noise_uniform.ndim == 4:
        _require_shape("noise", noise_uniform, (count, count * place.count, *grid))
        return _diagonal(noise_uniform, first_own)
    _require_shape("noise", noise_uniform, (count, *grid))
    return noise_uniform


def _own_columns(similarity_BN: Tensor, place: Place) -> Tensor | None:
    """The own texts by the images of all processes, (B, N); None when there are no other processes."""
    if place.count == 1:
        return None
    count = len(similarity_BN)
    return gather(similarity_BN)[:, place.rank * count : (place.rank + 1) * count].T


def _compared_by_reference(text_ND: Tensor, place: Place) -> Tensor:
    """The right text for every mask, then for each process the text that the authors pair with the mask, (1 + R, N, D).

    Their text-to-image half takes, for text j of a process and any image, the mask of text j of the *image's* process.
    """
    text_RBD = text_ND.view(place.count, -1, text_ND.shape[-1])
    return torch.cat([text_ND.unsqueeze(0), text_RBD.repeat(1, place.count, 1)])


def _columns_by_reference(similarity_KBN: Tensor, place: Place) -> Tensor:
    """The own texts by the images of all processes as the authors pair them, (B, N); see `_compared_by_reference`."""
    count = similarity_KBN.shape[1]
    own = slice(place.rank * count, (place.rank + 1) * count)
    paired_BRB = similarity_KBN[1:, :, own].transpose(0, 1)
    return gather(paired_BRB)[:, place.rank].T


def kp_masks(kp_BDhw: Tensor, text_embeddings_ND: Tensor) -> Tensor:
    """Soft masks of the KP branch on the patch grid, (B, N, h, w): a fixed line, nothing learned."""
    return torch.sigmoid(similarity(kp_BDhw, text_embeddings_ND) * _KP_SCALE + _KP_SHIFT)


def mix_masks(masks_BNhw: Tensor, kp_BNhw: Tensor, kp_w: float) -> Tensor:
    """Bring the KP masks to the grounder's grid (bilinear) and mix: kp_w·kp + (1 - kp_w)·mask."""
    kp_BNhw = F.interpolate(kp_BNhw, size=masks_BNhw.shape[-2:], mode="bilinear", align_corners=False)
    return kp_w * kp_BNhw + (1 - kp_w) * masks_BNhw


def _refine_at_mask_size(images_BCHW: Tensor, masks_BNhw: Tensor) -> Tensor:
    small_BChw = F.interpolate(images_BCHW, size=masks_BNhw.shape[-2:], mode="bilinear", align_corners=True)
    return refine_masks(small_BChw, masks_BNhw)


def _require_shape(what: str, x: Tensor, shape: tuple[int | None, ...]) -> None:
    fits = x.ndim == len(shape) and all(
        have == want or (want is None and have > 0) for have, want in zip(x.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("≥1" if side is None else str(side) for side in shape)
        raise InputError(f"{what} must have shape ({wanted}), not {tuple(x.shape)}.")


def _require_same_clip(wanted: ClipConfig, found: ClipConfig) -> None:
    ignored = ("vision_layer_scale", "vision_mlp_ratio")  # a start value, and a ratio that rounding blurs
    differ = [
        f"{field.name} {getattr(found, field.name)} (expected {getattr(wanted, field.name)})"
        for field in dataclasses.fields(ClipConfig)
        if field.name not in ignored and getattr(found, field.name) != getattr(wanted, field.name)
    ]
    if differ:
        raise CheckpointError(f"this CLIP does not fit the model: {', '.join(differ)}.", differ=differ)
