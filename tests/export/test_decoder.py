"""Every form of the decoder against the block it rewrites, in float64 and in float32, and how little work each does."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tclkit.export import decoder
from tclkit.export.decoder import (
    DECODER_FORMS,
    DIFFERENCES,
    WINOGRAD2,
    WINOGRAD4,
    DecoderForm,
    TileScheme,
    upsampling_block,
)
from tclkit.runtime.errors import ConfigError
from tclkit.tcl import TCL
from tclkit.tcl.batches import images_to_tensor
from tclkit.tcl.grounder import UpsamplingBlock
from tclkit.tcl.model import normalize

FOLDED = 1e-12  # measured 5.9e-15: the folded algebra in float64
SINGLE = 2e-5  # measured 2.9e-6 on values up to 4.4: winograd4, whose transforms multiply by up to 8
FEATURES = 2e-6  # measured 1.1e-6, unit vectors
SCHEMES = {"differences": DIFFERENCES, "winograd2": WINOGRAD2, "winograd4": WINOGRAD4}
GRIDS = [(6, 4), (5, 7), (3, 3), (1, 2), (2, 1), (1, 1)]


@pytest.fixture(scope="module")
def block() -> UpsamplingBlock:
    """A block whose every part counts, in float32."""
    torch.manual_seed(0)
    made = UpsamplingBlock(12)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made.requires_grad_(False)


def largest_difference(block: UpsamplingBlock, form: DecoderForm, x_BChw: Tensor) -> float:
    rewritten = upsampling_block(block, form).to(x_BChw.dtype)
    expected = block.to(x_BChw.dtype)(x_BChw)
    found = rewritten(x_BChw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert found.shape == expected.shape
    return float((found - expected).detach().abs().max())


def random_map(grid: tuple[int, int], dtype: torch.dtype, batch: int = 2) -> Tensor:
    return torch.randn(batch, 12, *grid, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("form", DECODER_FORMS)
def test_every_form_is_exact_in_float64(block: UpsamplingBlock, form: DecoderForm, grid: tuple[int, int]) -> None:
    x_BChw = random_map(grid, torch.float64)
    assert largest_difference(block.double(), form, x_BChw) < FOLDED


@pytest.mark.parametrize("form", DECODER_FORMS)
def test_float32_rounds_little(block: UpsamplingBlock, form: DecoderForm) -> None:
    assert largest_difference(block.float(), form, random_map((9, 10), torch.float32)) < SINGLE


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_scheme_is_its_convolution_on_one_axis(scheme: TileScheme) -> None:
    sums, outputs = (_product(steps) for steps in (scheme.sums, scheme.outputs))
    taps, window = np.array([0.3, -1.1, 0.7]), np.random.default_rng(0).standard_normal(scheme.window)
    values = (sums @ window)[list(scheme.reads)]
    found = outputs @ (np.array(scheme.taps) @ taps * values)
    seen = window if not scheme.repeats else np.repeat(window, 2)
    np.testing.assert_allclose(found, np.convolve(seen, taps[::-1], "valid"), rtol=0, atol=1e-12)
    assert (outputs[:, scheme.steady] == 1).all()


@pytest.mark.parametrize(("form", "products"), [("differences", 25 / 4), ("winograd2", 16 / 4), ("winograd4", 36 / 16)])
def test_how_many_products_a_place_takes(form: str, products: float) -> None:
    scheme = SCHEMES[form]
    assert len(scheme.reads) ** 2 / scheme.stride**2 == products


def test_only_winograd4_multiplies_while_it_transforms() -> None:
    factors = {
        name: {abs(f) for step in (*scheme.sums, *scheme.outputs) for row in step for f in row}
        for name, scheme in SCHEMES.items()
    }
    assert factors == {"differences": {0, 1}, "winograd2": {0, 1}, "winograd4": {0, 1, 2, 4, 8}}


@pytest.mark.parametrize("form", DECODER_FORMS)
def test_rewriting_leaves_the_block_and_the_random_state_alone(block: UpsamplingBlock, form: DecoderForm) -> None:
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    state = torch.random.get_rng_state()
    with torch.no_grad():
        for parameter in upsampling_block(block, form).parameters():
            parameter.zero_()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("form", DECODER_FORMS)
def test_features_of_every_form(make_model: Callable[..., TCL], form: DecoderForm, blocks: int) -> None:
    from tclkit.export.wrapper import ImageGraph

    model = make_model(decoder_blocks=blocks)
    image = np.random.default_rng(0).integers(0, 256, (2, 48, 80, 3), dtype=np.uint8)  # a grid of 3 x 5
    with torch.no_grad():
        expected = normalize(model.image_features(images_to_tensor(image)).grounded_BDhw, 1)
        found = ImageGraph(model, (48, 80), decoder=form)(torch.from_numpy(image))[0]
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < FEATURES


def test_an_unknown_form_is_named(block: UpsamplingBlock) -> None:
    with pytest.raises(ConfigError, match="unknown form of the decoder 'fastest'; choose direct, phases, differences"):
        upsampling_block(block, "fastest")  # type: ignore[arg-type]


def test_a_gate_folds_into_its_convolution(block: UpsamplingBlock) -> None:
    branch = block.double().conv1
    x = random_map((6, 5), torch.float64, batch=1)
    convolution = decoder._PlainConv(branch)
    found = convolution(torch.nn.functional.gelu(branch.norm(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert float((found - branch(x)).detach().abs().max()) < FOLDED


def _product(steps: tuple[tuple[tuple[float, ...], ...], ...]) -> np.ndarray:
    total = np.array(steps[0])
    for step in steps[1:]:
        total = np.array(step) @ total
    return total
