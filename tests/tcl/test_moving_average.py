import pytest
import torch

from tclkit.tcl.moving_average import MovingAverage


@pytest.fixture
def model() -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({"clip": torch.nn.Linear(2, 2), "grounder": torch.nn.Linear(2, 2)})


def fill(model: torch.nn.ModuleDict, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_the_average_follows_and_clip_stays_out(model):
    fill(model, 0.0)
    average = MovingAverage(model, 0.75)
    fill(model, 4.0)
    average.update()
    average.update()
    with average.in_place():
        assert model["grounder"].weight.unique().tolist() == [1.75]  # 4 · (1 - 0.75²)
        assert model["clip"].weight.unique().tolist() == [4.0]
    assert model["grounder"].weight.unique().tolist() == [4.0]
    assert not [name for name in average.state_dict() if name.startswith("clip.")]


def test_the_weights_come_back_after_an_error(model):
    fill(model, 0.0)
    average = MovingAverage(model, 0.5)
    fill(model, 2.0)
    with pytest.raises(ZeroDivisionError), average.in_place():
        _ = 1 / 0
    assert model["grounder"].bias.tolist() == [2.0, 2.0]


def test_an_average_goes_on_where_it_was(model):
    fill(model, 1.0)
    one = MovingAverage(model, 0.5)
    fill(model, 3.0)
    one.update()
    other = MovingAverage(model, 0.5)
    other.load_state_dict(one.state_dict())
    for average in (one, other):
        average.update()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
