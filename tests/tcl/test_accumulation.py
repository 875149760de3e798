"""A batch in parts against the same batch at once; over processes see test_distributed.py."""

import numpy as np
import pytest
import torch

from tclkit.runtime.errors import InputError
from tclkit.tcl import TCL, LossWeights
from tclkit.tcl.accumulation import Accumulation
from tclkit.tcl.arithmetic import Arithmetic
from tclkit.tcl.batches import Batch, joined


@pytest.fixture
def batch(arrays) -> Batch:
    data = arrays("train_B4.npz")
    return Batch(torch.from_numpy(data["image"]), torch.from_numpy(data["tokens"]))


def parts_of(batch: Batch, count: int) -> list[Batch]:
    pairs = zip(batch.images_BCHW.chunk(count), batch.token_ids_BL.chunk(count), strict=True)
    return [Batch(images, ids) for images, ids in pairs]


def gradients(model: TCL) -> dict[str, np.ndarray]:
    found = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    "weights",
    [LossWeights(), LossWeights(tile=3), LossWeights(image_level=False), LossWeights(feature_level=False, tile=2)],
    ids=["direct", "tiles", "without the image level", "without the feature level"],
)
@pytest.mark.parametrize("stage", ["decoder", "full"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_batch_in_parts_has_its_own_losses_and_gradients(official_model, batch, check, weights, stage, count):
    model = official_model.train()
    model.train_stage(stage)
    torch.manual_seed(3)
    losses = model(batch.images_BCHW, batch.token_ids_BL, weights=weights)
    sum(losses.values()).backward()
    wanted = gradients(model)
    accumulation = Accumulation(model, weights, Arithmetic())
    torch.manual_seed(3)
    found = accumulation.losses(parts_of(batch, count))
    assert found.keys() == losses.keys()
    for name, loss in found.items():
        check("losses", loss, losses[name])
    accumulation.backward(sum(found.values()))
    ours = gradients(model)
    assert ours.keys() == wanted.keys()
    for name, gradient in ours.items():
        check("gradients", gradient, wanted[name])


def test_a_scaled_loss_scales_the_gradients(official_model, batch, check):
    model = official_model.train()
    found = {}
    for factor in (1.0, 1024.0):
        accumulation = Accumulation(model, LossWeights(), Arithmetic())
        torch.manual_seed(3)
        accumulation.backward(factor * sum(accumulation.losses(parts_of(batch, 2)).values()))
        found[factor] = {name: gradient / factor for name, gradient in gradients(model).items()}
    for name, gradient in found[1024.0].items():
        check("gradients", gradient, found[1.0][name])


def test_parts_are_contrasted_with_each_other(official_model, batch):
    """Else accumulation would train with small batches: losses of the parts for themselves are lower."""
    model = official_model.train()
    torch.manual_seed(3)
    together = Accumulation(model, LossWeights(), Arithmetic()).losses(parts_of(batch, 2))["tcli_loss"]
    alone = [model(part.images_BCHW, part.token_ids_BL)["tcli_loss"] for part in parts_of(batch, 2)]
    assert together > max(alone)


def test_faults_of_the_reference_are_refused(official_model):
    with pytest.raises(InputError, match="set accumulate to 1"):
        Accumulation(official_model, LossWeights(reference_bugs=True), Arithmetic())


def test_shorter_texts_are_padded_when_parts_are_joined():
    images = torch.zeros(1, 3, 2, 2)
    one = joined([Batch(images, torch.tensor([[7, 9]])), Batch(images, torch.tensor([[7, 8, 9]]))])
    assert one.token_ids_BL.tolist() == [[7, 9, 0], [7, 8, 9]]
    assert len(one.images_BCHW) == 2
