"""The training loop: steps, learning rate, log, and checkpoints that an interrupted run continues from bit for bit."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tclkit.runtime.errors import CheckpointError, TrainingError
from tclkit.runtime.files import atomic_file

from .batches import Batches
from .config import StageConfig
from .distributed import current_place, gather_values, mean_over_processes
from .schedule import learning_rate

_LOG_EVERY = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainProgress:
    """What a progress display needs after each step.

    stage: "clip", "grounder", "threshold" or "evaluation"; step, steps: done and in all; losses: of this step.
    """

    stage: str
    step: int
    steps: int
    losses: Mapping[str, float]


ProgressCallback = Callable[[TrainProgress], None]


class Stage(Protocol):
    """One thing to optimise."""

    @property
    def name(self) -> str:
        """In file names and progress."""

    @property
    def settings(self) -> StageConfig:
        """Steps and learning rate."""

    @property
    def model(self) -> nn.Module:
        """What learns."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the model's parameters."""

    @property
    def batches(self) -> Batches:
        """Where the data come from, and how far they have been read."""

    def losses(self, step: int) -> dict[str, torch.Tensor]:
        """Compute the losses of a step on its next batch; their sum is minimised."""

    def after_step(self) -> None:
        """Put parameters back into bounds after an update."""


def run_stage(
    stage: Stage,
    run_folder: Path,
    *,
    fingerprint: Mapping[str, Any],
    save_every: int,
    progress: ProgressCallback | None = None,
) -> None:
    """Optimise a stage to its end, from its last checkpoint when the folder holds one.

    Over several processes the first one writes and reports, and all read the same folder.

    Args:
        stage: what to optimise; its model holds the result.
        run_folder: gets last-NAME.pt every `save_every` steps and a line of log.jsonl every ten.
        fingerprint: plain values that decide the outcome; a checkpoint of others is refused.
        save_every: steps between checkpoints.
        progress: called after every step.

    Raises:
        CheckpointError: the folder holds a checkpoint of another configuration.
        TrainingError: a loss is not finite.
    """
    path = run_folder / f"last-{stage.name}.pt"
    step = _restore(stage, path, fingerprint) if path.exists() else 0
    while step < stage.settings.steps:
        values = _step(stage, step)
        step += 1
        first = current_place().is_first
        if progress and first:
            progress(TrainProgress(stage=stage.name, step=step, steps=stage.settings.steps, losses=values))
        if first and (step % _LOG_EVERY == 0 or step == stage.settings.steps):
            _log(run_folder / "log.jsonl", {"stage": stage.name, "step": step, "time": time.time(), **values})
        if step % save_every == 0 or step == stage.settings.steps:
            _save(stage, path, step, fingerprint)


def _step(stage: Stage, step: int) -> dict[str, float]:
    settings = stage.settings
    lr = learning_rate(
        step,
        base_lr=settings.lr,
        min_lr=settings.min_lr,
        warmup_steps=settings.warmup_steps,
        total_steps=settings.steps,
    )
    for group in stage.optimizer.param_groups:
        group["lr"] = lr
    losses = stage.losses(step)
    total = torch.stack(list(losses.values())).sum()
    values = mean_over_processes(losses)
    if not math.isfinite(sum(values.values())):
        raise TrainingError(
            f"the losses of {stage.name} step {step} are {values}: not finite. "
            "Lower lr or clip_grad, or train with precision=fp32; run again to go on from the last checkpoint.",
            losses=values,
        )
    stage.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(total)
    learned = [p for p in stage.model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(learned, stage.settings.clip_grad)
    stage.optimizer.step()
    stage.after_step()
    return {**values, "total": mean_over_processes({"total": total})["total"], "grad_norm": norm.item(), "lr": lr}


def _save(stage: Stage, path: Path, step: int, fingerprint: Mapping[str, Any]) -> None:
    place, positions = current_place(), gather_values(stage.batches.position)
    if not place.is_first:
        return
    state = {
        "step": step,
        "position": positions if place.count > 1 else positions[0],
        "model": stage.model.state_dict(),
        "optimizer": stage.optimizer.state_dict(),
        "random_state": torch.get_rng_state(),
        "fingerprint": json.dumps(fingerprint, sort_keys=True),
    }
    with atomic_file(path) as temporary:
        torch.save(state, temporary)


def _restore(stage: Stage, path: Path, fingerprint: Mapping[str, Any]) -> int:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{path} cannot be read ({error}); delete it to begin this stage anew") from error
    if state["fingerprint"] != json.dumps(fingerprint, sort_keys=True):
        raise CheckpointError(
            f"{path} was made with another configuration; choose another run folder, or --resume never to begin anew"
        )
    stage.model.load_state_dict(state["model"])
    stage.optimizer.load_state_dict(state["optimizer"])
    place = current_place()
    stage.batches.position = state["position"][place.rank] if place.count > 1 else state["position"]
    torch.set_rng_state(state["random_state"])
    return int(state["step"])


def _log(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
