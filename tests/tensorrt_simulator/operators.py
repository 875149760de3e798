"""Whether the oldest ONNX parser we target takes a graph: tests/export/tensorrt-operators-10.1.json, applied.

Later TensorRT versions read more. The simulator holds all of them to this table, because one graph is to run on all.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TABLE: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[1] / "export" / "tensorrt-operators-10.1.json").read_text(encoding="utf-8")
)

# fmt: off
_NAMES = {
    TensorProto.FLOAT: "FP32", TensorProto.FLOAT16: "FP16", TensorProto.BFLOAT16: "BF16", TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64", TensorProto.BOOL: "BOOL", TensorProto.UINT8: "UINT8", TensorProto.INT8: "INT8",
    TensorProto.FLOAT8E4M3FN: "FP8", TensorProto.INT4: "INT4", TensorProto.DOUBLE: "DOUBLE",
}
_QUANTIZED = {"INT8", "FP8", "INT4"}
_AXES_AT = {  # operator -> input that has to be a constant
    "CumSum": 1, "OneHot": 1, "Pad": 3, "Slice": 3, "Squeeze": 1, "Unsqueeze": 1,
    **dict.fromkeys([
        "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
        "ReduceSum", "ReduceSumSquare",
    ], 1),
}
_RESIZE_ALLOWED = {
    "coordinate_transformation_mode":
        (b"half_pixel", b"pytorch_half_pixel", b"tf_half_pixel_for_nn", b"asymmetric", b"align_corners"),
    "mode": (b"nearest", b"linear"),
    "nearest_mode": (b"floor", b"ceil", b"round_prefer_floor", b"round_prefer_ceil"),
    "keep_aspect_ratio_policy": (b"stretch",),
    "antialias": (0,),
}
_RESIZE_DEFAULTS = {
    "coordinate_transformation_mode": b"half_pixel", "mode": b"nearest", "nearest_mode": b"round_prefer_floor",
    "keep_aspect_ratio_policy": b"stretch", "antialias": 0,
}
# fmt: on
_TOPK_LIMIT = 3840


@dataclass(frozen=True)
class Violation:
    """One thing the parser refuses.

    node: index in the graph, -1 for the graph as a whole.
    name, operator: of the node.
    code: name of TensorRT's ErrorCode.
    text: what is wrong.
    """

    node: int
    name: str
    operator: str
    code: str
    text: str

    def __str__(self) -> str:
        if self.node < 0:
            return self.text
        return f"node {self.node} ({self.operator} {self.name!r}): {self.text}"


def violations(model: onnx.ModelProto) -> list[str]:
    """What TensorRT would refuse in a graph, one line each; an empty list for one that it takes.

    Looked at are opset, domains, operators, types (after strict type and shape inference), equal operand types as a
    strongly typed network needs them, uint8 only at inputs and outputs through a Cast, zero points, and those
    restrictions of the table that a graph shows.
    """
    return [str(violation) for violation in find_violations(model)]


def find_violations(model: onnx.ModelProto) -> list[Violation]:
    """As `violations`, with the place of each."""
    found = [*_whole_model(model), *_unknown_operators(model.graph)]
    if found:
        return found
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except Exception as error:  # InferenceError, TypeError, ...: onnx's errors share no base but this
        return [Violation(-1, "", "", "INVALID_GRAPH", f"ONNX's type and shape inference fails: {error}")]
    return list(_GraphCheck(inferred.graph, {entry.domain: entry.version for entry in model.opset_import}).run())


def _whole_model(model: onnx.ModelProto) -> Iterator[Violation]:
    lowest, highest = TABLE["opset"]["min"], TABLE["opset"]["max"]
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and not lowest <= entry.version <= highest:
            text = f"opset {entry.version} is outside {lowest} to {highest}"
            yield Violation(-1, "", "", "UNSUPPORTED_GRAPH", text)
    if model.functions:
        yield Violation(-1, "", "", "UNSUPPORTED_GRAPH", "the model defines functions of its own")
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            yield Violation(-1, "", "", "INVALID_GRAPH", f"weight {tensor.name!r} lies in another file")


def _unknown_operators(graph: onnx.GraphProto) -> Iterator[Violation]:
    for index, node in enumerate(graph.node):
        if node.domain not in ("", "ai.onnx"):
            yield Violation(
                index, node.name, node.op_type, "UNSUPPORTED_NODE", f"operator of the domain {node.domain!r}"
            )
        elif not TABLE["operators"].get(node.op_type, {}).get("supported", False):
            yield Violation(index, node.name, node.op_type, "UNSUPPORTED_NODE", "operator is not in the parser's table")
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _unknown_operators(inner)


class _GraphCheck:
    """The checks that need types and constants of an inferred graph."""

    def __init__(self, graph: onnx.GraphProto, opsets: dict[str, int]) -> None:
        self.graph = graph
        self.opset = opsets.get("", opsets.get("ai.onnx", 0))
        values = (*graph.value_info, *graph.input, *graph.output)
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.inputs = {value.name for value in graph.input}
        self.outputs = {value.name for value in graph.output}

    def run(self) -> Iterator[Violation]:
        for index, node in enumerate(self.graph.node):
            for code, text in (*self._types_of(node), *self._restrictions(node)):
                yield Violation(index, node.name, node.op_type, code, text)

    def _type(self, name: str) -> str:
        number = self.types.get(name, 0)
        return _NAMES.get(number, TensorProto.DataType.Name(number))

    def _types_of(self, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
        allowed = TABLE["operators"][node.op_type]["types"]
        for name in filter(None, (*node.input, *node.output)):
            found = self._type(name)
            if found == "UINT8":
                ends = self.outputs if name in node.output else self.inputs
                if node.op_type != "Cast" or name not in ends:
                    yield (
                        "UNSUPPORTED_NODE_DATATYPE",
                        f"{name} is UINT8, which only an input or output through a Cast may be",
                    )
            elif found in _QUANTIZED and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                yield "UNSUPPORTED_NODE_DATATYPE", f"{name} is {found}, which only Q/DQ may read or write"
        groups = self._formal_types(node)
        for formal, names in groups.items():
            kinds = {self._type(name) for name in names}
            if len(kinds) > 1:
                listed = ", ".join(f"{name} {self._type(name)}" for name in names)
                yield "UNSUPPORTED_NODE_DATATYPE", f"operands of one type ({formal}) differ: {listed}"
        for name in self._main_operands(node, groups):
            if self._type(name) not in {*allowed, "UINT8"}:
                yield "UNSUPPORTED_NODE_DATATYPE", f"{name} is {self._type(name)}, the table has {', '.join(allowed)}"

    def _formal_types(self, node: onnx.NodeProto) -> dict[str, list[str]]:
        """Type variable of the operator's schema -> tensors bound to it."""
        schema = onnx.defs.get_schema(node.op_type, self.opset, "")
        variables = {constraint.type_param_str for constraint in schema.type_constraints}
        groups: dict[str, list[str]] = {}
        for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
            for index, name in enumerate(names):
                formal = formals[min(index, len(formals) - 1)]
                if name and formal.type_str in variables and formal.is_homogeneous:
                    groups.setdefault(formal.type_str, []).append(name)
        return groups

    def _main_operands(self, node: onnx.NodeProto, groups: dict[str, list[str]]) -> list[str]:
        """The tensors that the table's types speak of."""
        if node.op_type == "Cast":
            return [node.input[0], node.output[0]]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Shape", "Size"):
            return [node.input[0]] if node.op_type.endswith("Linear") else []
        if node.op_type == "Where":
            return list(node.input[1:])
        first = next(filter(None, node.input), node.output[0])
        return next((names for names in groups.values() if first in names), [first])

    def _restrictions(self, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        operator = node.op_type
        at = _AXES_AT.get(operator)
        if at is not None and len(node.input) > at and node.input[at] and node.input[at] not in self.constants:
            yield "UNSUPPORTED_NODE_INPUT", f"{node.input[at]} has to be a constant"
        if operator in ("QuantizeLinear", "DequantizeLinear"):
            yield from self._quantization(node)
        elif operator == "LayerNormalization" and len([name for name in node.output if name]) > 1:
            yield "UNSUPPORTED_NODE", "only the first output is supported"
        elif operator == "Resize":
            for name, allowed in _RESIZE_ALLOWED.items():
                value = attributes.get(name, _RESIZE_DEFAULTS[name])
                if value not in allowed and (
                    name != "nearest_mode" or attributes.get("mode", b"nearest") == b"nearest"
                ):
                    yield "UNSUPPORTED_NODE_ATTR", f"{name} is {value!r}, which is not supported"
            scaled = len(node.input) > 2 and node.input[2]
            if scaled and list(attributes.get("axes", [])) != list(range(len(attributes.get("axes", [])))):
                yield "UNSUPPORTED_NODE_ATTR", "axes have to be 0, 1, 2, ... where scales are an input"
        elif operator in ("AveragePool", "LpPool", "MaxPool"):
            if any(step != 1 for step in attributes.get("dilations", [])):
                yield "UNSUPPORTED_NODE_ATTR", "dilations have to be 1"
            if operator == "MaxPool" and len(node.output) > 1 and node.output[1]:
                yield "UNSUPPORTED_NODE", "the output of indices is not supported"
        elif operator == "ScatterND" and attributes.get("reduction", b"none") != b"none":
            yield "UNSUPPORTED_NODE_ATTR", "reduction is not supported"
        elif operator == "TopK":
            if attributes.get("sorted", 1) != 1:
                yield "UNSUPPORTED_NODE_ATTR", "sorted has to be 1"
            k = self._constant(node.input[1])
            if k is not None and int(k.max()) >= _TOPK_LIMIT:
                yield "UNSUPPORTED_NODE_INPUT", f"K is {int(k.max())}, it has to be below {_TOPK_LIMIT}"
        elif operator == "Constant" and set(attributes) & {"sparse_value", "value_string", "value_strings"}:
            yield "UNSUPPORTED_NODE_ATTR", f"{', '.join(attributes)} is not supported"

    def _quantization(self, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
        quantized = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
        if self._type(quantized) not in _QUANTIZED:
            yield "UNSUPPORTED_NODE_DATATYPE", f"{quantized} is {self._type(quantized)}, expected INT8, FP8 or INT4"
        if node.input[1] not in self.constants:
            yield "UNSUPPORTED_NODE_INPUT", f"the scale {node.input[1]} has to be a constant"
        if len(node.input) > 2 and node.input[2]:
            zero_point = self._constant(node.input[2])
            if zero_point is None or np.any(zero_point.astype(np.float32) != 0):
                yield "UNSUPPORTED_NODE_INPUT", f"the zero point {node.input[2]} has to be 0"

    def _constant(self, name: str) -> Any:
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None
