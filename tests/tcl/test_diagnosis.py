import torch

from tclkit.tcl.batches import Batch
from tclkit.tcl.diagnosis import diagnosis, save_batch


def test_all_that_is_not_finite_is_named():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(5)))
    with torch.no_grad():
        for layer in model:
            layer.bias.fill_(float("nan"))
    model[0].weight.grad = torch.full((2, 2), float("inf"))
    images = torch.zeros(3, 3, 2, 2)
    images[1, 0, 0, 0] = float("inf")
    said = diagnosis(model, Batch(images, torch.zeros(3, 4, dtype=torch.int64)))
    assert "among the weights: 0.bias, 1.bias, 2.bias and 2 more." in said
    assert "among the gradients: 0.weight." in said
    assert "among the images of the batch: 1." in said
    assert "0..inf" in said


def test_what_is_sound_is_said_to_be():
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.bias[0] = -7.5
    said = diagnosis(model, None)
    assert said == "All weights are finite. The largest weight is 7.5, in bias. All gradients are finite."


def test_a_batch_is_kept_and_none_is_not(tmp_path):
    save_batch(tmp_path / "none.pt", None, 3)
    save_batch(tmp_path / "batch.pt", Batch(torch.ones(1, 3, 2, 2), torch.tensor([[5]])), 3)
    assert [path.name for path in tmp_path.iterdir()] == ["batch.pt"]
    kept = torch.load(tmp_path / "batch.pt", weights_only=True)
    assert (kept["step"], kept["token_ids_BL"].tolist()) == (3, [[5]])
