"""Moving outliers from activations into weights before INT8: exact in float, and far easier to round.

A channel j of a layer's input is divided by s_j where it is made and its row of the weight multiplied by s_j, with
s_j = max|x_j|^a / max|W_j|^(1-a). It is made by a LayerNorm (whose scale and shift absorb 1/s), by attention's value
projection (whose columns do), or by an activation function: there a product with 1/s joins the graph, for runtimes to
fuse. Transpositions may stand between. A layer whose input is made otherwise stays as it is, and is not among those
that `smooth` returns.

Source: SmoothQuant (Xiao et al., ICML 2023), which folds into LayerNorms only.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from .graph_edit import GraphIndex, replace_nodes, replace_weights
from .layers import Layer

DEFAULT_STRENGTH = 0.5
_SMALLEST = 1e-5
_ELEMENTWISE = ("Gelu", "Mul")  # what ends an MLP's activation: GELU, or OpenAI's x·sigmoid(1.702x)
_Vector = NDArray[np.float64]


def input_channel_axis(model: onnx.ModelProto, layer: Layer) -> int:
    """Axis of a layer's activation that counts channels: 1 for a Conv, else the last (-1)."""
    node = GraphIndex(model).maker[layer.node]
    return 1 if node.op_type == "Conv" else -1


def smooth(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    channel_maxima: Mapping[str, NDArray[np.float32]],
    *,
    strength: float = DEFAULT_STRENGTH,
) -> tuple[onnx.ModelProto, list[Layer]]:
    """Balance the channels of every layer's input against the rows of its weight.

    Args:
        model: float32 image graph; not changed.
        layers: those that will be quantised.
        channel_maxima: activation -> (C,) largest |x| of every channel on calibration images.
        strength: a in 0..1: 0 leaves the burden with the activations, 1 moves all of it to the weights.

    Returns:
        A graph that computes the same in float32 to within rounding, with the same names; and the layers that were
        balanced.
    """
    smoothed = onnx.ModelProto()
    smoothed.CopyFrom(model)
    editor = _Editor(smoothed)
    balanced = [layer for layer in layers if editor.balance(layer, channel_maxima[layer.activation], strength)]
    editor.finish()
    return smoothed, balanced


class _Editor:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._model, self._index = model, GraphIndex(model)
        self._values = {
            name: numpy_helper.to_array(tensor).astype(np.float64)
            for name, tensor in self._index.weights.items()
            if tensor.data_type == onnx.TensorProto.FLOAT
        }
        self._changed: set[str] = set()
        self._multiplied: dict[str, _Vector] = {}  # tensor -> 1/s for a Mul of its own, shaped to go with it

    def balance(self, layer: Layer, channel_maxima: NDArray[np.float32], strength: float) -> bool:
        """Balance one layer; whether that could be done."""
        if not self._is_read_once(layer.activation) or self._count_readers(layer.weight) != 1:
            return False
        is_conv = self._index.maker[layer.node].op_type == "Conv"
        axis = 1 if is_conv else 1 - layer.channel_axis
        others = tuple(i for i in range(self._values[layer.weight].ndim) if i != axis)
        s = _factors(channel_maxima, np.abs(self._values[layer.weight]).max(others), strength)
        tensor, axes_behind = self._untransposed(layer.activation, 2 if is_conv else 0)
        maker = self._index.maker.get(tensor)
        if maker is None:
            return False
        if maker.op_type == "LayerNormalization" and axes_behind == 0 and self._owns(maker.input[1:3]):
            for name in maker.input[1:3]:
                self._scale(name, 1 / s)
        elif maker.op_type in _ELEMENTWISE:
            self._multiplied[tensor] = (1 / s).reshape(-1, *[1] * axes_behind)
        elif not self._scale_values(layer, s):
            return False
        self._scale(layer.weight, s.reshape([-1 if i == axis else 1 for i in range(self._values[layer.weight].ndim)]))
        return True

    def _untransposed(self, tensor: str, axes_behind: int) -> tuple[str, int]:
        """What transpositions made a tensor of, and how many axes stand behind the channels there.

        Args:
            tensor: with one reader.
            axes_behind: how many stand behind its channels.
        """
        maker = self._index.maker.get(tensor)
        while maker is not None and maker.op_type == "Transpose" and self._is_read_once(maker.input[0]):
            order = next((list(a.ints) for a in maker.attribute if a.name == "perm"), None)
            if order is None:
                break
            axes_behind = len(order) - 1 - order[len(order) - 1 - axes_behind]
            tensor = str(maker.input[0])
            maker = self._index.maker.get(tensor)
        return tensor, axes_behind

    def _scale_values(self, layer: Layer, s: _Vector) -> bool:
        """Fold 1/s into the value part of attention's joint projection; whether that could be done."""
        place, dot, kind = layer.name.rpartition(".")
        bias = f"{place}.qkv.bias"
        if not dot or kind != "out" or not self._owns([bias]):
            return False
        adder = self._index.readers[bias][0]
        products = [self._index.maker[name] for name in adder.input if name in self._index.maker]
        if adder.op_type != "Add" or len(products) != 1 or products[0].op_type != "MatMul":
            return False
        weight = products[0].input[1]
        if not self._owns([weight]) or len(self._values[bias]) != 3 * len(s):
            return False
        factors = np.concatenate([np.ones(2 * len(s)), 1 / s])
        self._scale(bias, factors)
        self._scale(weight, factors)
        return True

    def _owns(self, names: Sequence[str]) -> bool:
        """Whether these are weights with one reader each, so that nobody else sees them change."""
        return all(name in self._values and self._count_readers(name) == 1 for name in names)

    def _is_read_once(self, tensor: str) -> bool:
        return self._count_readers(tensor) == 1 and tensor not in self._index.outputs

    def _count_readers(self, name: str) -> int:
        return len(self._index.readers[name])

    def _scale(self, name: str, factors: _Vector) -> None:
        self._values[name] = self._values[name] * factors
        self._changed.add(name)

    def finish(self) -> None:
        weights = [
            numpy_helper.from_array(self._values[t.name].astype(np.float32), t.name) if t.name in self._changed else t
            for t in self._model.graph.initializer
        ]
        nodes = []
        for node in self._model.graph.node:
            nodes.append(node)
            tensor = node.output[0]
            if tensor not in self._multiplied:
                continue
            factors = self._multiplied[tensor].astype(np.float32)
            weights.append(numpy_helper.from_array(factors, f"{tensor}.smoothing"))
            # The product takes the tensor's name, so that the layer's activation is still called the same.
            node.output[0] = f"{tensor}.unsmoothed"
            nodes.append(helper.make_node("Mul", [node.output[0], f"{tensor}.smoothing"], [tensor], f"{tensor}.smooth"))
        replace_nodes(self._model, nodes)
        replace_weights(self._model, weights)


def _factors(channel_maxima: NDArray[np.float32], weight_maxima: _Vector, strength: float) -> _Vector:
    """s, (C,), with a geometric mean of 1 over the channels that say anything: only differences between them matter."""
    x = np.maximum(channel_maxima.astype(np.float64), _SMALLEST)
    w = np.maximum(weight_maxima, _SMALLEST)
    s = x**strength / w ** (1 - strength)
    s = np.where((channel_maxima > _SMALLEST) & (weight_maxima > _SMALLEST), s, np.nan)
    if np.isnan(s).all():
        return np.ones_like(x)
    s = s / np.exp(np.nanmean(np.log(s)))
    return np.asarray(np.where(np.isnan(s), 1.0, s))
