"""Judging masks on the synthetic world: mIoU at every background threshold in one pass over the scenes.

Each pixel goes to its best prompt, unless that prompt's score is below the threshold: then it is background. So a
histogram over (true class, best prompt, score) holds the confusion matrices of all thresholds at once.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tclkit.calib import iou_from_confusion, mean_iou
from tclkit.runtime.tokenizer import Tokenizer

from .batches import images_to_tensor
from .config import TrainConfig
from .loop import ProgressCallback, TrainProgress
from .model import TCL
from .world import OBJECT_NAMES, TEMPLATES, Scene, scenes

_BINS = 400

Scorer = Callable[[Tensor, Tensor], Tensor]
"""(images (B, 3, H, W) normalised, text embeddings (N, D)) -> scores (B, N, H, W) in 0..1."""


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
        self._counts += np.bincount(flat.ravel(), minlength=self._counts.size)

    def confusions(self) -> npt.NDArray[np.int64]:
        """Confusion matrices (_BINS, K+1, K+1) for the thresholds 0, 1/_BINS, ...; background is the last class."""
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


def scorers(model: TCL, kp_w: float) -> dict[str, Scorer]:
    """The methods to compare, all on the same CLIP weights: MaskCLIP, TCL alone, TCL with the KP branch mixed in.

    MaskCLIP (Zhou et al., ECCV 2022) is CLIP's last block attending to itself only: the KP branch alone. Its cosine
    goes through sigmoid(10·(cos - 0.25)), which changes no ranking and so no best-threshold result.
    """
    methods: dict[str, Scorer] = {
        "MaskCLIP": lambda images, texts: model.generate_masks(images, texts, kp_w=1.0),
        "TCL": lambda images, texts: model.generate_masks(images, texts, kp_w=0.0),
    }
    if 0 < kp_w < 1:
        methods[f"TCL + {kp_w:g} KP"] = lambda images, texts: model.generate_masks(images, texts, kp_w=kp_w)
    return methods


def world_text_embeddings(model: TCL, tokenizer: Tokenizer) -> Tensor:
    """Embeddings (64, D) of all names of the world, with its templates."""
    texts = [template.format(name) for name in OBJECT_NAMES for template in TEMPLATES]
    token_ids = torch.from_numpy(tokenizer.encode(texts))
    return model.build_text_embeddings(token_ids.reshape(len(OBJECT_NAMES), len(TEMPLATES), -1))


def evaluate_on_world(
    model: TCL, tokenizer: Tokenizer, config: TrainConfig, *, progress: ProgressCallback | None = None
) -> list[WorldScore]:
    """Score MaskCLIP and TCL on unseen scenes, with the present objects as prompts and with all 64 names."""
    settings = config.evaluation
    world = replace(config.world, seed=settings.seed)
    methods = scorers(model.eval(), config.grounder.kp_w)
    sweeps = sweep_thresholds(
        methods,
        world_text_embeddings(model, tokenizer),
        scenes(world, count=settings.scenes),
        batch_size=settings.batch_size,
        on_scenes=lambda done: _report(progress, "evaluation", done, settings.scenes),
    )
    return [sweep.best(name, prompts) for (name, prompts), sweep in sweeps.items()]


def choose_threshold(
    model: TCL, tokenizer: Tokenizer, config: TrainConfig, *, progress: ProgressCallback | None = None
) -> float:
    """The background threshold a user should get, in 0..1.

    The one with the highest mean of both mIoUs (present prompts, all names), on scenes that neither training nor
    evaluation draws: a user names things that are there and things that are not.
    """
    settings = config.evaluation
    world = replace(config.world, seed=settings.seed + 1)
    kp_w = config.grounder.kp_w
    sweeps = sweep_thresholds(
        {"shipped": lambda images, texts: model.generate_masks(images, texts, kp_w=kp_w)},
        world_text_embeddings(model.eval(), tokenizer),
        scenes(world, count=settings.threshold_scenes),
        batch_size=settings.batch_size,
        on_scenes=lambda done: _report(progress, "threshold", done, settings.threshold_scenes),
    )
    curves = np.stack([mean_iou(sweep.confusions()) for sweep in sweeps.values()])
    return int(np.nanargmax(curves.mean(0))) / _BINS


def sweep_thresholds(
    methods: Mapping[str, Scorer],
    texts_ND: Tensor,
    drawn: Iterator[Scene],
    *,
    batch_size: int,
    on_scenes: Callable[[int], None],
) -> dict[tuple[str, str], ThresholdSweep]:
    """Count pixels of all scenes, by (method, "present" or "all") prompts.

    Args:
        methods: to score with.
        texts_ND: (64, D) embeddings of OBJECT_NAMES.
        drawn: the scenes.
        batch_size: images at a time.
        on_scenes: called with the number of scenes done.
    """
    sweeps = {(name, prompts): ThresholdSweep(len(OBJECT_NAMES)) for name in methods for prompts in ("present", "all")}
    every = np.arange(len(OBJECT_NAMES))
    done = 0
    while batch := list(islice(drawn, batch_size)):
        images = images_to_tensor(np.stack([one.image for one in batch]))
        for name, scorer in methods.items():
            scores_BNHW = scorer(images, texts_ND).numpy()
            for one, scores_NHW in zip(batch, scores_BNHW, strict=True):
                present = np.array(one.present, np.int64)
                sweeps[name, "all"].add(scores_NHW, every, one.label_map)
                sweeps[name, "present"].add(scores_NHW[present], present, one.label_map)
        done += len(batch)
        on_scenes(done)
    return sweeps


def _report(progress: ProgressCallback | None, stage: str, done: int, scenes: int) -> None:
    if progress:
        progress(TrainProgress(stage=stage, step=done, steps=scenes, losses={}))
