"""Decoders of an upsampling block or more as small ONNX graphs with random weights, in any order of axes and type."""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tclkit.export.graph_rules import IR_VERSION, OPSET

FIRST, LAST = (0, 3, 1, 2), (0, 2, 3, 1)  # transpositions that bring channels first, last
AS_EXPORTED, ADDED_LAST, ALL_LAST = "as exported", "added last", "all last"
ORDERS = (AS_EXPORTED, ADDED_LAST, ALL_LAST)


class _Decoder:
    def __init__(self, width: int, dtype: Any) -> None:
        self.width, self.dtype, self.random = width, dtype, np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def weight(self, name: str, shape: tuple[int, ...], spread: float, mean: float = 0.0) -> str:
        values = (mean + spread * self.random.standard_normal(shape)).astype(self.dtype)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(self, x: str, place: str, order: str) -> str:
        """norm -> GELU -> convolution, from channels last to channels first."""
        width = self.width
        norm = self.weight(f"{place}.norm.weight", (width,), 0.3, 1.0)
        conv = self.weight(f"{place}.conv.weight", (width, width, 3, 3), 0.4 / width**0.5)
        x = self.add("LayerNormalization", x, norm, self.weight(f"{place}.norm.bias", (width,), 0.3), axis=-1)
        if order == AS_EXPORTED:
            x = self.add("Gelu", self.add("Transpose", x, perm=FIRST))
        else:
            x = self.add("Transpose", self.add("Gelu", x), perm=FIRST)
        bias = self.weight(f"{place}.conv.bias", (width,), 0.3)
        return self.add("Conv", x, conv, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    def block(self, x: str, place: str, order: str) -> str:
        """From channels first, or last where all are."""
        if order == ALL_LAST:
            x = self.add("Transpose", x, perm=FIRST)
        x = self.add("Resize", x, "", "scales", mode="nearest", coordinate_transformation_mode="asymmetric",
                     nearest_mode="floor")  # fmt: skip
        if order == AS_EXPORTED:
            x = self.add("Add", x, self.conv(self.add("Transpose", x, perm=LAST), f"{place}.conv1", order))
            return self.add("Add", x, self.conv(self.add("Transpose", x, perm=LAST), f"{place}.conv2", order))
        x = self.add("Transpose", x, perm=LAST)
        x = self.add("Add", self.add("Transpose", self.conv(x, f"{place}.conv1", order), perm=LAST), x)
        x = self.add("Add", x, self.add("Transpose", self.conv(x, f"{place}.conv2", order), perm=LAST))
        return x if order == ALL_LAST else self.add("Transpose", x, perm=FIRST)


def decoder_graph(
    grid: tuple[int, int] = (5, 3),
    *,
    blocks: int = 1,
    width: int = 6,
    dtype: Any = np.float64,
    order: str = AS_EXPORTED,
    tokens: bool = False,
) -> onnx.ModelProto:
    """Blocks from `x` to `y`, [batch, C, s·h, s·w], and to the same with channels last, `last`.

    `x` is [batch, C, h, w], or with `tokens` [batch, hw, C].
    """
    made = _Decoder(width, dtype)
    made.weights.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
    (h, w), finer, x = grid, 2**blocks, "x"
    if tokens:
        made.weights.append(numpy_helper.from_array(np.array([-1, width, h, w]), "laid_out"))
        x = made.add("Reshape", made.add("Transpose", x, perm=[0, 2, 1]), "laid_out")
    x = made.add("Transpose", x, perm=LAST) if order == ALL_LAST else x
    for i in range(blocks):
        x = made.block(x, f"grounder.decoder.{i}", order)
    first, last = (x, made.add("Transpose", x, perm=LAST))
    if order == ALL_LAST:
        first, last = made.add("Transpose", x, perm=FIRST), x
    made.nodes += [helper.make_node("Add", [x, "zero"], [y], y) for x, y in ((first, "y"), (last, "last"))]
    made.weights.append(numpy_helper.from_array(np.array(0, dtype), "zero"))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    described = {
        "x": ["batch", h * w, width] if tokens else ["batch", width, h, w],
        "y": ["batch", width, finer * h, finer * w],
    }
    described["last"] = ["batch", finer * h, finer * w, width]
    values = [helper.make_tensor_value_info(name, kind, shape) for name, shape in described.items()]
    graph = helper.make_graph(made.nodes, "decoder", values[:1], values[1:], made.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def evaluate(model: onnx.ModelProto, x: NDArray[Any]) -> list[NDArray[Any]]:
    """Outputs in the type of the graph, float64 included, by ONNX's reference."""
    return list(ReferenceEvaluator(model).run(None, {"x": x}))
