"""One step of the loop."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tclkit.runtime.errors import TrainingError
from tclkit.tcl.arithmetic import Arithmetic
from tclkit.tcl.config import load_config
from tclkit.tcl.loop import train_step


def stage_of(precision: str, factor: float) -> Any:
    """A weight whose loss is always 0 and whose gradient is that of sqrt(factor * weight) at 0 where factor is 0."""
    model = torch.nn.Linear(2, 1, bias=False)
    return SimpleNamespace(
        name="grounder",
        batch=None,
        settings=load_config("tcl-shapes").grounder_training,
        arithmetic=Arithmetic("cpu", precision),
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        losses=lambda step: {"loss": torch.sqrt((model.weight * factor).abs().sum())},
        backward=lambda total: total.backward(),
        after_step=lambda: None,
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_that_is_never_finite_ends_the_run(precision: str, tmp_path: Path) -> None:
    stage = stage_of(precision, 0.0)
    before = stage.model.weight.detach().clone()
    for _ in range(0 if precision == "fp32" else 30):  # a scale of 65536 is halved until none is left to blame
        train_step(stage, 3, tmp_path)
    with pytest.raises(TrainingError, match="gradient of grounder step 3 is nan"):
        train_step(stage, 3, tmp_path)
    assert torch.equal(stage.model.weight, before)
    train_step(stage_of(precision, 1.0), 3, tmp_path)
