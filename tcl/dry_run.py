"""A look before a long run: what would be trained, what it needs, and how long one step takes."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .arithmetic import Arithmetic
from .batches import WorldBatches
from .clip import build_clip
from .clip_training import ClipStage
from .config import TrainConfig
from .grounder_training import GrounderStage
from .loop import Stage, pairs_of_a_step, train_step
from .model import TCL
from .start import Facts, new_model, start_from_checkpoint, start_from_clip, world_facts
from .train import grounder_batches, require_one_process

_BYTES = 4  # weights, gradients and AdamW's two moments are float32 in every precision
_MOMENTS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEstimate:
    """What one stage needs.

    stage: "clip" or "grounder".
    steps, pairs: steps in all, and pairs a step takes over all processes.
    learned, frozen: parameters, when all that ever learns does.
    fixed_bytes: for weights, gradients and AdamW's moments.
    peak_bytes: the most this process used, with one whole step: CUDA's memory, or the process's resident set.
    step_s: one step after a first one, in seconds; decoder and block of the grounder learning.
    """

    stage: str
    steps: int
    pairs: int
    learned: int
    frozen: int
    fixed_bytes: int
    peak_bytes: int
    step_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """What `dry_run` found.

    config: the resolved configuration. device: where it was tried. stages: in their order.
    """

    config: dict[str, Any]
    device: str
    stages: tuple[StageEstimate, ...]


def dry_run(config: TrainConfig) -> DryRun:
    """Build everything, take two steps of every stage with real data, and time the second; nothing is kept.

    Over several processes (torchrun) every process calls it; each tells of itself.

    Raises:
        ConfigError, CheckpointError, InputError: as the run itself would.
        TrainingError: a loss is not finite.
    """
    arithmetic = Arithmetic(config.device, config.precision)
    stages = []
    if config.world_clip is not None and not config.clip_checkpoint and not config.checkpoint:
        stages.append(_estimate(_clip_stage(config, arithmetic), first_step=0))
    model, facts = _start(config)
    batches = grounder_batches(config, facts.tokenizer(model.config.clip.context_length))
    settings = config.grounder_training
    stage = GrounderStage(settings, config.grounder, config.losses, model, batches, arithmetic)
    last = min(config.grounder.decoder_only_steps, settings.steps - 1)
    stages.append(_estimate(stage, first_step=last))
    return DryRun(config=config.to_dict(), device=str(arithmetic.device), stages=tuple(stages))


def _start(config: TrainConfig) -> tuple[TCL, Facts]:
    """The model that the grounder stage would begin with; a CLIP that is still to be trained has random weights."""
    if config.checkpoint:
        return start_from_checkpoint(config)
    if config.world_clip is None or config.clip_checkpoint:
        return start_from_clip(config)
    sizes, _ = config.world_clip
    return new_model(config, sizes, build_clip(sizes)), world_facts()


def _clip_stage(config: TrainConfig, arithmetic: Arithmetic) -> ClipStage:
    require_one_process()
    assert config.world_clip is not None  # called where there is one
    assert config.world is not None
    sizes, settings = config.world_clip
    batches = WorldBatches(config.world, world_facts().tokenizer(sizes.context_length), settings.batch_size)
    return ClipStage(settings, config.world, config.curriculum, build_clip(sizes), batches, arithmetic)


def _estimate(stage: Stage, *, first_step: int) -> StageEstimate:
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            started = time.perf_counter()
            train_step(stage, first_step, Path(folder))
            if stage.arithmetic.device.type == "cuda":
                torch.cuda.synchronize(stage.arithmetic.device)
            step_s = time.perf_counter() - started
    learned, frozen = _parameters(stage.model)
    return StageEstimate(
        stage=stage.name,
        steps=stage.settings.steps,
        pairs=pairs_of_a_step(stage.settings),
        learned=learned,
        frozen=frozen,
        fixed_bytes=_BYTES * (learned + frozen) + _BYTES * learned * (1 + _MOMENTS),
        peak_bytes=stage.arithmetic.peak_memory_bytes,
        step_s=step_s,
    )


def _parameters(model: nn.Module) -> tuple[int, int]:
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return counts[True], counts[False]
