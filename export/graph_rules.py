"""What a graph has to be so that every runtime we target reads it. No torch: devices check their graphs too.

Opset 20, because it is the last that the oldest TensorRT we target reads, and the first with a Gelu operator; LayerNorm
stays one operator, since its pieces overflow in half precision. Attention is MatMul, Softmax, MatMul.
"""

import onnx
from onnx import TensorProto

from tclkit.runtime.errors import ExportError
from tclkit.runtime.extras import install_command

OPSET = 20
IR_VERSION = 9  # what belongs to opset 20; exporters write a later one, which older runtimes refuse
LARGEST_FILE_BYTES = 2**31 - 1  # a protobuf message; beyond it weights would need files of their own

# fmt: off
OPERATORS = frozenset([
    "Add", "ArgMax", "Cast", "Clip", "Concat", "Conv", "DequantizeLinear", "Div", "Expand", "Gather", "GatherElements",
    "Gelu", "Gemm", "LayerNormalization", "MatMul", "Mul", "Pad", "QuantizeLinear", "ReduceL2", "Reshape", "Resize",
    "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze",
])
# fmt: on
"""Operators that a bundle's graphs may hold: each is in the tables of every TensorRT from 10.0 on."""


def check_graph(model: onnx.ModelProto, *, where: str) -> None:
    """Refuse a graph that some runtime we target would not read.

    Args:
        model: the whole graph.
        where: what wrote it and its file, to begin the message with: "torch 2.9 wrote image.onnx".

    Raises:
        ExportError: wrong by ONNX's own checker with strict shape inference, another opset, operators of other domains
            or outside `OPERATORS`, zero points other than 0, or weights in other files.
    """
    domains = {entry.domain: entry.version for entry in model.opset_import}
    foreign = sorted(
        {f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    )
    operators = {node.op_type for node in model.graph.node}
    if domains != {"": OPSET} or foreign or model.functions:
        raise _unreadable(where, f"opsets {domains} and {foreign or 'no'} operators of other domains, expected {OPSET}")
    if unknown := sorted(operators - OPERATORS):
        raise _unreadable(where, f"the operators {', '.join(unknown)}, which not every TensorRT from 10.0 on reads")
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise _unreadable(where, "weights in other files")
    if shifted := _shifted_nodes(model):
        raise _unreadable(where, f"zero points other than 0 in {', '.join(shifted)}, which TensorRT refuses")
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # ValidationError or InferenceError; they share no base but this
        raise _unreadable(where, f"a fault: {error}") from error


def _shifted_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of quantising nodes whose zero point is not a constant 0."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    shifted = []
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2 and node.input[2]:
            tensor = constants.get(node.input[2])
            if tensor is None or onnx.numpy_helper.to_array(tensor).any():
                shifted.append(node.name or node.output[0])
    return shifted


def _unreadable(where: str, what: str) -> ExportError:
    command = install_command("export", upgrade=True)
    return ExportError(f"{where} with {what}. Install the versions that tclkit was tested with: {command}", file=where)
