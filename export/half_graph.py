"""A float32 graph in half precision, strongly typed: casts stand in the graph, so that every runtime computes the same.

What stays in float32: the normalisation to length 1 at the end (a sum of squares overflows half precision first), the
inputs and outputs, and the neighbourhood of every tensor whose values came near half precision's largest number on
calibration images. LayerNormalization stays one operator: taken to pieces it overflows.

Written by hand rather than taken from a tool: it knows about Q/DQ pairs, and the device needs onnx for it and nothing
more. How close the result is to float32 stands in docs/precision.md; tools were not compared.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from .graph_edit import GraphIndex, cast_type, element_types, replace_nodes, replace_weights, with_float_weights

LARGEST_HALF = 65504.0
_HEADROOM = 0.5  # of the largest half: other images may go beyond what the calibration images showed
_TO_LENGTH_ONE = "ReduceL2"
_FLOAT_ONLY_INPUTS = {"Resize": (1, 2)}  # its regions and scales are float32 whatever the data are


@dataclass(frozen=True, kw_only=True, slots=True)
class WideTensor:
    """A tensor that half precision may not hold.

    tensor: its name. node: what makes it. largest: |x| seen on the calibration images.
    """

    tensor: str
    node: str
    largest: float


def wide_tensors(model: onnx.ModelProto, largest: Mapping[str, float]) -> list[WideTensor]:
    """Tensors whose values come near half precision's largest number, 65504, or are not finite: half of it and more.

    Args:
        model: the float32 graph.
        largest: tensor -> |x| on calibration images, for every float tensor that a node makes.
    """
    return [
        WideTensor(tensor=name, node=_label(node), largest=largest[name])
        for node in model.graph.node
        for name in node.output
        if name in largest and not largest[name] < _HEADROOM * LARGEST_HALF
    ]


def half_graph(model: onnx.ModelProto, *, wide: Collection[str] = ()) -> onnx.ModelProto:
    """The same graph computed in half precision; inputs and outputs keep their types.

    Args:
        model: float32, or float32 with Q/DQ pairs; not changed.
        wide: tensors that half precision may not hold: what makes and what reads them stays in float32.

    Raises:
        ExportError: the graph's types contradict each other.
    """
    source = with_float_weights(model)
    types, index = element_types(source), GraphIndex(source)
    single = _single_nodes(source, index, set(wide))
    return _Rewriter(source, types, single).run()


def _single_nodes(model: onnx.ModelProto, index: GraphIndex, wide: set[str]) -> set[str]:
    """First outputs of the nodes that stay in float32."""
    single = set()
    for node in model.graph.node:
        tensors = {*node.input, *node.output}
        if tensors & wide or any(_does_not_fit(index.weights.get(name)) for name in node.input):
            single.add(node.output[0])
        if node.op_type == _TO_LENGTH_ONE:
            single |= {node.output[0], *_readers_to_division(index, node.output[0])}
    return single | _pairs_of_single_nodes(model, index, single, wide)


def _pairs_of_single_nodes(model: onnx.ModelProto, index: GraphIndex, single: set[str], wide: set[str]) -> set[str]:
    """What Q/DQ pairs add: behind a pair values are as wide as before it, and a layer reads both its pairs alike."""
    more: set[str] = set()
    dequantizers = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    for node in dequantizers:
        maker = index.maker.get(node.input[0])
        if maker is not None and maker.input[0] in wide:
            more |= {node.output[0], *(reader.output[0] for reader in index.readers[node.output[0]])}
    for node in dequantizers:
        if any(reader.output[0] in single | more for reader in index.readers[node.output[0]]):
            more.add(node.output[0])
    return more


def _readers_to_division(index: GraphIndex, tensor: str) -> set[str]:
    """What reads a vector's length, up to the division by it."""
    found = set()
    for reader in index.readers[tensor]:
        found.add(reader.output[0])
        if reader.op_type != "Div":
            found |= _readers_to_division(index, reader.output[0])
    return found


def _does_not_fit(weight: TensorProto | None) -> bool:
    if weight is None or weight.data_type != TensorProto.FLOAT:
        return False
    values = numpy_helper.to_array(weight)
    return bool(values.size) and not float(np.abs(values).max()) <= LARGEST_HALF


class _Rewriter:
    """Gives every node the type it computes in, with casts where two types meet."""

    def __init__(self, model: onnx.ModelProto, types: Mapping[str, int], single: set[str]) -> None:
        self._model, self._types, self._single = model, types, single
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._inputs = {value.name for value in model.graph.input}
        self._outputs = {value.name for value in model.graph.output}
        self._half_made: set[str] = set()  # tensors that are half precision now
        self._nodes: list[NodeProto] = []
        self._casts: dict[tuple[str, int], str] = {}
        self._new_weights: dict[str, TensorProto] = {}

    def run(self) -> onnx.ModelProto:
        for node in self._model.graph.node:
            self._add(node)
        replace_nodes(self._model, self._nodes)
        replace_weights(self._model, [*self._weights.values(), *self._new_weights.values()])
        self._model.graph.ClearField("value_info")
        return self._model

    def _add(self, node: NodeProto) -> None:
        new = NodeProto()
        new.CopyFrom(node)
        is_float = any(self._types.get(name) == TensorProto.FLOAT for name in (*node.input, *node.output) if name)
        halve = is_float and node.output[0] not in self._single
        fixed = _FLOAT_ONLY_INPUTS.get(node.op_type, ())
        for i, name in enumerate(node.input):
            if name and i not in fixed and self._types.get(name) == TensorProto.FLOAT:
                new.input[i] = self._as(name, TensorProto.FLOAT16 if halve else TensorProto.FLOAT)
        if halve and node.op_type == "Cast" and cast_type(node) == TensorProto.FLOAT:
            del new.attribute[:]
            new.attribute.append(helper.make_attribute("to", TensorProto.FLOAT16))
        outputs = []
        for i, name in enumerate(node.output):
            if not (halve and self._types.get(name) == TensorProto.FLOAT):
                continue
            if name in self._outputs:
                half = self._casts[name, TensorProto.FLOAT16] = new.output[i] = f"{name}.half"
                outputs.append(helper.make_node("Cast", [half], [name], f"{name}.single", to=TensorProto.FLOAT))
            else:
                self._half_made.add(name)
        self._nodes += [new, *outputs]

    def _as(self, name: str, wanted: int) -> str:
        """Name of a tensor in the wanted type, casting it once where it has the other."""
        found = TensorProto.FLOAT16 if name in self._half_made else TensorProto.FLOAT
        if found == wanted:
            return name
        if (name, wanted) not in self._casts:
            suffix = "half" if wanted == TensorProto.FLOAT16 else "single"
            made = self._casts[name, wanted] = f"{name}.{suffix}"
            if name in self._weights:
                values = numpy_helper.to_array(self._weights[name]).astype(np.float16)
                self._new_weights[made] = numpy_helper.from_array(values, made)
            else:
                self._nodes.append(helper.make_node("Cast", [name], [made], name=made, to=wanted))
        return self._casts[name, wanted]


def _label(node: NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"
