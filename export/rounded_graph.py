"""A half-precision graph as a CPU can run it faithfully: computed in float32, every tensor rounded to half.

ONNX Runtime has few half-precision kernels for CPUs; what lacks one it computes in float32 from end to end, so that
neither rounding nor overflow ever shows. Here each result is cast to half and back, in the open: what a GPU would store
(its products of matrices add up in float32 too) is what the next operator reads.
"""

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from .graph_edit import cast_type, element_types, replace_nodes


def rounded_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make a float32 graph that gives the values of a strongly typed half-precision graph.

    Args:
        model: with inputs and outputs in other types than half; not changed.

    Raises:
        ExportError: the graph's types contradict each other.
    """
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    types = element_types(model)
    for tensor in rounded.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes: list[NodeProto] = []
    for node in rounded.graph.node:
        if node.op_type == "Cast" and cast_type(node) == TensorProto.FLOAT16:
            _retarget(node)
        nodes.append(node)
        for i, name in enumerate(node.output):
            if types.get(name) == TensorProto.FLOAT16:
                node.output[i] = f"{name}.exact"
                nodes += [
                    helper.make_node("Cast", [f"{name}.exact"], [f"{name}.stored"], to=TensorProto.FLOAT16),
                    helper.make_node("Cast", [f"{name}.stored"], [name], to=TensorProto.FLOAT),
                ]
    replace_nodes(rounded, nodes)
    rounded.graph.ClearField("value_info")
    return rounded


def _retarget(cast: NodeProto) -> None:
    del cast.attribute[:]
    cast.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
