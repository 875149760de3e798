"""The training loop: steps, learning rate, log, and checkpoints that an interrupted run continues from bit for bit."""

import hashlib
import json
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tclkit.runtime.errors import CheckpointError, TrainingError, TrainingStoppedError
from tclkit.runtime.files import atomic_file

from ._torch_archive import require_whole
from .arithmetic import Arithmetic
from .batches import Batch, Batches
from .config import StageConfig
from .diagnosis import diagnosis, save_batch
from .distributed import current_place, gather_values, mean_over_processes
from .journal import add_to_journal, cut_journal
from .moving_average import MovingAverage
from .schedule import learning_rate, scaled_learning_rate
from .stopping import StopRequest

_LOG_EVERY = 10
_STOP = "stop"
# A gradient that is not finite even so is no overflow of fp16. Source: fairseq's min_loss_scale.
_LEAST_LOSS_SCALE = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainProgress:
    """What a progress display needs after each step.

    stage: "clip" or "grounder", whose steps are optimiser steps; "threshold" or "evaluation", whose steps are scenes.
    step, steps: done and in all; losses: of this step.
    pairs: that the step took over all processes; memory_bytes: the most used so far. 0 where it means nothing.
    """

    stage: str
    step: int
    steps: int
    losses: Mapping[str, float]
    pairs: int = 0
    memory_bytes: int = 0


ProgressCallback = Callable[[TrainProgress], None]
StepCallback = Callable[[int, Mapping[str, float]], None]
"""Called as callback(steps done, losses and so on) on every process after each step."""


class Stage(Protocol):
    """One thing to optimise."""

    @property
    def name(self) -> str:
        """In file names and progress."""

    @property
    def frozen(self) -> str:
        """What stands before the names of tensors that never change; empty for none."""

    @property
    def settings(self) -> StageConfig:
        """Steps and learning rate."""

    @property
    def arithmetic(self) -> Arithmetic:
        """Device and precision."""

    @property
    def model(self) -> nn.Module:
        """What learns."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the model's parameters."""

    @property
    def batches(self) -> Batches:
        """Where the data come from, and how far they have been read."""

    @property
    def batch(self) -> Batch | None:
        """The last step's pairs of this process."""

    def losses(self, step: int) -> dict[str, Tensor]:
        """Compute the losses of a step on its next batch; their sum is minimised."""

    def backward(self, total: Tensor) -> None:
        """Carry the gradient of the losses' sum, which may be scaled, to the parameters."""

    def after_step(self) -> None:
        """Put parameters back into bounds after an update."""


def run_stage(
    stage: Stage,
    run_folder: Path,
    *,
    fingerprint: Mapping[str, Any],
    save_every: int,
    progress: ProgressCallback | None = None,
    before: Sequence[Callable[[int], None]] = (),
    after: Sequence[StepCallback] = (),
    average: MovingAverage | None = None,
    stop: StopRequest | None = None,
) -> None:
    """Optimise a stage to its end, from its last checkpoint when the folder holds one.

    Over several processes the first one writes and reports, and all read the same folder.

    Args:
        stage: what to optimise; its model holds the result.
        run_folder: gets last-NAME.pt every `save_every` steps and a line of log.jsonl every ten; lines of steps that
            are taken again go.
        fingerprint: plain values that decide the outcome; a checkpoint of others is refused.
        save_every: steps between checkpoints.
        progress: called after every step.
        before: called once with the steps that are done already, on every process, when the checkpoint was accepted.
        after: called after every step, on every process, before its checkpoint.
        average: of the model's weights, updated after every step and kept in the checkpoints.
        stop: asked after every step; when any process was asked to stop, all save a checkpoint and end.

    Raises:
        CheckpointError: the folder holds a checkpoint of another configuration.
        TrainingError: a loss or a gradient is not finite; the batch is kept as broken-batch-R.pt.
        TrainingStoppedError: a signal asked for it.
    """
    path = run_folder / f"last-{stage.name}.pt"
    log = run_folder / "log.jsonl"
    keeper = _Keeper(stage, path, fingerprint, average)
    step = keeper.restore() if path.exists() else 0
    if current_place().is_first:
        cut_journal(log, lambda row: row.get("stage") != stage.name or row.get("step", 0) <= step)
    for prepare in before:
        prepare(step)
    pairs = pairs_of_a_step(stage.settings)
    while step < stage.settings.steps:
        values = train_step(stage, step, run_folder, stop)
        stopped = values.pop(_STOP) > 0
        if average is not None:
            average.update()
        step += 1
        first, is_last = current_place().is_first, step == stage.settings.steps
        if progress and first:
            memory = stage.arithmetic.peak_memory_bytes
            progress(
                TrainProgress(
                    stage=stage.name,
                    step=step,
                    steps=stage.settings.steps,
                    losses=values,
                    pairs=pairs,
                    memory_bytes=memory,
                )
            )
        if first and (step % _LOG_EVERY == 0 or is_last):
            add_to_journal(log, {"stage": stage.name, "step": step, "time": time.time(), **values})
        for callback in after:
            callback(step, values)
        if step % save_every == 0 or is_last or stopped:
            keeper.save(step)
        if stopped and not is_last:
            raise stopped_error(stage.name, step, stage.settings.steps, stop)


def stopped_error(stage: str, step: int, steps: int, stop: StopRequest | None) -> TrainingStoppedError:
    """What ends a run that was asked to stop; on a process that no signal reached it counts as SIGTERM."""
    number = stop.signal_number if stop is not None and stop.signal_number else int(signal.SIGTERM)
    return TrainingStoppedError(
        f"stopped by {signal.Signals(number).name} after {stage} step {step} of {steps}; "
        "a checkpoint was written, and the same command goes on from there",
        signal_number=number,
        step=step,
    )


def pairs_of_a_step(settings: StageConfig) -> int:
    """Pairs that one step takes over all processes."""
    return settings.batch_size * settings.accumulate * current_place().count


def train_step(stage: Stage, step: int, run_folder: Path, stop: StopRequest | None = None) -> dict[str, float]:
    """Take one step.

    Args:
        stage: what learns.
        step: counted from 0; decides the learning rate.
        run_folder: gets the batch when something is not finite.
        stop: asked whether to end; the answer of all processes together is the value "stop".

    Returns:
        The losses, their sum, the gradient's norm and so on, means over the processes.

    Raises:
        TrainingError: a loss or a gradient is not finite; with fp16 a gradient only when no loss scale helps.
    """
    settings, scaler = stage.settings, stage.arithmetic.scaler
    _set_learning_rate(stage.optimizer, settings, step)
    losses = stage.losses(step)
    total = torch.stack(list(losses.values())).sum()
    asked = torch.tensor(float(stop is not None and stop.signal_number != 0))
    values = mean_over_processes({**losses, "total": total, _STOP: asked.to(total.device)})
    if not math.isfinite(values["total"]):
        raise _not_finite(stage, step, run_folder, f"the losses of {stage.name} step {step} are {_figures(values)}")
    stage.optimizer.zero_grad(set_to_none=True)
    stage.backward(scaler.scale(total))
    scaler.unscale_(stage.optimizer)
    learned = [p for p in stage.model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(learned, settings.clip_grad)
    scale_helps = scaler.is_enabled() and scaler.get_scale() > _LEAST_LOSS_SCALE  # the scaler passes the step over
    if not math.isfinite(norm.item()) and not scale_helps:
        raise _not_finite(stage, step, run_folder, f"the gradient of {stage.name} step {step} is {norm.item()}")
    scaler.step(stage.optimizer)
    scaler.update()
    stage.after_step()
    scaled = {"loss_scale": scaler.get_scale()} if scaler.is_enabled() else {}
    return {**values, "grad_norm": norm.item(), "lr": stage.optimizer.param_groups[0]["lr"], **scaled}


def _set_learning_rate(optimizer: torch.optim.Optimizer, settings: StageConfig, step: int) -> None:
    base, least = settings.lr, settings.min_lr
    if settings.scale_lr:
        base, least = (scaled_learning_rate(lr, pairs_of_a_step(settings)) for lr in (base, least))
    lr = learning_rate(step, base_lr=base, min_lr=least, warmup_steps=settings.warmup_steps, total_steps=settings.steps)
    for group in optimizer.param_groups:
        group["lr"] = lr


def _not_finite(stage: Stage, step: int, run_folder: Path, what: str) -> TrainingError:
    path = run_folder / f"broken-batch-{current_place().rank}.pt"
    save_batch(path, stage.batch, step)
    return TrainingError(
        f"{what}: not finite. {diagnosis(stage.model, stage.batch)} The batch is kept in {path}. Lower lr or "
        "clip_grad, or train with precision=fp32; run again to go on from the last checkpoint.",
        step=step,
        batch=str(path),
    )


def _figures(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != _STOP)


class _Keeper:
    """Writes and reads the checkpoint that a stage goes on from."""

    def __init__(self, stage: Stage, path: Path, fingerprint: Mapping[str, Any], average: MovingAverage | None) -> None:
        self._stage, self._path, self._average = stage, path, average
        self._fingerprint = json.dumps(fingerprint, sort_keys=True)
        self._frozen_digest = _frozen_digest(stage)

    def save(self, step: int) -> None:
        stage, place = self._stage, current_place()
        positions = gather_values(stage.batches.position)
        if not place.is_first:
            return
        scaler = stage.arithmetic.scaler
        state = {
            "step": step,
            "position": positions if place.count > 1 else positions[0],
            "model": {name: value for name, value in stage.model.state_dict().items() if not _is_frozen(stage, name)},
            "frozen": self._frozen_digest,
            "optimizer": stage.optimizer.state_dict(),
            "random_states": stage.arithmetic.random_state(),
            "fingerprint": self._fingerprint,
        }
        state |= {"scaler": scaler.state_dict()} if scaler.is_enabled() else {}
        state |= {"average": self._average.state_dict()} if self._average is not None else {}
        with atomic_file(self._path) as temporary:
            torch.save(state, temporary)

    def restore(self) -> int:
        """Put everything back to where the checkpoint was written; returns the steps done."""
        stage, path = self._stage, self._path
        try:
            require_whole(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise CheckpointError(f"{path} cannot be read ({error}); delete it to begin this stage anew") from error
        if state["fingerprint"] != self._fingerprint:
            raise CheckpointError(
                f"{path} was made with another configuration; choose another run folder, or --resume never to begin "
                "anew"
            )
        if state.get("frozen", self._frozen_digest) != self._frozen_digest:
            raise CheckpointError(
                f"{path} was made on another CLIP than the one given now; give the same, or --resume never to "
                "begin anew"
            )
        missing, unexpected = stage.model.load_state_dict(state["model"], strict=False)
        if unexpected or [name for name in missing if not _is_frozen(stage, name)]:
            raise CheckpointError(f"{path} holds other tensors than this model; --resume never begins anew")
        stage.optimizer.load_state_dict(state["optimizer"])
        place = current_place()
        stage.batches.position = state["position"][place.rank] if place.count > 1 else state["position"]
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        if stage.arithmetic.scaler.is_enabled():
            stage.arithmetic.scaler.load_state_dict(state["scaler"])
        stage.arithmetic.set_random_state(state.get("random_states") or {"cpu": state["random_state"]})
        return int(state["step"])


def _is_frozen(stage: Stage, name: str) -> bool:
    return bool(stage.frozen) and name.startswith(stage.frozen)


def _frozen_digest(stage: Stage) -> str:
    """Of all that never changes, so that a run does not go on upon another CLIP."""
    state = stage.model.state_dict()
    return digest_of_tensors({name: tensor for name, tensor in state.items() if _is_frozen(stage, name)})


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
