"""Graphs for the tests of precision: the shipped image graph, and small ones whose faults are planted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tclkit import runtime
from tclkit.export.graph_edit import GraphIndex, replace_nodes, replace_weights
from tclkit.export.graph_rules import IR_VERSION, OPSET
from tclkit.runtime.bundle import Bundle, open_bundle
from tclkit.runtime.images import load_image

SAMPLES = Path(runtime.__file__).parent / "samples"


def shipped_bundle() -> Bundle:
    return open_bundle(Path(runtime.__file__).parent / "models" / "tcl-shapes")


def shipped_graph() -> onnx.ModelProto:
    bundle = shipped_bundle()
    return onnx.load(bundle.path(bundle.manifest.images[0].files["fp32"]))


def sample_images(count: int = 4) -> NDArray[np.uint8]:
    """(count, 128, 128, 3): crops of the sample scenes."""
    paths = sorted(SAMPLES.glob("*.png"))
    return np.stack([load_image(paths[i % len(paths)])[:128, :128] for i in range(count)])


def run(model: onnx.ModelProto, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(outputs, dict(feeds)))


def with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """The graph with inner tensors among its outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors)
    return copy


def float_graph(
    nodes: Sequence[onnx.NodeProto], weights: Mapping[str, NDArray[np.float32]], width: int, out: str = "y"
) -> onnx.ModelProto:
    """A graph from x (B, width) to an output (B, ?) of float32."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, ["batch", None])],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    return model


def with_weights(model: onnx.ModelProto, changed: Mapping[str, NDArray[np.float32]]) -> onnx.ModelProto:
    """The graph with other values of some weights."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = [tensor for tensor in copy.graph.initializer if tensor.name not in changed]
    new = [numpy_helper.from_array(values.astype(np.float32), name) for name, values in changed.items()]
    replace_weights(copy, [*kept, *new])
    return copy


def decomposed_norms(model: onnx.ModelProto, *, gain: float = 1.0) -> onnx.ModelProto:
    """The graph with every LayerNormalization taken to pieces, its squares in the open: the classic fault of FP16.

    Args:
        model: the graph; not changed.
        gain: the norm's input times this before its mean and spread are taken, which changes nothing in exact numbers.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    index, nodes, weights = GraphIndex(copy), [], list(copy.graph.initializer)
    for node in copy.graph.node:
        if node.op_type != "LayerNormalization":
            nodes.append(node)
            continue
        name, (x, scale, shift) = node.output[0], node.input
        width = index.weights[scale].dims[0]
        weights += [
            numpy_helper.from_array(np.full((width, 1), 1 / width, np.float32), f"{name}.mean"),
            numpy_helper.from_array(np.array(1e-5 * gain * gain, np.float32), f"{name}.eps"),
            numpy_helper.from_array(np.array(gain, np.float32), f"{name}.gain"),
        ]
        steps = [
            ("Mul", [x, f"{name}.gain"], "g"),
            ("MatMul", [f"{name}.g", f"{name}.mean"], "m"),
            ("Sub", [f"{name}.g", f"{name}.m"], "c"),
            ("Mul", [f"{name}.c", f"{name}.c"], "s"),
            ("MatMul", [f"{name}.s", f"{name}.mean"], "v"),
            ("Add", [f"{name}.v", f"{name}.eps"], "w"),
            ("Sqrt", [f"{name}.w"], "d"),
            ("Div", [f"{name}.c", f"{name}.d"], "n"),
            ("Mul", [f"{name}.n", scale], "k"),
        ]
        nodes += [helper.make_node(op, inputs, [f"{name}.{out}"]) for op, inputs, out in steps]
        nodes.append(helper.make_node("Add", [f"{name}.k", shift], [name]))
    replace_nodes(copy, nodes)
    replace_weights(copy, weights)
    return copy
