"""Judging masks on the synthetic world: mIoU at every background threshold in one pass over the scenes.

Each pixel goes to its best prompt, unless that prompt's score is below the threshold: then it is background. So a
histogram over (true class, best prompt, score) holds the confusion matrices of all thresholds at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tclkit.calib import iou_from_confusion, mean_iou
from tclkit.runtime.tokenizer import Tokenizer
from tclkit.runtime.upsample import resize_masks

from .batches import images_to_tensor
from .config import TrainConfig
from .loop import ProgressCallback, TrainProgress
from .model import TCL, kp_masks, similarity
from .pamr import refine_many_masks
from .world import OBJECT_NAMES, TEMPLATES, Scene, scenes

_BINS = 400
_IMAGES_COUNTED_TOGETHER = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldScore:
    """What one method reaches with one choice of prompts, at its best background threshold.

    method: for example "TCL". prompts: "present" (the objects in the scene) or "all" (the 64 names).
    miou: percent, over the classes and the background. background_iou: percent. threshold: the best one, in 0..1.
    """

    method: str
    prompts: str
    miou: float
    background_iou: float
    threshold: float


class ThresholdSweep:
    """Pixel counts by true class, best prompt and score; background is the last class."""

    def __init__(self, names: int) -> None:
        self._names = names
        self._counts = np.zeros((names + 1) * names * _BINS, np.int64)
        self._pending: list[npt.NDArray[np.int64]] = []  # counted together: the histogram is larger than an image

    def add(
        self,
        scores_NHW: npt.NDArray[np.float32],
        name_of_prompt: npt.NDArray[np.int64],
        label_map: npt.NDArray[np.int16],
    ) -> None:
        """Count one image.

        Args:
            scores_NHW: (N, H, W) in 0..1.
            name_of_prompt: (N,) class of each prompt.
            label_map: (H, W), -1 for background.
        """
        best = scores_NHW.argmax(0)
        score = np.take_along_axis(scores_NHW, best[None], 0)[0]
        bins = np.clip((score * _BINS).astype(np.int64), 0, _BINS - 1)
        truth = np.where(label_map < 0, self._names, label_map).astype(np.int64)
        flat = (truth * self._names + name_of_prompt[best]) * _BINS + bins
        self._pending.append(flat.ravel())
        if len(self._pending) == _IMAGES_COUNTED_TOGETHER:
            self._count_pending()

    def _count_pending(self) -> None:
        if self._pending:
            self._counts += np.bincount(np.concatenate(self._pending), minlength=self._counts.size)
            self._pending.clear()

    def confusions(self) -> npt.NDArray[np.int64]:
        """Confusion matrices (_BINS, K+1, K+1) for the thresholds 0, 1/_BINS, ...; background is the last class."""
        self._count_pending()
        counts = self._counts.reshape(self._names + 1, self._names, _BINS)
        kept = counts[..., ::-1].cumsum(-1)[..., ::-1]  # pixels whose score reaches the threshold
        dropped = counts.sum(-1, keepdims=True) - kept
        confusion = np.concatenate([kept, dropped.sum(1, keepdims=True)], axis=1)
        return np.ascontiguousarray(np.moveaxis(confusion, -1, 0))

    def best(self, method: str, prompts: str) -> WorldScore:
        """The score at the threshold with the highest mIoU."""
        confusions = self.confusions()
        miou = mean_iou(confusions)
        best = int(np.nanargmax(miou))
        background = iou_from_confusion(confusions[best])[-1]
        return WorldScore(
            method=method,
            prompts=prompts,
            miou=float(miou[best] * 100),
            background_iou=float(background * 100),
            threshold=best / _BINS,
        )


def masks_by_method(
    model: TCL, images_BHWC: npt.NDArray[np.uint8], texts_ND: Tensor, kp_w: float
) -> dict[str, npt.NDArray[np.float32]]:
    """Soft masks (B, N, H, W) of the methods to compare, all on the same CLIP weights.

    MaskCLIP (Zhou et al., ECCV 2022) is CLIP's last block attending to itself only: the KP branch alone. Its cosine
    goes through sigmoid(10·(cos - 0.25)), which changes no ranking, so no result at the best threshold either. PAMR
    refines the masks of both; with `kp_w` above 0 the finished model's mix of the two stands beside them.
    """
    with torch.no_grad():
        features = model.image_features(images_to_tensor(images_BHWC))
        tcl_BNhw = torch.sigmoid(model.grounder.mask(similarity(features.grounded_BDhw, texts_ND)))
        clip_BNhw = kp_masks(features.kp_BDhw, texts_ND)
    grid = tcl_BNhw.shape[-2:]
    clip_BNhw = F.interpolate(clip_BNhw, size=grid, mode="bilinear", align_corners=False)
    masks = {"MaskCLIP": clip_BNhw.numpy(), "TCL": tcl_BNhw.numpy()}
    masks |= {_refined_name(name): _refined(images_BHWC, plain) for name, plain in list(masks.items())}
    if kp_w > 0:
        for pamr in (False, True):
            plain = masks[_refined_name("TCL") if pamr else "TCL"]
            masks[shipped_method(kp_w, pamr=pamr)] = kp_w * masks["MaskCLIP"] + (1 - kp_w) * plain
    height, width = images_BHWC.shape[1:3]
    return {name: np.stack([resize_masks(one, (height, width)) for one in grids]) for name, grids in masks.items()}


def shipped_method(kp_w: float, *, pamr: bool) -> str:
    """Name of what the finished model does by default: TCL with its share of the KP branch, with or without PAMR."""
    name = _refined_name("TCL") if pamr else "TCL"
    return f"{name} + {kp_w:g} KP" if kp_w > 0 else name


def _refined_name(method: str) -> str:
    return f"{method} + PAMR"


def _refined(images_BHWC: npt.NDArray[np.uint8], masks_BNhw: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """PAMR with each image brought to its masks' grid, (B, N, h, w)."""
    images_BCHW = images_to_tensor(images_BHWC)
    small_BChw = F.interpolate(images_BCHW, size=masks_BNhw.shape[-2:], mode="bilinear", align_corners=True)
    pairs = zip(small_BChw, torch.from_numpy(masks_BNhw), strict=True)
    return np.stack([refine_many_masks(image_Chw, masks_Nhw).numpy() for image_Chw, masks_Nhw in pairs])


def world_text_embeddings(model: TCL, tokenizer: Tokenizer) -> Tensor:
    """Embeddings (64, D) of all names of the world, with its templates."""
    texts = [template.format(name) for name in OBJECT_NAMES for template in TEMPLATES]
    token_ids = torch.from_numpy(tokenizer.encode(texts))
    return model.build_text_embeddings(token_ids.reshape(len(OBJECT_NAMES), len(TEMPLATES), -1))


def evaluate_on_world(
    model: TCL, tokenizer: Tokenizer, config: TrainConfig, *, progress: ProgressCallback | None = None
) -> list[WorldScore]:
    """Score MaskCLIP and TCL on unseen scenes, with the present objects as prompts and with all 64 names."""
    sweeps = _sweeps(model, tokenizer, config, config.evaluation.seed, config.evaluation.scenes, "evaluation", progress)
    return [sweep.best(name, prompts) for (name, prompts), sweep in sweeps.items()]


def choose_thresholds(
    model: TCL, tokenizer: Tokenizer, config: TrainConfig, *, progress: ProgressCallback | None = None
) -> dict[str, float]:
    """The background thresholds a user should get, in 0..1: "background", and "background_pamr" for refined masks.

    Each has the highest mean of both mIoUs (present prompts, all names) of the model as it ships, its share of the KP
    branch mixed in, on scenes that neither training nor evaluation draws: a user names things that are there and things
    that are not.
    """
    settings = config.evaluation
    count = settings.threshold_scenes
    sweeps = _sweeps(model, tokenizer, config, settings.seed + 1, count, "threshold", progress)
    chosen = {}
    for key, pamr in (("background", False), ("background_pamr", True)):
        method = shipped_method(config.grounder.kp_w, pamr=pamr)
        curves = np.stack([mean_iou(sweeps[method, prompts].confusions()) for prompts in ("present", "all")])
        chosen[key] = int(np.nanargmax(curves.mean(0))) / _BINS
    return chosen


def _sweeps(
    model: TCL,
    tokenizer: Tokenizer,
    config: TrainConfig,
    seed: int,
    count: int,
    stage: str,
    progress: ProgressCallback | None,
) -> dict[tuple[str, str], ThresholdSweep]:
    """Pixel counts of `count` scenes of a world's seed, by (method, "present" or "all" prompts)."""
    texts_ND = world_text_embeddings(model.eval(), tokenizer)
    assert config.world is not None  # callers judge in the world that they trained in
    drawn = scenes(replace(config.world, seed=seed), count=count)
    sweeps: dict[tuple[str, str], ThresholdSweep] = {}
    done = 0
    while batch := list(islice(drawn, config.evaluation.batch_size)):
        images = np.stack([one.image for one in batch])
        for name, masks in masks_by_method(model, images, texts_ND, config.grounder.kp_w).items():
            _count(sweeps, name, batch, masks)
        done += len(batch)
        if progress:
            progress(TrainProgress(stage=stage, step=done, steps=count, losses={}))
    return sweeps


def _count(
    sweeps: dict[tuple[str, str], ThresholdSweep],
    method: str,
    batch: Sequence[Scene],
    masks_BNHW: npt.NDArray[np.float32],
) -> None:
    """Add one method's masks of one batch to its two sweeps."""
    every = np.arange(len(OBJECT_NAMES))
    for one, masks_NHW in zip(batch, masks_BNHW, strict=True):
        for prompts, names in (("present", np.array(one.present, np.int64)), ("all", every)):
            sweep = sweeps.setdefault((method, prompts), ThresholdSweep(len(OBJECT_NAMES)))
            sweep.add(masks_NHW[names], names, one.label_map)
