"""The tiled form against the direct one, in double precision; against the authors in test_training_parity.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tclkit.runtime.errors import InputError
from tclkit.tcl import tiled_losses
from tclkit.tcl.losses import pooled_similarity
from tclkit.tcl.model import normalize, similarity
from tclkit.tcl.tiled_losses import PairStatistics, pair_statistics

WIDTH = 6


def inputs(
    images: int = 3,
    texts: int = 7,
    grid: tuple[int, int] = (4, 5),
    compared: int = 1,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(images * 100 + texts)
    # As the grounder leaves it: the embedding of a cell is one piece of memory.
    embedding = torch.randn(images, *grid, WIDTH, generator=generator, dtype=dtype).permute(0, 3, 1, 2)
    return {
        "embedding": embedding.requires_grad_(),
        "text": torch.randn(texts, WIDTH, generator=generator, dtype=dtype),
        "compared": torch.randn(compared, texts, WIDTH, generator=generator, dtype=dtype),
        "scale": torch.tensor(7.0, dtype=dtype, requires_grad=True),
        "shift": torch.tensor(-1.5, dtype=dtype, requires_grad=True),
    }


def direct(given: dict[str, Tensor], first_own: int = 0) -> PairStatistics:
    embedding = given["embedding"]
    logits = similarity(embedding, given["text"]) * given["scale"] + given["shift"]
    masks = torch.sigmoid(logits)
    own = torch.arange(len(embedding), device=embedding.device)
    across, down = masks.diff(dim=-1).abs().mean(dim=(2, 3)), masks.diff(dim=-2).abs().mean(dim=(2, 3))
    return PairStatistics(
        torch.stack([pooled_similarity(embedding, masks, texts) for texts in given["compared"]]),
        masks.mean(dim=(2, 3)),
        across + down,
        logits[own, own + first_own],
    )


def tiled(given: dict[str, Tensor], tile: int, first_own: int = 0) -> PairStatistics:
    text, compared = normalize(given["text"], -1), F.normalize(given["compared"], dim=-1)
    line = given["scale"], given["shift"]
    return pair_statistics(given["embedding"], text, compared, *line, tile=tile, first_own=first_own)


def values_and_gradients(found: PairStatistics, given: dict[str, Tensor]) -> list[Tensor]:
    """The four statistics, then the gradients of a sum in which every number counts differently."""
    values = [found.similarity_KBN, found.area_BN, found.variation_BN, found.own_logits_Bhw]
    total = sum((value * torch.linspace(-1, 2, value.numel()).to(value).view_as(value)).sum() for value in values)
    gradients = torch.autograd.grad(total, [given["embedding"], given["scale"], given["shift"]])
    return [*(value.detach() for value in values), *gradients]


def largest_error(given: dict[str, Tensor], tile: int, first_own: int = 0) -> float:
    wanted = values_and_gradients(direct(given, first_own), given)
    found = values_and_gradients(tiled(given, tile, first_own), given)
    assert [x.shape for x in found] == [x.shape for x in wanted]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("tile", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("cells_at_once", [1, 1 << 18])
def test_tiles_of_any_size_give_the_direct_form(tile, cells_at_once, monkeypatch):
    monkeypatch.setattr(tiled_losses, "_CELLS_AT_ONCE_CPU", cells_at_once)
    assert largest_error(inputs(), tile) < 1e-12


@pytest.mark.parametrize(("images", "texts", "first_own"), [(1, 1, 0), (1, 5, 4), (3, 3, 0), (3, 9, 3), (3, 9, 6)])
def test_own_texts_anywhere_give_the_direct_form(images, texts, first_own):
    given = inputs(images, texts)
    for tile in (2, 4):
        assert largest_error(given, tile, first_own) < 1e-12


@pytest.mark.parametrize("grid", [(2, 2), (2, 9), (7, 3)])
def test_grids_that_are_not_square(grid):
    assert largest_error(inputs(grid=grid), 3) < 1e-12


def test_several_texts_can_be_compared_with_one_pool():
    assert largest_error(inputs(compared=3), 3) < 1e-12


def test_groups_of_images_need_not_divide_the_batch(monkeypatch):
    monkeypatch.setattr(tiled_losses, "_CELLS_AT_ONCE_CPU", 2 * 3 * 20)  # two images of 20 cells and a tile of 3
    assert largest_error(inputs(images=5), 3) < 1e-12


def test_cells_without_length_have_the_direct_gradient():
    given = inputs()
    with torch.no_grad():
        given["embedding"][0, :, 1, 2] = 0
        given["embedding"][1] = 0  # nothing to pool in a whole image
    found = values_and_gradients(tiled(given, 2), given)
    wanted = values_and_gradients(direct(given), given)
    for a, b in zip(found, wanted, strict=True):
        assert torch.isfinite(a).all()
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_contiguous_embeddings_give_the_same():
    given = inputs()
    other = {**given, "embedding": given["embedding"].detach().contiguous().requires_grad_()}
    for a, b in zip(
        values_and_gradients(tiled(given, 3), given), values_and_gradients(tiled(other, 3), other), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


def test_gradients_are_those_of_differences():
    given = inputs(images=2, texts=3, grid=(2, 3))

    def function(embedding: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        found = tiled({**given, "embedding": embedding, "scale": scale, "shift": shift}, 2)
        return found.similarity_KBN, found.area_BN, found.variation_BN, found.own_logits_Bhw

    assert torch.autograd.gradcheck(function, (given["embedding"], given["scale"], given["shift"]))


def test_half_precision_is_no_worse_than_the_direct_form():
    """Between its products the tiled form works in float32, which autocast's direct form does not."""
    given = inputs(images=4, texts=9, grid=(8, 8), dtype=torch.float32)
    exact = values_and_gradients(direct(given), given)
    with torch.autocast("cpu", torch.bfloat16):
        rough, found = direct(given), tiled(given, 4)
    assert found.area_BN.dtype == torch.float32
    errors = [
        [float((a - b).norm() / b.norm()) for a, b in zip(values_and_gradients(form, given), exact, strict=True)]
        for form in (found, rough)
    ]
    assert errors[0] != [0.0] * 7  # autocast did reach the products
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 0.02
        assert ours <= 1.5 * theirs


def test_embeddings_in_half_precision_get_gradients_of_their_type():
    given = inputs(dtype=torch.float32)
    half = {**given, "embedding": given["embedding"].detach().bfloat16().requires_grad_()}
    found = values_and_gradients(tiled(half, 3), half)
    wanted = values_and_gradients(tiled(given, 3), given)
    assert found[4].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    for a, b in zip(found, wanted, strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 0.03


class LargestTensor(TorchDispatchMode):
    """Sees every tensor that an operator makes, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return made


def test_no_tensor_grows_with_pairs_of_images_and_texts(monkeypatch):
    monkeypatch.setattr(tiled_losses, "_CELLS_AT_ONCE_CPU", 1)
    largest = {}
    for texts in (16, 64):
        given = inputs(images=16, texts=texts, grid=(4, 4), dtype=torch.float32)
        with LargestTensor() as seen:
            values_and_gradients(tiled(given, 4), given)
        largest[texts] = seen.numel
    assert largest[16] == largest[64] == given["embedding"].numel()


def test_only_the_inputs_are_kept_for_the_backward_pass():
    kept: list[int] = []
    given = inputs(images=2, texts=50)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        tiled(given, 5)
    text = given["text"].numel()
    assert sorted(kept) == sorted([given["embedding"].numel(), 1, 1, text, text])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tile": 0}, "tile must be 1 or more"),
        ({"first_own": 5}, "the own texts of 3 images cannot begin at 5 of 7"),
        ({"first_own": -1}, "cannot begin at -1"),
        ({"text_ND": torch.zeros(7, 5)}, "for embeddings of width 6 texts must be"),
        ({"compared_KND": torch.zeros(1, 6, 6)}, "those to compare with"),
        ({"text_ND": torch.zeros(7, 6, requires_grad=True)}, "texts are not learned here"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    given = inputs(dtype=torch.float32)
    arguments = {
        "embedding_BDhw": given["embedding"],
        "text_ND": given["text"],
        "compared_KND": given["compared"],
        "scale": given["scale"],
        "shift": given["shift"],
        "tile": 2,
        **changes,
    }
    with pytest.raises(InputError, match=message):
        pair_statistics(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_a_gpu_gives_the_direct_form(autocast):
    given = {name: x.detach().cuda().requires_grad_(x.requires_grad) for name, x in inputs(dtype=torch.float32).items()}
    wanted = values_and_gradients(direct(given), given)
    with torch.autocast("cuda", autocast or torch.float16, enabled=autocast is not None):
        found = tiled(given, 3)
    for a, b in zip(values_and_gradients(found, given), wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < (2e-2 if autocast else 1e-4)
