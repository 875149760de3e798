"""INT8 graphs: which layers, Q/DQ pairs as every runtime reads them, and balancing that is exact in float."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tclkit.export.graph_edit import element_types, replace_weights
from tclkit.export.graph_rules import check_graph
from tclkit.export.half_graph import half_graph
from tclkit.export.layers import Layer, quantizable_layers
from tclkit.export.onnx_graphs import write_image_graph
from tclkit.export.quantized_graph import quantized_graph
from tclkit.export.rounded_graph import rounded_graph
from tclkit.export.smoothing import input_channel_axis, smooth
from tclkit.export.wrapper import ImageGraph
from tclkit.runtime.errors import ExportError
from tclkit.tcl import TCL

from .decoder_models import ADDED_LAST, ORDERS, decoder_graph
from .precision_models import float_graph, run, sample_images, shipped_graph, with_outputs, with_weights


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return shipped_graph()


@pytest.fixture(scope="module")
def layers(graph: onnx.ModelProto) -> list[Layer]:
    return quantizable_layers(graph)


def activations_of(graph: onnx.ModelProto, layers: list[Layer]) -> dict[str, np.ndarray]:
    names = sorted({layer.activation for layer in layers})
    return dict(zip(names, run(with_outputs(graph, names), {"image": sample_images()}, names), strict=True))


def ranges_of(graph: onnx.ModelProto, layers: list[Layer]) -> dict[str, float]:
    return {name: float(np.abs(values).max()) for name, values in activations_of(graph, layers).items()}


def channel_maxima(graph: onnx.ModelProto, layers: list[Layer]) -> dict[str, np.ndarray]:
    maxima, values = {}, activations_of(graph, layers)
    for layer in layers:
        axis = input_channel_axis(graph, layer) % values[layer.activation].ndim
        others = tuple(i for i in range(values[layer.activation].ndim) if i != axis)
        maxima[layer.activation] = np.abs(values[layer.activation]).max(others)
    return maxima


def mean_cosine(graph: onnx.ModelProto, other: onnx.ModelProto) -> float:
    pairs = zip(*(run(one, {"image": sample_images()}) for one in (graph, other)), strict=True)
    return min(float(np.einsum("bdhw,bdhw->bhw", a, b).mean()) for a, b in pairs)


def test_layers_are_named_by_their_place_and_the_bytes_are_left_alone(layers: list[Layer]) -> None:
    names = [layer.name for layer in layers]
    assert len(names) == len(set(names)) == 3 * 4 + 2 * 3 + 4 + 2
    assert {"trunk.0.attention.qkv", "trunk.2.mlp.down", "grounder.block.value_out", "kp.projection"} <= set(names)
    assert not any("patches" in name for name in names)
    assert Counter(layer.block for layer in layers)["trunk.1"] == 4
    decoder = [layer for layer in layers if layer.is_decoder]
    assert [layer.block for layer in decoder] == ["grounder.decoder.0"] * 2 + ["grounder.decoder.1"] * 2
    # (C, C, 3, 3) on a grid of 64 x 64 for the last, and a quarter of it for the first
    assert [layer.multiplications for layer in decoder] == [128 * 128 * 9 * 32 * 32] * 2 + [128 * 128 * 9 * 64 * 64] * 2


def test_balancing_changes_nothing_in_float(graph: onnx.ModelProto, layers: list[Layer]) -> None:
    smoothed, balanced = smooth(graph, layers, channel_maxima(graph, layers), strength=0.5)
    check_graph(smoothed, where="smoothed")
    for a, b in zip(*(run(one, {"image": sample_images()}) for one in (graph, smoothed)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    weights = {w.name: numpy_helper.to_array(w) for w in graph.graph.initializer}
    changed = {w.name for w in smoothed.graph.initializer if (numpy_helper.to_array(w) != weights.get(w.name)).any()}
    assert {layer.weight for layer in layers} <= changed  # every layer was balanced
    assert balanced == layers
    assert sum(node.op_type == "Mul" for node in smoothed.graph.node) == sum("gelu" in x.activation for x in layers)


@pytest.mark.parametrize("order", ORDERS)
def test_balancing_looks_through_transpositions(order: str) -> None:
    graph = decoder_graph((5, 3), dtype=np.float32, order=order)
    layers = quantizable_layers(graph)
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 6, 5, 3)).astype(np.float32)}
    values = run(with_outputs(graph, [layer.activation for layer in layers]), feeds, [x.activation for x in layers])
    maxima = {x.activation: np.abs(value).max((0, 2, 3)) for x, value in zip(layers, values, strict=True)}
    smoothed, balanced = smooth(graph, layers, maxima)
    check_graph(smoothed, where="smoothed")
    assert [layer.name for layer in balanced] == ["grounder.decoder.0.conv1.conv", "grounder.decoder.0.conv2.conv"]
    for a, b in zip(run(graph, feeds), run(smoothed, feeds), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    outputs = [layer.activation for layer in layers]
    found = run(with_outputs(smoothed, outputs), feeds, outputs)
    for layer, value in zip(layers, found, strict=True):
        assert not np.allclose(np.abs(value).max((0, 2, 3)), maxima[layer.activation], rtol=0.01)


def test_what_others_read_as_well_is_not_balanced() -> None:
    graph = decoder_graph((5, 3), dtype=np.float32, order=ADDED_LAST)
    layers = quantizable_layers(graph)
    maxima = {layer.activation: np.ones(6, np.float32) for layer in layers}
    transposition = next(node for node in graph.graph.node if layers[0].activation in node.output)
    smoothed, balanced = smooth(with_outputs(graph, [transposition.input[0]]), layers, maxima)
    assert balanced == layers[1:]
    assert sum(node.op_type == "Mul" for node in smoothed.graph.node) == 1


def test_every_layer_of_a_new_export_is_balanced(make_model: Callable[..., TCL], tmp_path: Path) -> None:
    write_image_graph(ImageGraph(make_model(), (64, 64)), tmp_path / "image.onnx")
    graph = onnx.load(tmp_path / "image.onnx")
    layers = quantizable_layers(graph)
    feeds = {"image": np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)}
    names = [layer.activation for layer in layers]
    maxima = {}
    for layer, value in zip(layers, run(with_outputs(graph, names), feeds, names), strict=True):
        axis = input_channel_axis(graph, layer) % value.ndim
        maxima[layer.activation] = np.abs(value).max(tuple(i for i in range(value.ndim) if i != axis))
    _, balanced = smooth(graph, layers, maxima)
    assert balanced == layers


def test_outliers_ruin_plain_int8_and_balancing_saves_it(graph: onnx.ModelProto, layers: list[Layer]) -> None:
    # One channel of a norm is made 200 times larger and its row of the next weight as much smaller: the same function.
    layer = next(one for one in layers if one.name == "trunk.1.mlp.up")
    weights = {w.name: numpy_helper.to_array(w).copy() for w in graph.graph.initializer}
    maker = next(node for node in graph.graph.node if layer.activation in node.output)
    scale, shift = (weights[name] for name in maker.input[1:3])
    for values in (scale, shift):
        values[7] *= 200
    weights[layer.weight][7] /= 200
    planted = with_weights(graph, {name: weights[name] for name in (*maker.input[1:3], layer.weight)})
    assert mean_cosine(graph, planted) > 0.99999
    plain = quantized_graph(planted, [layer], ranges_of(planted, layers))
    smoothed, _ = smooth(planted, [layer], channel_maxima(planted, layers))
    balanced = quantized_graph(smoothed, [layer], ranges_of(smoothed, layers))
    assert 1 - mean_cosine(graph, plain) > 20 * (1 - mean_cosine(graph, balanced))


@pytest.mark.parametrize("halve", [False, True])
def test_int8_of_everything_is_close_on_the_shipped_model(
    graph: onnx.ModelProto, layers: list[Layer], halve: bool
) -> None:
    smoothed, _ = smooth(graph, layers, channel_maxima(graph, layers))
    quantized = quantized_graph(smoothed, layers, ranges_of(smoothed, layers))
    made = half_graph(quantized) if halve else quantized
    check_graph(made, where="int8")
    assert mean_cosine(graph, made) > 0.999
    assert made.ByteSize() < 0.33 * graph.ByteSize()


def test_pairs_are_what_tensorrt_reads(graph: onnx.ModelProto, layers: list[Layer]) -> None:
    made = half_graph(quantized_graph(graph, layers, ranges_of(graph, layers)))
    weights = {w.name: w for w in made.graph.initializer}
    types = element_types(made)
    makers = {name: node for node in made.graph.node for name in node.output}
    quantized = 0
    for node in made.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert weights[node.input[2]].data_type == TensorProto.INT8
            assert not numpy_helper.to_array(weights[node.input[2]]).any()
            assert (numpy_helper.to_array(weights[node.input[1]]) > 0).all()
        inputs = [makers.get(name) for name in node.input]
        from_int8 = [maker is not None and maker.op_type == "DequantizeLinear" for maker in inputs]
        if any(from_int8):
            assert node.op_type in ("MatMul", "Conv", "Gemm")  # never an Add, a norm, or a softmax
            assert all(from_int8[:2])
            assert types[node.output[0]] == TensorProto.FLOAT16
            quantized += 1
    assert quantized == len(layers)
    for layer in layers:
        assert numpy_helper.to_array(weights[f"{layer.weight}.int8"]).min() >= -127
        scales = weights[f"{layer.weight}.scales.half"].dims
        assert list(scales) == [weights[f"{layer.weight}.int8"].dims[layer.channel_axis]]


def test_scales_mean_the_same_in_half_precision(graph: onnx.ModelProto, layers: list[Layer]) -> None:
    made = quantized_graph(graph, layers, ranges_of(graph, layers))
    scales = [numpy_helper.to_array(w) for w in made.graph.initializer if w.name.endswith((".scale", ".scales"))]
    assert len(scales) == len(layers) + len({layer.activation for layer in layers})
    for values in scales:
        np.testing.assert_array_equal(values, values.astype(np.float16).astype(np.float32))


def merged(graph: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """The graph as older exports had it: what reads one of these weights reads the first."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for node in copy.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names[0] if name in names else name
    replace_weights(copy, list(copy.graph.initializer))
    return copy


def test_weights_that_older_exports_merged_name_no_layer_and_are_left_as_they_are(
    graph: onnx.ModelProto, layers: list[Layer]
) -> None:
    biases = [f"trunk.{i}.attention.qkv.bias" for i in range(3)]
    values = numpy_helper.to_array(next(w for w in graph.graph.initializer if w.name == biases[0]))
    model = merged(graph, biases)
    found = quantizable_layers(model)
    assert [layer.name for layer in found if layer.name.endswith("qkv")] == []
    assert len({layer.name for layer in found}) == len(layers)
    smoothed, balanced = smooth(model, found, channel_maxima(model, found))
    left = {layer.node for layer in found} - {layer.node for layer in balanced}
    assert left == {layer.node for layer in layers if layer.name.endswith("attention.out")}
    kept = next(w for w in smoothed.graph.initializer if w.name == biases[0])
    np.testing.assert_array_equal(numpy_helper.to_array(kept), values)
    for a, b in zip(*(run(one, {"image": sample_images()}) for one in (model, smoothed)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_norm_that_older_exports_merged_names_no_projection(graph: onnx.ModelProto) -> None:
    pairs = [["grounder.ln.weight", "kp.ln.weight"], ["grounder.ln.bias", "kp.ln.bias"]]
    model = merged(merged(graph, pairs[0]), pairs[1])
    assert not [layer for layer in quantizable_layers(model) if "projection" in layer.name]


def test_one_weight_of_two_layers_is_quantised_once() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("Mul", ["a", "one"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"], "second"),
    ]
    w = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    model = float_graph([helper.make_node("Mul", ["x", "one"], ["c"]), *nodes], {"one": np.ones(1), "w": w}, 4)
    model.graph.node[1].input[0] = "c"
    layers = quantizable_layers(model)
    made = quantized_graph(model, layers, {"c": 2.0, "b": 8.0})
    check_graph(made, where="int8")
    x = np.random.default_rng(1).uniform(-2, 2, (5, 4)).astype(np.float32)
    np.testing.assert_allclose(run(made, {"x": x})[0], x @ w @ w, atol=0.3)


def test_one_activation_of_two_layers_is_quantised_once() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "one"], ["a"]),
        helper.make_node("MatMul", ["a", "w1"], ["p"]),
        helper.make_node("MatMul", ["a", "w2"], ["q"]),
        helper.make_node("Add", ["p", "q"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    w1, w2 = (rng.normal(size=(4, 3)).astype(np.float32) for _ in range(2))
    model = float_graph(nodes, {"one": np.ones(1, np.float32), "w1": w1, "w2": w2}, 4)
    layers = quantizable_layers(model)
    made = quantized_graph(model, layers, {"a": 2.0})
    assert Counter(node.op_type for node in made.graph.node)["QuantizeLinear"] == 1
    x = rng.uniform(-2, 2, (5, 4)).astype(np.float32)
    np.testing.assert_allclose(run(made, {"x": x})[0], x @ (w1 + w2), atol=0.1)


@pytest.mark.parametrize("where", ["before the layer", "behind it"])
def test_pairs_of_values_too_large_for_half_stay_in_float32(where: str) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "gain"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["p"]),
        helper.make_node("Mul", ["p", "loss"], ["y"]),
    ]
    before = where == "before the layer"
    gains, wide = ((2e5, 1.0, 5e-6), {"a", "p"}) if before else ((1.0, 2e5, 5e-6), {"p"})
    names = ("gain", "w", "loss")
    weights = dict(zip(names, (np.full(1, gains[0]), np.eye(4) * gains[1], np.full(1, gains[2])), strict=True))
    model = float_graph(nodes, {name: values.astype(np.float32) for name, values in weights.items()}, 4)
    made = half_graph(quantized_graph(model, quantizable_layers(model), {"a": gains[0]}), wide=wide)
    x = np.array([[1.0, -0.5, 0.25, 0.75]], np.float32)
    np.testing.assert_allclose(run(rounded_graph(made), {"x": x})[0], x, atol=0.02)
    types = element_types(made)
    (product,) = (node for node in made.graph.node if node.op_type == "MatMul")
    pair_types = {types[name] for name in product.input}
    assert pair_types == {TensorProto.FLOAT}  # both pairs in one type, with no cast between them and the product
    assert {node.op_type for node in made.graph.node for name in node.output if name in product.input} == {
        "DequantizeLinear"
    }


@pytest.mark.parametrize("found", [None, np.nan, np.inf, -1.0])
def test_a_layer_without_a_usable_range_is_refused(
    graph: onnx.ModelProto, layers: list[Layer], found: float | None
) -> None:
    ranges = ranges_of(graph, layers)
    if found is None:
        del ranges[layers[3].activation]
    else:
        ranges[layers[3].activation] = found
    with pytest.raises(ExportError, match=r"layer trunk\.0\.mlp\.down has no usable range .* --calibration"):
        quantized_graph(graph, layers, ranges)
