"""FP16 graphs: strongly typed, close to float32, and wary of values that half precision does not hold."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tclkit.export.graph_edit import element_types, with_float_weights
from tclkit.export.graph_rules import check_graph
from tclkit.export.half_graph import LARGEST_HALF, half_graph, wide_tensors
from tclkit.export.rounded_graph import rounded_graph

from .precision_models import float_graph, run, sample_images, shipped_graph, with_weights


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return shipped_graph()


def test_the_shipped_graph_in_half_is_close(graph: onnx.ModelProto) -> None:
    half, images = half_graph(graph), sample_images()
    check_graph(half, where="half")
    for found, expected in zip(run(half, {"image": images}), run(graph, {"image": images}), strict=True):
        assert found.dtype == np.float32
        assert np.einsum("bdhw,bdhw->bhw", found, expected).min() > 0.9995
    assert half.ByteSize() < 0.51 * graph.ByteSize()


def test_all_work_is_half_and_only_the_lengths_are_not(graph: onnx.ModelProto) -> None:
    half = half_graph(graph)
    types = element_types(half)
    operators = Counter(node.op_type for node in graph.graph.node)
    assert Counter(node.op_type for node in half.graph.node if node.op_type != "Cast") == operators - Counter(["Cast"])
    by_type = {TensorProto.FLOAT: set(), TensorProto.FLOAT16: set()}
    for node in half.graph.node:
        if node.op_type != "Cast":
            by_type[types[node.output[0]]].add(node.op_type)
    assert {"ReduceL2", "Clip", "Div"} <= by_type[TensorProto.FLOAT]
    assert by_type[TensorProto.FLOAT] <= {"ReduceL2", "Clip", "Div", "Transpose", "Reshape"}
    assert {"MatMul", "Conv", "LayerNormalization", "Gelu", "Softmax", "Add", "Resize"} <= by_type[TensorProto.FLOAT16]


def test_the_given_graph_is_not_changed(graph: onnx.ModelProto) -> None:
    before = graph.SerializeToString(deterministic=True)
    half_graph(graph)
    assert graph.SerializeToString(deterministic=True) == before


def test_weights_that_were_stored_in_half_are_the_same_graph(graph: onnx.ModelProto) -> None:
    weight = next(w for w in graph.graph.initializer if len(w.dims) == 2)
    stored = onnx.ModelProto()
    stored.CopyFrom(graph)
    target = next(w for w in stored.graph.initializer if w.name == weight.name)
    target.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), f"{weight.name}.half"))
    cast = helper.make_node("Cast", [target.name], [weight.name], to=TensorProto.FLOAT)
    nodes = [cast, *stored.graph.node]
    del stored.graph.node[:]
    stored.graph.node.extend(nodes)
    assert sum(node.op_type == "Cast" for node in with_float_weights(stored).graph.node) == 1  # the image's own
    assert len(half_graph(stored).graph.node) == len(half_graph(graph).graph.node)


def _scaled(factor: float) -> onnx.ModelProto:
    """x times factor, twice added to nothing, and back: what lies between is `factor` times too large."""
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["wide"]),
        helper.make_node("Add", ["wide", "zero"], ["shifted"]),
        helper.make_node("MatMul", ["shifted", "down"], ["y"]),
    ]
    eye = np.eye(4, dtype=np.float32)
    return float_graph(nodes, {"up": eye * factor, "down": eye / factor, "zero": np.zeros(4, np.float32)}, 4)


@pytest.mark.parametrize(("largest", "is_wide"), [(3.0e4, False), (4.0e4, True), (1e6, True), (np.nan, True)])
def test_values_near_the_largest_half_are_reported(largest: float, is_wide: bool) -> None:
    found = wide_tensors(_scaled(10.0), {"wide": largest, "shifted": 1.0, "y": 1.0})
    assert [one.tensor for one in found] == (["wide"] if is_wide else [])
    if is_wide:
        assert found[0].node.startswith("MatMul")


def test_wide_tensors_keep_their_makers_and_readers_in_float32() -> None:
    graph = _scaled(3e4)
    x = np.array([[1.0, -2.0, 0.5, 4.0]], np.float32)
    assert not np.isfinite(run(rounded_graph(half_graph(graph)), {"x": x})[0]).all()  # 4 x 3e4 is beyond 65504
    kept = half_graph(graph, wide={"wide", "shifted"})
    np.testing.assert_allclose(run(rounded_graph(kept), {"x": x})[0], x, rtol=1e-3)
    types = element_types(kept)
    assert {types[name] for name in ("wide", "shifted")} == {TensorProto.FLOAT}


def test_weights_beyond_half_keep_their_layer_in_float32() -> None:
    graph = _scaled(1e5)
    huge = with_weights(graph, {"down": np.eye(4, dtype=np.float32) * 2 * LARGEST_HALF, "up": np.eye(4) * 1e-3})
    x = np.array([[1.0, -2.0, 0.5, 4.0]], np.float32)
    np.testing.assert_allclose(run(rounded_graph(half_graph(huge)), {"x": x})[0], x * 131.008, rtol=2e-3)


def test_one_tensor_read_in_two_types_is_cast_once() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["a"]),
        helper.make_node("ReduceL2", ["a", "axes"], ["length"], keepdims=1),
        helper.make_node("Div", ["a", "length"], ["unit"]),
        helper.make_node("Add", ["a", "unit"], ["y"]),
    ]
    graph = float_graph(nodes, {"two": np.array(2.0, np.float32)}, 4)
    graph.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "axes"))
    half = half_graph(graph)
    casts = [(node.input[0], node.output[0]) for node in half.graph.node if node.op_type == "Cast"]
    assert len(casts) == len(set(casts)) == 4  # x down, a up (for two readers), unit down, y up
    x = np.array([[3.0, 4.0, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(run(half, {"x": x})[0], 2 * x + x / 5, rtol=2e-3)


def test_rounding_is_that_of_numpy() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Mul", ["a", "a"], ["b"]),
        helper.make_node("Add", ["b", "c"], ["y"]),
    ]
    rng = np.random.default_rng(0)
    w, c, x = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 4), (4,), (9, 4)))
    found = run(rounded_graph(half_graph(float_graph(nodes, {"w": w, "c": c}, 4))), {"x": x})[0]

    def stored(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float16).astype(np.float32)

    a = stored(stored(x) @ stored(w))
    np.testing.assert_allclose(found, stored(stored(a * a) + stored(c)), rtol=0, atol=2e-3)
    assert (found == stored(found)).all()


def test_the_rounded_graph_is_the_half_graph(graph: onnx.ModelProto) -> None:
    images = sample_images()
    half = half_graph(graph)
    for found, expected in zip(run(rounded_graph(half), {"image": images}), run(half, {"image": images}), strict=True):
        assert np.einsum("bdhw,bdhw->bhw", found, expected).min() > 0.9995
