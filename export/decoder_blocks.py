"""Where the decoder's blocks stand in a graph: found by what they compute, in whatever order of axes torch wrote it.

Axes are numbered B 0, C 1, H 2, W 3. Transpositions may stand anywhere in a block: each step below sees through them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tclkit.runtime.errors import ExportError

from .graph_edit import GraphIndex, cast_type

Axes = tuple[int, ...]
CHANNELS_FIRST: Axes = (0, 1, 2, 3)
CHANNELS_LAST: Axes = (0, 2, 3, 1)
_FOLDED_AWAY = 64  # elements; weights above are left out when shapes are inferred


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """x + conv(GELU(norm(x))), and the weights of the convolution.

    sum_axes: order of the axes of what `add` makes.
    weight: (C, C, 3, 3), O before I. bias: (C,). Both float32, or float64 in a graph of that type.
    """

    norm: NodeProto
    gelu: NodeProto
    conv: NodeProto
    add: NodeProto
    sum_axes: Axes
    weight: NDArray[np.floating]
    bias: NDArray[np.floating]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderBlock:
    """An upsampling block in the direct form.

    repeat: the Resize it begins with. grid: (h, w) of what that reads.
    tokens: (B, hw, C) that were laid out for it to read, if they were.
    """

    repeat: NodeProto
    grid: tuple[int, int]
    tokens: str | None
    first: Branch
    second: Branch

    @property
    def output(self) -> str:
        """The tensor it ends in."""
        return str(self.second.add.output[0])


def find_blocks(model: onnx.ModelProto) -> list[DecoderBlock]:
    """Find the decoder's blocks, in the order of their running.

    Args:
        model: an image graph; weights may be stored as float16 behind a Cast.

    Raises:
        ExportError: there is none, or a repetition begins something else.
    """
    finder = _Finder(model)
    blocks = [finder.block(node) for node in model.graph.node if finder.is_repetition(node)]
    if not blocks:
        raise _no_decoder("no map is repeated")
    return blocks


def transposed(axes: Axes, node: NodeProto) -> Axes:
    """The order of axes behind a Transpose."""
    order = next((list(a.ints) for a in node.attribute if a.name == "perm"), list(reversed(range(len(axes)))))
    return tuple(axes[i] for i in order)


class _Finder:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._index, self._sizes = GraphIndex(model), _sizes(model)

    def is_repetition(self, node: NodeProto) -> bool:
        """Whether it repeats every cell of a (B, C, h, w) map twice on both axes."""
        if node.op_type != "Resize" or len(node.input) < 3 or _attributes(node).get("mode") != b"nearest":
            return False
        scales = self._index.weights.get(node.input[2])
        return scales is not None and numpy_helper.to_array(scales).tolist() == [1, 1, 2, 2]

    def block(self, repeat: NodeProto) -> DecoderBlock:
        """The block that a repetition begins."""
        sizes = self._sizes.get(repeat.input[0], ())
        if len(sizes) != 3 or not all(sizes):
            raise _no_decoder(f"the size of {repeat.input[0]} is not known")
        first = self._branch(repeat.output[0], CHANNELS_FIRST)
        second = self._branch(first.add.output[0], first.sum_axes)
        tokens = self._tokens(repeat.input[0], sizes)
        return DecoderBlock(repeat=repeat, grid=(sizes[1], sizes[2]), tokens=tokens, first=first, second=second)

    def _tokens(self, tensor: str, sizes: Sequence[int]) -> str | None:
        """What a map (B, C, h, w) was made of, if by Transpose and Reshape of (B, hw, C)."""
        laid_out = self._index.maker.get(tensor)
        if laid_out is None or laid_out.op_type != "Reshape":
            return None
        turned, (width, h, w) = self._index.maker.get(laid_out.input[0]), sizes
        if turned is None or turned.op_type != "Transpose" or transposed((0, 1, 2), turned) != (0, 2, 1):
            return None
        return str(turned.input[0]) if self._sizes.get(turned.output[0]) == (width, h * w) else None

    def _branch(self, source: str, source_axes: Axes) -> Branch:
        norm, norm_axes = self._reader("LayerNormalization", source, source_axes)
        if norm_axes != CHANNELS_LAST or _attributes(norm).get("axis", -1) not in (-1, 3):
            raise _no_decoder(f"{norm.name} does not normalise channels")
        gelu, gelu_axes = self._reader("Gelu", norm.output[0], norm_axes)
        conv, conv_axes = self._reader("Conv", gelu.output[0], gelu_axes)
        if conv_axes != CHANNELS_FIRST:
            raise _no_decoder(f"{conv.name} does not read channels first")
        weight_OIkk, bias_O = self._conv_weights(conv)
        add, sum_axes = self._reader("Add", conv.output[0], conv_axes)
        if not any(self._is(name, source, source_axes, sum_axes) for name in add.input):
            raise _no_decoder(f"{add.name} does not add {conv.name} to what the branch reads")
        return Branch(norm=norm, gelu=gelu, conv=conv, add=add, sum_axes=sum_axes, weight=weight_OIkk, bias=bias_O)

    def _reader(self, operator: str, tensor: str, axes: Axes) -> tuple[NodeProto, Axes]:
        """The operator that reads a tensor, and the order of axes in which it does."""
        waiting = [(tensor, axes)]
        for name, order in waiting:  # grows while it is walked
            for node in self._index.readers[name]:
                if node.op_type == operator:
                    return node, order
                if node.op_type == "Transpose":
                    waiting.append((node.output[0], transposed(order, node)))
        raise _no_decoder(f"no {operator} reads {tensor}")

    def _is(self, tensor: str, source: str, source_axes: Axes, axes: Axes) -> bool:
        """Whether a tensor is the source with its axes in this order."""
        turns = []
        while tensor != source:
            maker = self._index.maker.get(tensor)
            if maker is None or maker.op_type != "Transpose":
                return False
            turns.append(maker)
            tensor = maker.input[0]
        for turn in reversed(turns):
            source_axes = transposed(source_axes, turn)
        return source_axes == axes

    def _conv_weights(self, conv: NodeProto) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        attributes = _attributes(conv)
        padded = list(attributes.get("pads", [])) == [1, 1, 1, 1] and attributes.get("auto_pad") in (None, b"NOTSET")
        plain = attributes.get("group", 1) == 1 and all(
            set(attributes.get(name, [1])) == {1} for name in ("strides", "dilations")
        )
        weight_OIkk, bias_O = (self._values(name) for name in [*conv.input[1:], "", ""][:2])
        if weight_OIkk is None or bias_O is None or weight_OIkk.shape[2:] != (3, 3) or not (padded and plain):
            raise _no_decoder(f"{conv.name} is no 3x3 convolution with float weights and a bias")
        return weight_OIkk, bias_O

    def _values(self, name: str) -> NDArray[np.floating] | None:
        """A float weight, if it is one: float32 or float64, stored so or as float16 behind a Cast."""
        maker = self._index.maker.get(name)
        is_stored_half = maker is not None and maker.op_type == "Cast" and cast_type(maker) == TensorProto.FLOAT
        tensor = self._index.weights.get(maker.input[0] if is_stored_half and maker is not None else name)
        if tensor is None:
            return None
        if is_stored_half and tensor.data_type == TensorProto.FLOAT16:
            return numpy_helper.to_array(tensor).astype(np.float32)
        return numpy_helper.to_array(tensor) if tensor.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE) else None


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _sizes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Sizes of every tensor but for its batch, 0 where one is not known."""
    inferred = onnx.shape_inference.infer_shapes(_without_weights(model), data_prop=True)
    values = (*inferred.graph.value_info, *inferred.graph.input)
    return {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]) for value in values}


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its large weights as inputs: shapes are inferred from copies of what is passed on."""
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph, source = bare.graph, model.graph
    graph.node.extend(source.node)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    for tensor in source.initializer:
        if np.prod(tensor.dims) > _FOLDED_AWAY:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        else:
            graph.initializer.append(tensor)
    return bare


def _no_decoder(what: str) -> ExportError:
    return ExportError(
        f"the graph has no decoder in the direct form: {what}. What can be rewritten is a float32 image graph as "
        "tclkit export --decoder direct (the default) writes it: give that one, or export the checkpoint again"
    )
