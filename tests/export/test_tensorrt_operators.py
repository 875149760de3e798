"""Every graph of a bundle is one that the oldest TensorRT we target reads; the check can fail, rule by rule."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tclkit.runtime.bundle import open_bundle

REAL, HALF, BYTE, WHOLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8, TensorProto.INT64
Violations = Callable[[onnx.ModelProto], list[str]]


@pytest.fixture(scope="module")
def violations(simulator_package: ModuleType) -> Violations:
    return simulator_package.violations  # type: ignore[no-any-return]


def node(operator: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    """A node with the name "the_node"; names of tensors separated by spaces, "-" for an absent one."""
    names = [[name if name != "-" else "" for name in text.split()] for text in (inputs, outputs)]
    return helper.make_node(operator, *names, name="the_node", **attributes)


def model(
    *nodes: onnx.NodeProto,
    x: tuple[int, list[Any]] = (REAL, ["B", 4]),
    y: tuple[int, list[Any]] = (REAL, ["B", 4]),
    opset: int = 20,
    more_inputs: dict[str, tuple[int, list[Any]]] | None = None,
    **weights: Any,
) -> onnx.ModelProto:
    inputs = {"x": x} | (more_inputs or {})
    values = [helper.make_tensor_value_info(name, *described) for name, described in inputs.items()]
    result = helper.make_tensor_value_info("y", *y)
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(list(nodes), "g", values, [result], tensors)
    domains = {entry.domain for entry in nodes} - {""}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def quantized(**changes: Any) -> onnx.ModelProto:
    """x -> QuantizeLinear -> DequantizeLinear -> y, and what is changed in it."""
    weights = {"scale": np.float32(0.1), "zero": np.int8(0)} | changes
    return model(node("QuantizeLinear", "x scale zero", "q"), node("DequantizeLinear", "q scale zero"), **weights)


def test_graphs_of_the_shipped_bundle(violations: Violations) -> None:
    bundle = open_bundle("tcl-shapes")
    files = [file for file in bundle.manifest.files if file.endswith(".onnx")]
    assert len(files) >= 3
    for file in files:
        assert violations(onnx.load(bundle.path(file))) == [], file


def test_graphs_of_an_exported_bundle(violations: Violations, golden_bundle: Path) -> None:
    files = sorted(golden_bundle.glob("*.onnx"))
    assert len(files) == 4
    for file in files:
        assert violations(onnx.load(file)) == [], file.name


def test_graphs_of_the_tiny_bundle(violations: Violations, tiny_bundle_folder: Path) -> None:
    for file in sorted(tiny_bundle_folder.glob("*.onnx")):
        assert violations(onnx.load(file)) == [], file.name


NCHW: tuple[int, list[Any]] = (REAL, ["B", 1, 4, 4])
FINE = {
    "half precision": model(node("Mul", "x w"), x=(HALF, ["B", 4]), y=(HALF, ["B", 4]), w=np.ones(4, np.float16)),
    "bytes through a Cast": model(node("Cast", "x", to=REAL), x=(BYTE, ["B", 4])),
    "bytes out of a Cast": model(node("Cast", "x", to=BYTE), y=(BYTE, ["B", 4])),
    "Q/DQ": quantized(),
    "int8 weights without a zero point": model(
        node("DequantizeLinear", "w scale", "real"),
        node("MatMul", "x real"),
        w=np.ones((4, 4), np.int8),
        scale=np.float32(1),
    ),
    "int8 weights": model(
        node("DequantizeLinear", "w scale zero", "real", axis=0),
        node("MatMul", "x real"),
        w=np.ones((4, 4), np.int8),
        scale=np.ones(4, np.float32),
        zero=np.zeros(4, np.int8),
    ),
    "half Q/DQ": model(
        node("QuantizeLinear", "x scale zero", "q"),
        node("DequantizeLinear", "q scale zero"),
        x=(HALF, ["B", 4]),
        y=(HALF, ["B", 4]),
        scale=np.float16(0.1),
        zero=np.int8(0),
    ),
    "constant axes": model(node("ReduceL2", "x axes"), y=(REAL, ["B", 1]), axes=np.array([1])),
    "axes from a Constant": model(
        node("Constant", "", "axes", value=numpy_helper.from_array(np.array([1]))),
        node("ReduceL2", "x axes"),
        y=(REAL, ["B", 1]),
    ),
    "indices of another type": model(
        node("Gather", "x i", axis=1), more_inputs={"i": (WHOLE, [2])}, y=(REAL, ["B", 2])
    ),
    "a condition of another type": model(
        node("Where", "c x w"), more_inputs={"c": (TensorProto.BOOL, ["B", 4])}, w=np.float32(1)
    ),
    "resize": model(
        node("Resize", "x - s", mode="linear"),
        x=NCHW,
        y=(REAL, None),
        s=np.array([1, 1, 2, 2], np.float32),  # type: ignore[arg-type]
    ),
}
BROKEN = {
    "opset": (model(node("Relu", "x"), opset=21), "opset 21 is outside 9 to 20"),
    "domain": (model(helper.make_node("Gelu", ["x"], ["y"], name="the_node", domain="com.microsoft")), "com.microsoft"),
    "operator": (model(node("Det", "x")), "not in the parser's table"),
    "unknown operator": (model(node("NoSuchThing", "x")), "not in the parser's table"),
    "operand types": (model(node("Mul", "x w"), w=np.ones(4, np.float16)), "float16"),
    "type of the table": (
        model(node("Gelu", "x"), x=(TensorProto.DOUBLE, ["B", 4]), y=(TensorProto.DOUBLE, ["B", 4])),
        "x is DOUBLE, the table has FP32, FP16, BF16",
    ),
    "bytes into arithmetic": (
        model(node("Add", "x x"), x=(BYTE, ["B", 4]), y=(BYTE, ["B", 4])),
        "x is UINT8, which only an input or output through a Cast may be",
    ),
    "bytes inside": (
        model(node("Cast", "x", "b", to=BYTE), node("Cast", "b", to=REAL)),
        "b is UINT8, which only an input or output through a Cast may be",
    ),
    "bytes reshaped": (
        model(
            node("Reshape", "x s", "r"),
            node("Cast", "r", to=REAL),
            x=(BYTE, ["B", 4]),
            y=(REAL, ["B4"]),
            s=np.array([-1]),
        ),
        "x is UINT8",
    ),
    "zero point": (quantized(zero=np.int8(3)), "the zero point zero has to be 0"),
    "unsigned quantisation": (quantized(zero=np.uint8(0)), "q is UINT8"),
    "quantisation without a zero point, which is unsigned": (
        model(node("QuantizeLinear", "x scale", "q"), node("DequantizeLinear", "q scale"), scale=np.float32(0.1)),
        "q is UINT8",
    ),
    "int8 arithmetic": (
        model(
            node("QuantizeLinear", "x scale zero", "q"),
            node("Reshape", "q s", "r"),
            node("DequantizeLinear", "r scale zero"),
            scale=np.float32(1),
            zero=np.int8(0),
            s=np.array([-1, 4]),
        ),
        "q is INT8, which only Q/DQ may read or write",
    ),
    "computed scale": (
        model(
            node("QuantizeLinear", "x scale zero", "q"),
            node("DequantizeLinear", "q scale zero"),
            more_inputs={"scale": (REAL, [])},
            zero=np.int8(0),
        ),
        "the scale scale has to be a constant",
    ),
    "computed axes": (
        model(node("ReduceL2", "x axes"), more_inputs={"axes": (WHOLE, [1])}, y=(REAL, ["B", 1])),
        "axes has to be a constant",
    ),
    "layer norm's mean": (
        model(node("LayerNormalization", "x w", "y mean"), w=np.ones(4, np.float32)),
        "only the first output is supported",
    ),
    "cubic resize": (
        model(node("Resize", "x - s", mode="cubic"), x=NCHW, y=(REAL, None), s=np.array([1, 1, 2, 2], np.float32)),  # type: ignore[arg-type]
        "mode is b'cubic'",
    ),
    "antialias": (
        model(
            node("Resize", "x - s", mode="linear", antialias=1),
            x=NCHW,
            y=(REAL, None),  # type: ignore[arg-type]
            s=np.array([1, 1, 2, 2], np.float32),
        ),
        "antialias is 1",
    ),
    "unsorted top k": (
        model(node("TopK", "x k", "y i", sorted=0), y=(REAL, ["B", 2]), k=np.array([2])),
        "sorted has to be 1",
    ),
    "inference": (model(node("MatMul", "x w"), w=np.ones((5, 4), np.float32)), "type and shape inference fails"),
}


@pytest.mark.parametrize("name", FINE)
def test_what_tensorrt_reads(violations: Violations, name: str) -> None:
    assert violations(FINE[name]) == []


@pytest.mark.parametrize("name", BROKEN)
def test_what_it_does_not_read(violations: Violations, name: str) -> None:
    broken, message = BROKEN[name]
    found = violations(broken)
    assert any(message in line for line in found), found


def test_a_violation_names_its_node(violations: Violations) -> None:
    assert violations(model(node("Relu", "x", "h"), node("Det", "h"))) == [
        "node 1 (Det 'the_node'): operator is not in the parser's table"
    ]


def test_operators_inside_branches_are_looked_at(violations: Violations) -> None:
    value = helper.make_tensor_value_info("b", REAL, ["B", 4])
    branch = helper.make_graph([helper.make_node("Det", ["x"], ["b"], name="inner")], "branch", [], [value])
    choice = node("If", "c", then_branch=branch, else_branch=branch)
    found = violations(model(choice, more_inputs={"c": (TensorProto.BOOL, [])}))
    assert found == ["node 0 (Det 'inner'): operator is not in the parser's table"] * 2
