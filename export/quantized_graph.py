"""INT8 by explicit Q/DQ pairs in the graph, as TensorRT 10.0 to 11.x, OpenVINO and ONNX Runtime read them.

Symmetric, zero points 0: a scale a tensor for activations, a scale an output channel for weights. Weights are stored as
int8, so the file shrinks too. Only the inputs of the chosen layers are quantised: no residual add, norm or softmax.
Scales are rounded to half precision before they are used, so that the half-precision graph around them means the same.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tclkit.runtime.errors import ExportError

from .graph_edit import GraphIndex, replace_nodes, replace_weights
from .layers import Layer

_LARGEST_INT8 = 127  # -128 is left out: the range is symmetric, as TensorRT's is
_SMALLEST_SCALE = 2.0**-20  # below it half precision (subnormal there) would keep a scale to worse than 6 %


def quantized_graph(model: onnx.ModelProto, layers: Sequence[Layer], ranges: Mapping[str, float]) -> onnx.ModelProto:
    """Put Q/DQ pairs before some layers of a float32 graph.

    Args:
        model: float32 graph; not changed.
        layers: which to quantise.
        ranges: activation -> |x| that becomes 127.

    Returns:
        A float32 graph with Q/DQ pairs.

    Raises:
        ExportError: a layer's activation has no range, or one that is not finite.
    """
    quantized = onnx.ModelProto()
    quantized.CopyFrom(model)
    index = GraphIndex(quantized)
    by_node = {layer.node: layer for layer in layers}
    nodes: list[NodeProto] = []
    weights = list(quantized.graph.initializer)
    activations: dict[str, str] = {}
    dequantized: dict[str, str] = {}  # weight -> the same behind its pair; older exports have layers with one weight
    for node in quantized.graph.node:
        layer = by_node.get(node.output[0])
        if layer is not None:
            if layer.activation not in activations:
                scale = _activation_scale(layer, ranges)
                activations[layer.activation] = _quantize_activation(layer.activation, scale, nodes, weights)
            node.input[0] = activations[layer.activation]
            if layer.weight not in dequantized:
                dequantized[layer.weight] = _quantize_weight(layer, index.weight(layer.weight), nodes, weights)
            node.input[1] = dequantized[layer.weight]
        nodes.append(node)
    replace_nodes(quantized, nodes)
    replace_weights(quantized, weights)
    quantized.graph.ClearField("value_info")
    return quantized


def _activation_scale(layer: Layer, ranges: Mapping[str, float]) -> float:
    found = ranges.get(layer.activation)
    if found is None or not np.isfinite(found) or found < 0:
        raise ExportError(
            f"layer {layer.name} has no usable range for its input ({found}): INT8 needs ranges measured on images, "
            "give some: --calibration FOLDER",
            layer=layer.name,
            found=found,
        )
    return float(_half_scales(np.array(found / _LARGEST_INT8)))


def _quantize_activation(tensor: str, scale: float, nodes: list[NodeProto], weights: list[TensorProto]) -> str:
    weights += [
        numpy_helper.from_array(np.array(scale, np.float32), f"{tensor}.scale"),
        numpy_helper.from_array(np.array(0, np.int8), f"{tensor}.zero"),
    ]
    pair = [f"{tensor}.scale", f"{tensor}.zero"]
    nodes += [
        helper.make_node("QuantizeLinear", [tensor, *pair], [f"{tensor}.int8"], f"{tensor}.quantize"),
        helper.make_node("DequantizeLinear", [f"{tensor}.int8", *pair], [f"{tensor}.q"], f"{tensor}.dequantize"),
    ]
    return f"{tensor}.q"


def _quantize_weight(
    layer: Layer, values: NDArray[np.float32], nodes: list[NodeProto], weights: list[TensorProto]
) -> str:
    others = tuple(axis for axis in range(values.ndim) if axis != layer.channel_axis)
    scales = _half_scales(np.abs(values).max(others) / _LARGEST_INT8)
    spread = scales.reshape([-1 if axis == layer.channel_axis else 1 for axis in range(values.ndim)])
    rounded = np.clip(np.rint(values / spread), -_LARGEST_INT8, _LARGEST_INT8).astype(np.int8)
    name = layer.weight
    weights += [
        numpy_helper.from_array(rounded, f"{name}.int8"),
        numpy_helper.from_array(scales, f"{name}.scales"),
        numpy_helper.from_array(np.zeros(len(scales), np.int8), f"{name}.zeros"),
    ]
    inputs = [f"{name}.int8", f"{name}.scales", f"{name}.zeros"]
    nodes.append(
        helper.make_node("DequantizeLinear", inputs, [f"{name}.q"], f"{name}.dequantize", axis=layer.channel_axis)
    )
    return f"{name}.q"


def _half_scales(scales: NDArray[np.floating]) -> NDArray[np.float32]:
    """Scales as float32 that half precision holds exactly, none of them too small for it."""
    return np.asarray(np.maximum(scales, _SMALLEST_SCALE).astype(np.float16), np.float32)
