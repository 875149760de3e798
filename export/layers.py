"""The layers of an image graph that may be quantised: every Conv, MatMul and Gemm with a weight of its own.

The patch embedding is not among them: its input is bytes, of which int8 with zero point 0 keeps 7 bits, and it is a
thousandth of the work. Residual adds, norms, softmax, attention's own products and the comparison with texts never are.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import NodeProto

from .graph_edit import GraphIndex

_CHANNEL_AXIS = {"Conv": 0, "MatMul": 1, "Gemm": 1}  # of the weight; Gemm's changes with transB
_BLOCK = re.compile(r"^(trunk\.\d+|grounder\.decoder\.\d+|grounder\.block|kp\.block)\b")
_DECODER = "grounder.decoder."


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One Conv, MatMul or Gemm whose weight is a constant.

    name: its place in the model, such as "trunk.3.mlp.up".
    node: name of the first output of its node, which identifies it.
    activation: tensor it reads. weight: name of its weight.
    channel_axis: axis of the weight that counts output channels.
    multiplications: of one image, where the sizes are known.
    """

    name: str
    node: str
    activation: str
    weight: str
    channel_axis: int
    multiplications: int

    @property
    def block(self) -> str:
        """The block it belongs to, such as "trunk.3" or "grounder.decoder.0"; its own name outside of any."""
        found = _BLOCK.match(self.name)
        return found[0] if found else self.name

    @property
    def is_decoder(self) -> bool:
        """Whether it is one of the grounder's convolutions, where most of the work and the least risk is."""
        return self.name.startswith(_DECODER)


def quantizable_layers(model: onnx.ModelProto) -> list[Layer]:
    """The layers of a float32 image graph that may be quantised, in the order of their running."""
    index, sizes = GraphIndex(model), _output_sizes(model)
    layers = []
    for node in model.graph.node:
        if node.op_type not in _CHANNEL_AXIS or len(node.input) < 2 or node.input[1] not in index.weights:
            continue
        if _reads_bytes(node, index):
            continue
        weight, axis = index.weights[node.input[1]], _channel_axis(node)
        positions = sizes.get(node.output[0], 0) // weight.dims[axis]
        layers.append(
            Layer(
                name=_name(node, index),
                node=node.output[0],
                activation=node.input[0],
                weight=node.input[1],
                channel_axis=axis,
                multiplications=positions * math.prod(weight.dims),
            )
        )
    return layers


def _channel_axis(node: NodeProto) -> int:
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if transposed else _CHANNEL_AXIS[node.op_type]


def _name(node: NodeProto, index: GraphIndex) -> str:
    """Place in the model, from the names of the weights: torch keeps those of biases and of convolutions' weights.

    A weight with several readers names none of them: older exports merged equal weights under the name of the first.
    """
    names: Sequence[str] = node.input[1:]
    readers = index.readers[node.output[0]]
    if len(readers) == 1 and readers[0].op_type == "Add":
        names = [*names, *readers[0].input]
    for name in names:
        if not _is_own(name, index):
            continue
        place, dot, kind = name.rpartition(".")
        if dot and kind in ("weight", "bias"):
            return place
    return _projection_name(node, index) or node.name or node.output[0]


def _projection_name(node: NodeProto, index: GraphIndex) -> str | None:
    """A matrix without bias behind a norm is named after the norm: grounder.ln -> grounder.projection."""
    maker = index.maker.get(node.input[0])
    if maker is None or maker.op_type != "LayerNormalization":
        return None
    own = [str(name) for name in maker.input[1:] if _is_own(name, index)]
    norm = own[0].rpartition(".")[0] if own else ""
    return norm.rpartition(".")[0] + ".projection" if "." in norm else None


def _is_own(name: str, index: GraphIndex) -> bool:
    """Whether this is a weight with one reader."""
    return name in index.weights and len(index.readers[name]) == 1


def _reads_bytes(node: NodeProto, index: GraphIndex) -> bool:
    """Whether nothing but casts and reorderings stands between the image and this node."""
    maker = index.maker.get(node.input[0])
    while maker is not None and maker.op_type in ("Cast", "Transpose", "Reshape"):
        maker = index.maker.get(maker.input[0])
    return maker is None


def _output_sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Elements of every tensor for one image; tensors of unknown size are left out."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    sizes = {}
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        dims = value.type.tensor_type.shape.dim
        known = [dim.dim_value for dim in dims[1:]]
        if dims and all(known):
            sizes[value.name] = math.prod(known)
    return sizes
