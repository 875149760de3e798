"""Learning rate and weight decay."""

import pytest
import torch
from torch import nn

from tclkit.runtime.errors import ConfigError
from tclkit.tcl.schedule import is_decayed, learning_rate, parameter_groups, scaled_learning_rate


def test_published_schedule(arrays, check):
    data = arrays("lr_schedule_official.npz")
    assert scaled_learning_rate(3e-4, int(data["world_batch"])) == pytest.approx(float(data["base_lr"]))
    recipe = {"base_lr": float(data["base_lr"]), "min_lr": float(data["min_lr"])}
    for step, theirs in zip(data["step"], data["lr"], strict=True):
        check("learning rate", learning_rate(int(step), **recipe, warmup_steps=15000, total_steps=50000), theirs)


def test_no_warmup_starts_at_the_peak_and_the_end_is_kept():
    course = [learning_rate(step, base_lr=1.0, min_lr=0.1, warmup_steps=0, total_steps=4) for step in range(7)]
    assert course[0] == 1.0
    assert course[4:] == pytest.approx([0.1, 0.1, 0.1])
    assert course == sorted(course, reverse=True)


@pytest.mark.parametrize(("step", "warmup", "total"), [(-1, 0, 4), (0, 4, 4), (0, -1, 4), (0, 0, 0)])
def test_impossible_steps_are_refused(step, warmup, total):
    with pytest.raises(ConfigError, match="warmup_steps < total_steps"):
        learning_rate(step, base_lr=1.0, min_lr=0.1, warmup_steps=warmup, total_steps=total)


@pytest.mark.parametrize(
    ("name", "shape", "decayed"),
    [("a.weight", (2, 2), True), ("ln.weight", (2,), False), ("gate", (), True), ("conv.bias", (2, 2), False)],
)
def test_what_decays(name, shape, decayed):
    assert is_decayed(name, nn.Parameter(torch.zeros(shape))) is decayed


def test_frozen_parameters_are_known_to_the_optimiser():
    model = nn.Linear(2, 2)
    model.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [1, 1]
