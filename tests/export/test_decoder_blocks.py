"""Where a graph's decoder blocks are, whatever the order of axes; and what is none."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tclkit.export.decoder_blocks import CHANNELS_FIRST, CHANNELS_LAST, find_blocks, transposed
from tclkit.runtime.errors import ExportError

from .decoder_models import ALL_LAST, AS_EXPORTED, ORDERS, decoder_graph
from .precision_models import shipped_graph

Edit = Callable[[onnx.ModelProto], None]


def of_kind(model: onnx.ModelProto, operator: str) -> onnx.NodeProto:
    """The last node of a kind."""
    return [node for node in model.graph.node if node.op_type == operator][-1]


def set_attribute(model: onnx.ModelProto, operator: str, name: str, value: object) -> None:
    node = of_kind(model, operator)
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_blocks_are_found_in_their_order(order: str, blocks: int) -> None:
    model = decoder_graph((3, 5), blocks=blocks, order=order)
    found = find_blocks(model)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert [block.grid for block in found] == [(3 * 2**i, 5 * 2**i) for i in range(blocks)]
    for i, block in enumerate(found):
        for name, branch in (("conv1", block.first), ("conv2", block.second)):
            assert branch.conv.input[1] == f"grounder.decoder.{i}.{name}.conv.weight"
            assert np.array_equal(branch.weight, weights[branch.conv.input[1]])
            assert np.array_equal(branch.bias, weights[branch.conv.input[2]])
            assert branch.sum_axes == (CHANNELS_FIRST if order == AS_EXPORTED else CHANNELS_LAST)
        assert block.output == block.second.add.output[0]


def test_tokens_before_the_first_block() -> None:
    assert [block.tokens for block in find_blocks(decoder_graph((3, 5), blocks=2, tokens=True))] == ["x", None]
    assert [block.tokens for block in find_blocks(decoder_graph((3, 5)))] == [None]


def test_maps_of_other_channels_are_no_tokens() -> None:
    model = decoder_graph((3, 5), tokens=True)  # (B, 30, 3) turned to (B, 3, 30) and cut anew: not the same order
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[1].dim_value, dims[2].dim_value = 30, 3
    assert find_blocks(model)[0].tokens is None


def test_the_blocks_of_the_shipped_graph() -> None:
    found = find_blocks(shipped_graph())
    assert [block.grid for block in found] == [(16, 16), (32, 32)]
    assert [block.tokens is None for block in found] == [False, True]
    assert all(branch.weight.dtype == np.float32 for block in found for branch in (block.first, block.second))


def test_weights_behind_a_cast_are_read(model: onnx.ModelProto) -> None:
    node, graph = of_kind(model, "Conv"), model.graph
    (tensor,) = (tensor for tensor in graph.initializer if tensor.name == node.input[1])
    values = numpy_helper.to_array(tensor).astype(np.float16)
    tensor.CopyFrom(numpy_helper.from_array(values, "stored"))
    graph.node.insert(0, helper.make_node("Cast", ["stored"], [node.input[1]], to=TensorProto.FLOAT))
    assert np.array_equal(find_blocks(model)[0].second.weight, values.astype(np.float32))


@pytest.fixture
def model() -> onnx.ModelProto:
    return decoder_graph(dtype=np.float32)


def unnamed_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "h"


def other_scales(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([1, 1, 2, 4], np.float32), "scales"))


def computed_weight(model: onnx.ModelProto) -> None:
    node = of_kind(model, "Conv")
    model.graph.node.insert(0, helper.make_node("Identity", [node.input[1]], ["computed"]))
    node.input[1] = "computed"


def half_weights(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.endswith("conv.weight"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))


def no_bias(model: onnx.ModelProto) -> None:
    del of_kind(model, "Conv").input[2:]


def another_residual(model: onnx.ModelProto) -> None:
    first, second = [node for node in model.graph.node if node.op_type == "Add"][:2]
    second.input[0] = first.input[0]


def no_norm(model: onnx.ModelProto) -> None:
    of_kind(model, "LayerNormalization").op_type = "Softmax"


def turned(model: onnx.ModelProto) -> None:
    gelu = of_kind(model, "Gelu")
    (turn,) = (node for node in model.graph.node if node.output[0] == gelu.input[0])
    turn.attribute[0].CopyFrom(helper.make_attribute("perm", [0, 3, 2, 1]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (unnamed_size, "the size of x is not known"),
        (other_scales, "no map is repeated"),
        (lambda m: set_attribute(m, "Resize", "mode", "linear"), "no map is repeated"),
        (
            lambda m: set_attribute(m, "LayerNormalization", "axis", 1),
            "layernormalization_.* does not normalise channels",
        ),
        (lambda m: set_attribute(m, "Conv", "pads", [0, 0, 0, 0]), "conv_.* is no 3x3 convolution with float weights"),
        (lambda m: set_attribute(m, "Conv", "strides", [2, 2]), "is no 3x3 convolution"),
        (lambda m: set_attribute(m, "Conv", "group", 2), "is no 3x3 convolution"),
        (lambda m: set_attribute(m, "Conv", "auto_pad", "SAME_UPPER"), "is no 3x3 convolution"),
        (computed_weight, "is no 3x3 convolution with float weights and a bias"),
        (half_weights, "is no 3x3 convolution with float weights and a bias"),
        (no_bias, "is no 3x3 convolution with float weights and a bias"),
        (another_residual, "add_.* does not add conv_.* to what the branch reads"),
        (no_norm, "no LayerNormalization reads add_"),
        (turned, "conv_.* does not read channels first"),
    ],
)
def test_what_is_no_block_is_refused(model: onnx.ModelProto, edit: Edit, message: str) -> None:
    edit(model)
    with pytest.raises(ExportError, match=rf"no decoder in the direct form: .*{message}.*--decoder direct"):
        find_blocks(model)


def test_a_residual_with_its_axes_in_another_order_is_refused() -> None:
    model = decoder_graph((6, 6), width=12, order=ALL_LAST)  # a map of 12 x 12 with 12 channels: turned, it still fits
    add = [node for node in model.graph.node if node.op_type == "Add"][1]
    model.graph.node.insert(
        [*model.graph.node].index(add), helper.make_node("Transpose", [add.input[0]], ["turned"], perm=[0, 2, 1, 3])
    )
    add.input[0] = "turned"
    with pytest.raises(ExportError, match="does not add"):
        find_blocks(model)


def test_a_graph_without_a_decoder_is_refused() -> None:
    model = onnx.ModelProto()
    with pytest.raises(ExportError, match="no map is repeated"):
        find_blocks(model)


@pytest.mark.parametrize(
    ("perm", "axes"), [([0, 2, 3, 1], (0, 2, 3, 1)), ([0, 1, 3, 2], (0, 1, 3, 2)), (None, (3, 2, 1, 0))]
)
def test_axes_behind_a_transposition(perm: list[int] | None, axes: tuple[int, ...]) -> None:
    attributes = {} if perm is None else {"perm": perm}
    assert transposed(CHANNELS_FIRST, helper.make_node("Transpose", ["x"], ["y"], **attributes)) == axes
