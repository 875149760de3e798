"""Every form of the decoder against the direct graph it is made from, in float64 and float32, and against torch."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from tclkit.export.decoder import DECODER_FORMS, DecoderForm
from tclkit.export.decoder_graph import rewrite_decoder
from tclkit.export.graph_rules import check_graph
from tclkit.export.layers import quantizable_layers
from tclkit.export.onnx_graphs import write_image_graph
from tclkit.export.wrapper import ImageGraph
from tclkit.runtime.errors import ConfigError, ExportError
from tclkit.tcl import TCL
from tclkit.tcl.batches import images_to_tensor
from tclkit.tcl.model import normalize

from .decoder_models import ORDERS, decoder_graph, evaluate
from .precision_models import run, sample_images, shipped_graph

FOLDED = 1e-12  # measured 1.2e-14 on values up to 8.9: the folded algebra in float64
SINGLE = 2e-5  # measured 9.1e-6 on values up to 6.1: winograd4, whose transforms multiply by up to 8
FEATURES = 2e-6  # measured 1.1e-6, unit vectors
OTHER_FORMS = [form for form in DECODER_FORMS if form != "direct"]
GRIDS = [(6, 4), (5, 7), (3, 3), (1, 2), (2, 1), (1, 1)]
LAYERS = {"direct": 4, "phases": 4, "differences": 2 * (25 + 1), "winograd2": 2 * (25 + 16), "winograd4": 2 * (25 + 36)}
PRODUCTS = {"direct": 72.0, "phases": 52.0, "differences": 42.25, "winograd2": 22.25, "winograd4": 15.25}


def random_map(grid: tuple[int, int], dtype: Any = np.float64, width: int = 6, batch: int = 2) -> Any:
    return np.random.default_rng(1).standard_normal((batch, width, *grid)).astype(dtype)


def largest_difference(found: list[Any], expected: list[Any]) -> float:
    assert [array.shape for array in found] == [array.shape for array in expected]
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("form", DECODER_FORMS)
def test_every_form_is_exact_in_float64(form: DecoderForm, grid: tuple[int, int]) -> None:
    model, x = decoder_graph(grid), random_map(grid)
    rewritten = rewrite_decoder(model, form)
    assert largest_difference(evaluate(rewritten, x), evaluate(model, x)) < FOLDED


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("form", OTHER_FORMS)
def test_any_number_of_blocks_in_any_order_of_axes(form: DecoderForm, order: str, blocks: int) -> None:
    model, x = decoder_graph((2, 3), blocks=blocks, order=order), random_map((2, 3))
    rewritten = rewrite_decoder(model, form)
    check_graph(rewritten, where=form)
    assert largest_difference(evaluate(rewritten, x), evaluate(model, x)) < FOLDED


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_tokens_are_laid_out_without_a_transposition(form: DecoderForm) -> None:
    model = decoder_graph((4, 3), tokens=True)
    tokens_BLC = np.random.default_rng(1).standard_normal((2, 12, 6))
    rewritten = rewrite_decoder(model, form)
    assert largest_difference(evaluate(rewritten, tokens_BLC), evaluate(model, tokens_BLC)) < FOLDED
    reader = next(node for node in rewritten.graph.node if "x" in node.input and node.op_type == "Reshape")
    assert numpy_helper.to_array(
        next(tensor for tensor in rewritten.graph.initializer if tensor.name == reader.input[1])
    ).tolist() == [-1, 4, 3, 6]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("width", [1, 16])
@pytest.mark.parametrize("form", OTHER_FORMS)
def test_float32_rounds_little(form: DecoderForm, width: int, batch: int) -> None:
    model = decoder_graph((9, 10), width=width, dtype=np.float32)
    feeds = {"x": random_map((9, 10), np.float32, width, batch)}
    assert largest_difference(run(rewrite_decoder(model, form), feeds), run(model, feeds)) < SINGLE


@pytest.mark.parametrize("blocks", [1, 3])
def test_features_against_torch(make_model: Callable[..., TCL], blocks: int, tmp_path: Path) -> None:
    model = make_model(decoder_blocks=blocks)
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 80, 3), dtype=np.uint8)  # a grid of 3 x 5
    with torch.no_grad():
        expected = normalize(model.image_features(images_to_tensor(images)).grounded_BDhw, 1).numpy()
    write_image_graph(ImageGraph(model, (48, 80)), tmp_path / "direct.onnx")
    direct = onnx.load(tmp_path / "direct.onnx")
    for form in DECODER_FORMS:
        rewritten = rewrite_decoder(direct, form)
        check_graph(rewritten, where=form)
        assert largest_difference(run(rewritten, {"image": images})[:1], [expected]) < FEATURES, form


@pytest.mark.parametrize("form", DECODER_FORMS)
def test_the_shipped_graph(form: DecoderForm) -> None:
    direct, feeds = shipped_graph(), {"image": sample_images(2)}
    rewritten = rewrite_decoder(direct, form)
    assert [value.name for value in rewritten.graph.output] == ["grounded", "kp"]
    assert (rewritten.graph.input[0], rewritten.ir_version) == (direct.graph.input[0], direct.ir_version)
    assert largest_difference(run(rewritten, feeds), run(direct, feeds)) < FEATURES
    layers = [layer for layer in quantizable_layers(rewritten) if layer.is_decoder]
    assert Counter(layer.block for layer in layers) == dict.fromkeys(
        ("grounder.decoder.0", "grounder.decoder.1"), LAYERS[form] // 2
    )  # by name, as the quantiser's tiers know them
    assert len({layer.name for layer in layers}) == len(layers)
    cells, width = 16 * 16 + 32 * 32, 128
    assert sum(layer.multiplications for layer in layers) == pytest.approx(PRODUCTS[form] * cells * width**2, rel=0.2)


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_nothing_is_left_of_the_old_form(form: DecoderForm) -> None:
    rewritten = rewrite_decoder(shipped_graph(), form)
    counts = Counter(node.op_type for node in rewritten.graph.node)
    convs = {"phases": 4, "differences": 2}.get(form, 0)
    assert counts["Conv"] == 1 + convs  # the patch embedding's
    assert counts["Resize"] == (2 if form == "phases" else 0)
    read = {name for node in rewritten.graph.node for name in node.input}
    made = [name for node in rewritten.graph.node for name in node.output]
    assert {tensor.name for tensor in rewritten.graph.initializer} <= read
    assert set(made) - read == {"grounded", "kp"}
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("form", DECODER_FORMS)
def test_the_given_graph_is_not_changed_nor_shared(form: DecoderForm) -> None:
    model = shipped_graph()
    before = model.SerializeToString(deterministic=True)
    rewritten = rewrite_decoder(model, form)
    assert rewritten is not model
    del rewritten.graph.node[:]
    for tensor in rewritten.graph.initializer:
        tensor.raw_data = b""
    assert model.SerializeToString(deterministic=True) == before


def test_the_same_graph_gives_the_same_bytes() -> None:
    first, second = (rewrite_decoder(shipped_graph(), "winograd4").SerializeToString(deterministic=True) for _ in "ab")
    assert first == second


def test_weights_stored_as_float16_are_folded_and_stored_as_float32(
    make_model: Callable[..., TCL], tmp_path: Path
) -> None:
    graph = ImageGraph(make_model(decoder_blocks=1), (48, 80))
    write_image_graph(graph, tmp_path / "half.onnx", half_weights=True)
    halved = onnx.load(tmp_path / "half.onnx")
    feeds = {"image": np.random.default_rng(0).integers(0, 256, (2, 48, 80, 3), dtype=np.uint8)}
    expected = run(halved, feeds)
    for form in OTHER_FORMS:
        rewritten = rewrite_decoder(halved, form)
        check_graph(rewritten, where=form)
        types = {tensor.name: tensor.data_type for tensor in rewritten.graph.initializer}
        folded = [layer.weight for layer in quantizable_layers(rewritten) if ".conv1." in layer.name]
        assert {types[name] for name in folded} == {TensorProto.FLOAT}
        assert largest_difference(run(rewritten, feeds), expected) < FEATURES, form


def test_exporting_a_form_is_the_same_rewrite(make_model: Callable[..., TCL], tmp_path: Path) -> None:
    graph = ImageGraph(make_model(decoder_blocks=1), (32, 48))
    for form in ("direct", "winograd2"):
        write_image_graph(graph, tmp_path / f"{form}.onnx", decoder=form)  # type: ignore[arg-type]
    direct, exported = (onnx.load(tmp_path / f"{form}.onnx") for form in ("direct", "winograd2"))
    assert rewrite_decoder(direct, "winograd2") == exported


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_a_rewritten_decoder_is_not_rewritten_again(form: DecoderForm) -> None:
    rewritten = rewrite_decoder(shipped_graph(), form)
    for again in DECODER_FORMS:
        with pytest.raises(ExportError, match=r"no decoder in the direct form.*export the checkpoint again"):
            rewrite_decoder(rewritten, again)


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown form of the decoder 'fastest'; choose direct, phases, differences"):
        rewrite_decoder(shipped_graph(), "fastest")  # type: ignore[arg-type]


def test_weights_are_folded_in_float64() -> None:
    model = decoder_graph(dtype=np.float32, width=8)
    exact = onnx.ModelProto()
    exact.CopyFrom(model)
    for tensor in exact.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name != "scales":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    folded, wanted = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in rewrite_decoder(one, "winograd4").graph.initializer}
        for one in (model, exact)
    )
    products = [name for name in folded if ".products." in name]
    assert len(products) == 25 + 36
    assert all(np.array_equal(folded[name], wanted[name].astype(np.float32)) for name in products)


def test_torch_is_not_needed() -> None:
    program = "import sys, tclkit.export.decoder_graph; print([name for name in sys.modules if name == 'torch'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
