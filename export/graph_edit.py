"""Small edits of ONNX graphs that several passes share: who makes a tensor, who reads it, what type it has."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tclkit.runtime.errors import ExportError


class GraphIndex:
    """A graph's makers, readers, weights and types by tensor name, for reading only."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.weights: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self.maker: dict[str, NodeProto] = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                if name:
                    self.readers[name].append(node)
        self.outputs = [output.name for output in graph.output]

    def weight(self, name: str) -> NDArray[np.float32]:
        """Values of a float weight as float32.

        Raises:
            ExportError: it is no weight of the graph.
        """
        if name not in self.weights:
            raise ExportError(f"the graph has no weight {name!r}", name=name)
        return np.asarray(numpy_helper.to_array(self.weights[name]), np.float32)


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX element type of every tensor of a graph, by strict inference.

    Raises:
        ExportError: the types contradict each other.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as error:  # InferenceError; onnx gives it no public base
        raise ExportError(f"the graph's types do not fit: {error}") from error
    graph = inferred.graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    return types


def replace_nodes(model: onnx.ModelProto, nodes: Iterable[NodeProto]) -> None:
    """Give a graph other nodes, which must stand in the order of their running."""
    made = list(nodes)
    del model.graph.node[:]
    model.graph.node.extend(made)


def replace_weights(model: onnx.ModelProto, weights: Iterable[TensorProto]) -> None:
    """Give a graph other weights; those that no node reads are left out."""
    read = {name for node in model.graph.node for name in node.input}
    made = [tensor for tensor in weights if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(made)


def with_float_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which weights stored as float16 behind a Cast are float32 weights, as the passes expect them."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    index = GraphIndex(copy)
    weights, nodes = dict(index.weights), []
    for node in copy.graph.node:
        stored = index.weights.get(node.input[0]) if node.op_type == "Cast" and node.input else None
        if stored is not None and stored.data_type == TensorProto.FLOAT16 and cast_type(node) == TensorProto.FLOAT:
            values = numpy_helper.to_array(stored).astype(np.float32)
            weights[node.output[0]] = numpy_helper.from_array(values, node.output[0])
        else:
            nodes.append(node)
    replace_nodes(copy, nodes)
    replace_weights(copy, weights.values())
    return copy


def cast_type(node: NodeProto) -> int:
    """ONNX element type that a Cast makes."""
    return next(int(helper.get_attribute_value(a)) for a in node.attribute if a.name == "to")
