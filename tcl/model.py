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
from .grounder import Grounder
from .losses import (
    LossWeights,
    area_losses,
    feature_level_loss,
    image_level_loss,
    sample_hard_masks,
    total_variation,
)
from .pamr import refine_masks
from .vision import KP_ATTENTIONS, dense_embedding, global_embedding, run_blocks, run_trunk

_KP_SCALE, _KP_SHIFT = 10.0, -2.5  # sigmoid(10·(cos - 0.25))
_NORM_EPSILON = 1e-6
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
        """Losses of one batch of pairs, on one process.

        Args:
            images_BCHW: (B, 3, H, W) float, normalised with ImageNet's mean and std; sides are multiples of the patch.
            token_ids_BL: (B, L) int64, text i belongs to image i.
            noise_uniform: (B, B, s·h, s·w) uniform in 0..1 for drawing hard masks, of which the diagonal counts; or
                (B, s·h, s·w), that diagonal. None: drawn by torch's generator of the device.
            weights: how much each loss counts; None: the authors' choice.

        Returns:
            Scalars, already weighted, to be summed: tcli_loss (image level), tclf_loss (feature level), area_loss,
            neg_area_loss, tv_img_loss, tv_mask_loss.

        Raises:
            InputError: fewer than two pairs (nothing to contrast), or a shape is wrong.
        """
        count = len(images_BCHW)
        if count < 2:
            raise InputError(f"training needs at least two pairs a batch, not {count}.")
        weights = weights or LossWeights()
        with torch.no_grad():
            text_BD = self.encode_text(token_ids_BL)
            trunk_BLC, h, w = self._run_trunk(images_BCHW)
        _require_shape("text embeddings", text_BD, (count, None))
        embedding_BDhw = self.grounder(trunk_BLC, h, w)
        logits_BNhw = self.grounder.mask(similarity(embedding_BDhw, text_BD))
        masks_BNhw = torch.sigmoid(logits_BNhw)
        hard_Bhw = sample_hard_masks(_diagonal(logits_BNhw), _own_noise(noise_uniform, logits_BNhw))
        masked_BD = self._embed_masked_images(images_BCHW, hard_Bhw)
        area, negative_area = area_losses(masks_BNhw, weights.area_prior)
        feature_loss = feature_level_loss(embedding_BDhw, masks_BNhw, text_BD, self.logit_scales["feature"])
        return {
            "tcli_loss": weights.tcl * image_level_loss(masked_BD, text_BD, self.logit_scales["image"]),
            "tclf_loss": weights.tcl * feature_loss,
            "area_loss": weights.area * area,
            "neg_area_loss": weights.area * negative_area,
            "tv_img_loss": weights.tv * total_variation(embedding_BDhw),
            "tv_mask_loss": weights.tv * total_variation(masks_BNhw),
        }

    def _embed_masked_images(self, images_BCHW: Tensor, masks_Bhw: Tensor) -> Tensor:
        """CLIP's embedding of what the masks leave, (B, D); gradients reach the masks through the frozen CLIP."""
        masks_B1HW = F.interpolate(masks_Bhw.unsqueeze(1), size=images_BCHW.shape[-2:], mode="nearest")
        trunk_BLC, _, _ = self._run_trunk(images_BCHW * masks_B1HW)
        return global_embedding(self.clip.visual, trunk_BLC)

    def _run_trunk(self, images_BCHW: Tensor) -> tuple[Tensor, int, int]:
        _require_shape("images", images_BCHW, (None, 3, None, None))
        patch = self.config.clip.patch_size
        height, width = images_BCHW.shape[-2:]
        if height % patch or width % patch or not height or not width:
            raise InputError(
                f"the image's sides must be multiples of the patch ({patch}), not {height}x{width}; pad it."
            )
        return run_trunk(self.clip.visual, images_BCHW), height // patch, width // patch


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
    return F.normalize(x, dim=dim, eps=_NORM_EPSILON)


def similarity(embedding_BDhw: Tensor, text_embeddings_ND: Tensor) -> Tensor:
    """Cosine of every cell with every text, (B, N, h, w)."""
    return torch.einsum("bdhw,nd->bnhw", normalize(embedding_BDhw, 1), normalize(text_embeddings_ND, -1))


def pad_to_patch(images_BCHW: Tensor, patch_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Pad with zeros to multiples of the patch, half (rounded down) left and top; also returns (left, top)."""
    height, width = images_BCHW.shape[-2:]
    extra_y, extra_x = -height % patch_size, -width % patch_size
    left, top = extra_x // 2, extra_y // 2
    return F.pad(images_BCHW, (left, extra_x - left, top, extra_y - top)), (left, top)


def _diagonal(x_BNhw: Tensor) -> Tensor:
    own_B = torch.arange(len(x_BNhw), device=x_BNhw.device)
    return x_BNhw[own_B, own_B]


def _own_noise(noise_uniform: Tensor | None, logits_BNhw: Tensor) -> Tensor:
    if noise_uniform is None:
        return torch.rand_like(_diagonal(logits_BNhw), dtype=torch.float32)
    count, _, h, w = logits_BNhw.shape
    if noise_uniform.ndim == 4:
        _require_shape("noise", noise_uniform, (count, count, h, w))
        return _diagonal(noise_uniform)
    _require_shape("noise", noise_uniform, (count, h, w))
    return noise_uniform


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
