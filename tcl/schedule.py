"""How fast what learns: the learning rate's course, and which parameters decay.

Source: the authors' configs/tcl.yml and optimiser (SWIN's recipe with timm's cosine schedule).
"""

import math
from typing import Any

from torch import nn

from tclkit.runtime.errors import ConfigError

_WARMUP_START = 1e-4  # share of the peak that step 0 has
_REFERENCE_BATCH = 4096


def scaled_learning_rate(base_lr: float, global_batch: int) -> float:
    """Peak learning rate for a batch counted over all ranks: base_lr is meant for 4096 pairs."""
    return base_lr * global_batch / _REFERENCE_BATCH


def learning_rate(step: int, *, base_lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of one step: a linear rise, then half a cosine.

    Args:
        step: counted from 0.
        base_lr: peak, reached at `warmup_steps`.
        min_lr: end, reached at `total_steps` and kept.
        warmup_steps: steps of the rise, which starts at a ten-thousandth of the peak; 0 starts at the peak.
        total_steps: all steps, more than `warmup_steps`.

    Raises:
        ConfigError: the steps do not fit each other.
    """
    if step < 0 or not 0 <= warmup_steps < total_steps:
        raise ConfigError(f"need 0 <= warmup_steps < total_steps and step >= 0: {warmup_steps}, {total_steps}, {step}.")
    if step < warmup_steps:
        start = base_lr * _WARMUP_START
        return start + (base_lr - start) * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return min_lr + (base_lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to all but vectors and biases. So scalars (gates, temperatures) do decay."""
    return parameter.ndim != 1 and not name.endswith(".bias")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for a torch optimiser, decayed and not, each in the order of `named_parameters`.

    Frozen parameters are included: they have no gradient, so an optimiser passes them over, and those that a later
    stage unfreezes are already known to it.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if is_decayed(name, parameter) else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
