"""Weights in bfloat16: rounded as torch rounds, only where products take them, and half as large when exported."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from openvino import opset13

from tclkit.runtime.bfloat16_weights import bfloat16_bits, round_weights
from tclkit.runtime.openvino_backend import openvino_core


def test_rounding_is_torchs() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], np.uint32).view(np.float32)
    edges = np.array([0, -0.0, np.inf, -np.inf, 1e-42, 3.4e38], np.float32)
    for some in (values, values * 1e30, values * 1e-38, ties, edges):
        expected = torch.from_numpy(some.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(bfloat16_bits(some), expected)


def test_nan_stays_nan() -> None:
    odd = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)  # rounding up would make them infinite, or 0
    assert np.isnan(np.left_shift(bfloat16_bits(odd).astype(np.uint32), 16).view(np.float32)).all()


@pytest.fixture
def model() -> Any:
    """(1, 3, 8, 8) -> convolution -> + a map -> product with a matrix."""
    rng = np.random.default_rng(1)
    x = opset13.parameter([1, 3, 8, 8], np.float32, name="x")
    kernel = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    conv = opset13.convolution(x, opset13.constant(kernel), [1, 1], [1, 1], [1, 1], [1, 1])
    added = opset13.add(conv, opset13.constant(rng.standard_normal((1, 4, 8, 8)).astype(np.float32)))
    product = opset13.matmul(added, opset13.constant(rng.standard_normal((8, 500)).astype(np.float32)), False, False)
    return openvino.Model([product], [x], "m")


def test_weights_of_products_are_rounded_and_nothing_else(model: Any) -> None:
    assert round_weights(model) == 2
    kinds = [node.get_element_type() for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
    assert sum(kind == openvino.Type.bf16 for kind in kinds) == 2
    assert sum(kind == openvino.Type.f32 for kind in kinds) == 1
    assert round_weights(model) == 0  # they are no constants any more, but conversions of some


def test_the_model_computes_with_the_rounded_weights(model: Any, tmp_path: Path) -> None:
    image = np.random.default_rng(2).standard_normal((1, 3, 8, 8)).astype(np.float32)
    core, exact = openvino_core(), {"INFERENCE_PRECISION_HINT": "f32"}
    before = core.compile_model(model, "CPU", exact)(image)[0]
    round_weights(model)
    after = core.compile_model(model, "CPU", exact)(image)[0]
    largest = np.abs(before - after).max() / np.abs(before).max()
    assert 1e-5 < largest < 2**-7


def test_what_is_exported_is_half_as_large() -> None:
    x = opset13.parameter([1, 512], np.float32, name="x")
    weight = np.random.default_rng(3).standard_normal((512, 512)).astype(np.float32)
    sizes = []
    for rounded in (False, True):
        model = openvino.Model([opset13.matmul(x, opset13.constant(weight), False, False)], [x], "m")
        if rounded:
            round_weights(model)
        compiled = openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
        sizes.append(compiled.export_model().getbuffer().nbytes)
    assert sizes[1] < 0.6 * sizes[0]
