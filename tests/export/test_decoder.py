"""Every tile scheme against the convolution it stands for, and how little work each does."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from tclkit.export.decoder import (
    DECODER_FORMS,
    DIFFERENCES,
    WINOGRAD,
    WINOGRAD2,
    WINOGRAD4,
    Rows,
    TileScheme,
    require_known_form,
)
from tclkit.runtime.errors import ConfigError

EXACT = 1e-12  # measured 1.8e-15 on one axis, 7.1e-15 on two, in float64
SCHEMES = {"differences": DIFFERENCES, "winograd2": WINOGRAD2, "winograd4": WINOGRAD4}


def product(steps: tuple[Rows, ...]) -> NDArray[np.float64]:
    total = np.array(steps[0], np.float64)
    for step in steps[1:]:
        total = np.array(step) @ total
    return total


def convolved(map_hw: NDArray[np.float64], taps_kk: NDArray[np.float64]) -> NDArray[np.float64]:
    windows = np.lib.stride_tricks.sliding_window_view(map_hw, taps_kk.shape)
    return np.einsum("hwij,ij->hw", windows, taps_kk)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_scheme_is_its_convolution_on_one_axis(scheme: TileScheme) -> None:
    sums, outputs = (product(steps) for steps in (scheme.sums, scheme.outputs))
    taps, window = np.array([0.3, -1.1, 0.7]), np.random.default_rng(0).standard_normal(scheme.window)
    values = (sums @ window)[list(scheme.reads)]
    found = outputs @ (np.array(scheme.taps) @ taps * values)
    seen = window if not scheme.repeats else np.repeat(window, 2)
    np.testing.assert_allclose(found, np.convolve(seen, taps[::-1], "valid"), rtol=0, atol=EXACT)
    assert (outputs[:, scheme.steady] == 1).all()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_scheme_is_its_convolution_on_two_axes(scheme: TileScheme) -> None:
    random, taps = np.random.default_rng(1), np.array(scheme.taps)
    weight_kk, window = random.standard_normal((3, 3)), random.standard_normal((scheme.window, scheme.window))
    sums, outputs = (product(steps) for steps in (scheme.sums, scheme.outputs))
    values = (sums @ window @ sums.T)[np.ix_(scheme.reads, scheme.reads)]
    found = outputs @ (taps @ weight_kk @ taps.T * values) @ outputs.T
    seen = window if not scheme.repeats else window.repeat(2, 0).repeat(2, 1)
    np.testing.assert_allclose(found, convolved(seen, weight_kk), rtol=0, atol=EXACT)


def test_what_repetition_would_have_put_at_the_outputs() -> None:
    window = np.arange(DIFFERENCES.window)
    assert np.array_equal(window[list(DIFFERENCES.repeats)], np.repeat(window, 2)[1:-1])


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


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 28, 56])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_tiles_cover_an_axis_and_no_more(scheme: TileScheme, length: int) -> None:
    finer = scheme.size / scheme.stride
    assert scheme.count_tiles(length) == math.ceil((finer * length + scheme.lead) / scheme.size)


def test_the_forms_that_tile_the_second_convolution() -> None:
    assert dict(WINOGRAD) == {"winograd2": WINOGRAD2, "winograd4": WINOGRAD4}
    assert set(WINOGRAD) < set(DECODER_FORMS)


@pytest.mark.parametrize("form", ["fastest", "", "Direct"])
def test_an_unknown_form_is_named(form: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown form of the decoder '{form}'; choose direct, phases, differences"):
        require_known_form(form)
