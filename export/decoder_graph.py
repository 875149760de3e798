"""The decoder of an exported image graph in another form, without torch: devices derive their own.

Channels stand last throughout a rewritten block, and each product is a matrix of its own: no runtime has to stack the
slices, INT8 has a scale for each, and the names of weights begin with their block, by which the quantiser knows them.

Shapes: B batch, C width, h w grid, H W grid twice as fine, T U tiles down and across, m outputs of a tile on an axis.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from .decoder import DIFFERENCES, WINOGRAD, DecoderForm, Rows, TileScheme, require_known_form
from .decoder_blocks import CHANNELS_LAST, Axes, Branch, DecoderBlock, find_blocks, transposed

_Values = NDArray[np.floating]


def rewrite_decoder(model: onnx.ModelProto, form: DecoderForm) -> onnx.ModelProto:
    """Write the decoder of a float32 image graph in another form that computes the same; see decoder.py.

    Args:
        model: float32 image graph with the direct decoder, as `tclkit export` writes it; weights may be stored as
            float16 behind a Cast. It is not changed.
        form: what to write; "direct" gives a copy.

    Returns:
        A new graph with the same inputs and outputs. Weights are folded in float64 and stored as float32 (as float64,
        where those of the convolution are).

    Raises:
        ConfigError: unknown form.
        ExportError: the graph has no decoder in the direct form: it is another graph, in another precision, or its
            decoder was rewritten before.
    """
    require_known_form(form)
    blocks = find_blocks(model)
    if form == "direct":
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy
    writer = _Writer(model, blocks[0].first.bias.dtype)
    ends = {block.output: (f"grounder.decoder.{i}", block) for i, block in enumerate(blocks)}
    for node in model.graph.node:
        if node.output[0] in ends:
            _write_block(writer, *ends[node.output[0]], form)
        else:
            writer.copy(node)
    return writer.finished()


def _write_block(writer: "_Writer", place: str, block: DecoderBlock, form: DecoderForm) -> None:
    """Write a block; only the first branch's convolution repeats, and adds the repeated map itself."""
    writer.place = f"{place}.conv1"
    (h, w), first, second = block.grid, block.first, block.second
    if block.tokens is None:
        x_BhwC = writer.channels_last(block.repeat.input[0])
    else:
        x_BhwC = writer.reshape(block.tokens, [-1, h, w, len(first.bias)])
    if form == "phases":
        repeated_BHWC = writer.channels_last(block.repeat.output[0])
        y_BHWC = writer.add("Add", [_phases(writer, x_BhwC, (h, w), first), repeated_BHWC], "sum")
    else:
        y_BHWC = _tiled(writer, _activated(writer, x_BhwC, first), (h, w), first, DIFFERENCES, x_BhwC)
    writer.place = f"{place}.conv2"
    if form in WINOGRAD:
        z_BHWC = _tiled(writer, _activated(writer, y_BHWC, second), (2 * h, 2 * w), second, WINOGRAD[form])
    else:
        z_BCHW = writer.like(second.conv, [_activated_first(writer, y_BHWC, second), *second.conv.input[1:]])
        z_BHWC = writer.add("Transpose", [z_BCHW], "last", perm=CHANNELS_LAST)
    writer.end_block(block.output, writer.add("Add", [y_BHWC, z_BHWC], "sum"), second.sum_axes)


def _activated(writer: "_Writer", x_BhwC: str, branch: Branch) -> str:
    normed_BhwC = writer.like(branch.norm, [x_BhwC, *branch.norm.input[1:]])
    return writer.like(branch.gelu, [normed_BhwC])


def _activated_first(writer: "_Writer", x_BhwC: str, branch: Branch) -> str:
    """The same with channels first; GELU comes last, where the quantiser balances channels behind it."""
    normed_BhwC = writer.like(branch.norm, [x_BhwC, *branch.norm.input[1:]])
    return writer.like(branch.gelu, [writer.add("Transpose", [normed_BhwC], "first", perm=[0, 3, 1, 2])])


def _phases(writer: "_Writer", x_BhwC: str, grid: tuple[int, int], branch: Branch) -> str:
    """The 3x3 convolution of a repeated map as one 2x2 convolution of the map, to four channels in place of each.

    At the corner between four pixels it computes the four repeated pixels around the corner. Of taps w0 w1 w2 the
    later pixel of a pair sees (w0 + w1, w2), the earlier one of the next pair (w0, w1 + w2).
    """
    pairs_p2k = np.array([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]], np.float64)
    half = np.einsum("pai,ocij->pocaj", pairs_p2k, branch.weight.astype(np.float64))
    weight_pqOI22 = np.einsum("pocaj,qbj->pqocab", half, pairs_p2k)
    (h, w), width, kind = grid, len(branch.bias), branch.bias.dtype
    weight = writer.weight("phases.weight", weight_pqOI22.reshape(4 * width, width, 2, 2).astype(kind))
    bias = writer.weight("phases.bias", np.tile(branch.bias, 4))
    x_BChw = _activated_first(writer, x_BhwC, branch)
    y_BKhw = writer.add("Conv", [x_BChw, weight, bias], "phases", kernel_shape=[2, 2], pads=[1, 1, 1, 1])  # K = 4C
    rows, columns = h + 1, w + 1  # corners
    y_BpqChw = writer.reshape(y_BKhw, [-1, 2, 2, width, rows, columns])
    y_BhpwqC = writer.add("Transpose", [y_BpqChw], "phases", perm=[0, 4, 1, 5, 2, 3])
    y_BHWC = writer.reshape(y_BhpwqC, [-1, 2 * rows, 2 * columns, width])
    return writer.slice(y_BHWC, [1, 1], [2 * rows - 1, 2 * columns - 1], [1, 2])


def _tiled(
    writer: "_Writer",
    x_BhwC: str,
    grid: tuple[int, int],
    branch: Branch,
    scheme: TileScheme,
    residual_BhwC: str | None = None,
) -> str:
    """A 3x3 convolution by a scheme: slices of the map, sums of them, products, sums of those, interleaved.

    With repetition the result is twice as fine, and the repeated residual is added.
    """
    rows_BTwC = _rows(writer, x_BhwC, grid, scheme)  # summed down before they are cut across, where windows overlap
    values_BTUC = [
        writer.combined(_cells(writer, row, grid, scheme), scheme.sums)
        for row in writer.combined(rows_BTwC, scheme.sums)
    ]
    factors = (writer.weight(f"products.{i}.weight", factor) for i, factor in enumerate(_factors(branch, scheme)))
    products = [
        [writer.add("MatMul", [values_BTUC[a][b], next(factors)], "product") for b in scheme.reads]
        for a in scheme.reads
    ]
    bias, steady = writer.weight("bias", branch.bias), scheme.steady
    products[steady][steady] = writer.add("Add", [products[steady][steady], bias], "sum")
    # Across first, line by line: a line's products are let go of before the next one's are made.
    lines = [_stacked(writer, writer.combined(row, scheme.outputs)) for row in products]
    outputs = writer.combined(lines, scheme.outputs)
    if residual_BhwC is not None:
        outputs = _with_repeated(writer, outputs, residual_BhwC, grid, scheme)
    return _interleaved(writer, outputs, grid, len(branch.bias), scheme)


def _rows(writer: "_Writer", x_BhwC: str, grid: tuple[int, int], scheme: TileScheme) -> list[str]:
    """Every line of the windows that a scheme's tiles read, in a map with zeros around: (B, T, w + more, C)."""
    spans = [_span(length, scheme) for length in grid]
    more_h, more_w = (span + scheme.window - 2 - length for span, length in zip(spans, grid, strict=True))
    padded = writer.add("Pad", [x_BhwC, writer.whole([0, 1, 1, 0, 0, more_h, more_w, 0])], "padded", mode="constant")
    return [writer.slice(padded, [k], [k + spans[0]], [1], [scheme.stride]) for k in range(scheme.window)]


def _cells(writer: "_Writer", row_BTwC: str, grid: tuple[int, int], scheme: TileScheme) -> list[str]:
    """Every cell of one line of the windows: (B, T, U, C)."""
    span = _span(grid[1], scheme)
    return [writer.slice(row_BTwC, [k], [k + span], [2], [scheme.stride]) for k in range(scheme.window)]


def _span(length: int, scheme: TileScheme) -> int:
    """From the first tile's place to behind the last one's."""
    return scheme.stride * (scheme.count_tiles(length) - 1) + 1


def _factors(branch: Branch, scheme: TileScheme) -> Iterator[_Values]:
    """The matrix (I, O) of every product, row by row; folded one by one, for in float64 all would be large."""
    taps = np.array(scheme.taps, np.float64)
    weight_kkIO = branch.weight.transpose(2, 3, 1, 0).astype(np.float64, order="C")
    for down in taps:
        weight_kIO = np.tensordot(down, weight_kkIO, 1)
        for across in taps:
            yield np.tensordot(across, weight_kIO, 1).astype(branch.weight.dtype)


def _with_repeated(
    writer: "_Writer", outputs: Sequence[str], residual_BhwC: str, grid: tuple[int, int], scheme: TileScheme
) -> list[str]:
    """Add to every line of a tile's outputs, (B, m, T, U, C), what repetition would have put there."""
    rows, lines = _rows(writer, residual_BhwC, grid, scheme), {}
    for a in sorted(set(scheme.repeats)):
        cells = _cells(writer, rows[a], grid, scheme)
        lines[a] = _stacked(writer, [cells[b] for b in scheme.repeats])
    return [writer.add("Add", [y, lines[a]], "sum") for y, a in zip(outputs, scheme.repeats, strict=True)]


def _stacked(writer: "_Writer", maps: Sequence[str]) -> str:
    """Maps (B, ...) as one (B, m, ...): for one image they lie behind each other, and a runtime need not copy them."""
    axis = writer.whole([1])
    return writer.add("Concat", [writer.add("Unsqueeze", [x, axis], "stacked") for x in maps], "stack", axis=1)


def _interleaved(
    writer: "_Writer", outputs: Sequence[str], grid: tuple[int, int], width: int, scheme: TileScheme
) -> str:
    """Lay tiles out and cut off what lies beside the map; m lines (B, m, T, U, C) of outputs hold each tile's."""
    m, (rows, columns) = scheme.size, (scheme.count_tiles(length) for length in grid)
    y_BTmUmC = writer.add("Transpose", [_stacked(writer, outputs)], "tiles", perm=[0, 3, 1, 4, 2, 5])
    y_BHWC = writer.reshape(y_BTmUmC, [-1, m * rows, m * columns, width])
    top, finer = scheme.lead, scheme.size // scheme.stride
    bottom, right = (top + finer * length for length in grid)
    if (top, bottom, right) == (0, m * rows, m * columns):
        return y_BHWC
    return writer.slice(y_BHWC, [top, top], [bottom, right], [1, 2])


class _Writer:
    """Writes the nodes of a new graph one after the other. Methods that add one return the tensor that it makes.

    place: what the names of new tensors and weights begin with.
    """

    def __init__(self, model: onnx.ModelProto, kind: np.dtype[Any]) -> None:
        self._old, self._kind = model, kind
        self._new = onnx.ModelProto(
            ir_version=model.ir_version,
            opset_import=model.opset_import,
            producer_name=model.producer_name,
            producer_version=model.producer_version,
        )
        self._constants: dict[str, TensorProto] = {}
        self._outputs = {value.name for value in model.graph.output}
        self._nodes: list[NodeProto] = []
        self._ends: dict[str, tuple[str, Axes]] = {}  # end of a block -> the same with channels last, its own axes
        self._renamed: dict[str, str] = {}
        self._scaled: dict[tuple[str, float], str] = {}
        self.place = ""

    def copy(self, node: NodeProto) -> None:
        """Write a node as it is; a transposition that only brings a block's channels last is left out."""
        if node.op_type == "Transpose" and node.input[0] in self._ends and node.output[0] not in self._outputs:
            last, axes = self._ends[node.input[0]]
            if transposed(axes, node) == CHANNELS_LAST:
                self._renamed[node.output[0]] = last
                return
        new = NodeProto()
        new.CopyFrom(node)
        for i, name in enumerate(node.input):
            new.input[i] = self._renamed.get(name, name)
        self._nodes.append(new)

    def end_block(self, tensor: str, y_BHWC: str, axes: Axes) -> None:
        """Give the end of a block its name in the old graph, with its axes in the old order."""
        self._ends[tensor] = (y_BHWC, axes)
        perm = [CHANNELS_LAST.index(axis) for axis in axes]
        self._nodes.append(helper.make_node("Transpose", [y_BHWC], [tensor], tensor, perm=perm))

    def channels_last(self, tensor: str) -> str:
        """A tensor of the old graph, (B, C, h, w), as (B, h, w, C)."""
        if tensor in self._ends:
            return self._ends[tensor][0]
        return self.add("Transpose", [tensor], "last", perm=CHANNELS_LAST)

    def like(self, node: NodeProto, inputs: Sequence[str]) -> str:
        """A node of the same kind and attributes."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        return self.add(node.op_type, inputs, node.op_type.lower(), **attributes)

    def add(self, operator: str, inputs: Sequence[str], kind: str, **attributes: Any) -> str:
        """A node, named after its place, kind and number."""
        name = f"{self.place}.{kind}.{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def combined(self, maps: Sequence[str], steps: Sequence[Rows]) -> list[str]:
        """Apply matrices to a column or row of maps, one after the other."""
        for rows in steps:
            maps = [self._weighted_sum(maps, row) for row in rows]
        return list(maps)

    def slice(
        self, x: str, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int] = ()
    ) -> str:
        """x[starts:ends:steps] on some axes."""
        return self.add("Slice", [x, *(self.whole(part) for part in (starts, ends, axes, steps) if part)], "slice")

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """x in another shape; -1 stands for B."""
        return self.add("Reshape", [x, self.whole(shape)], "reshape")

    def whole(self, values: Sequence[int]) -> str:
        """A constant vector of whole numbers."""
        name = f"grounder.decoder.whole.{'_'.join(map(str, values))}"
        self._constants[name] = numpy_helper.from_array(np.array(values, np.int64), name)
        return name

    def weight(self, name: str, values: _Values) -> str:
        """A weight of this place."""
        name = f"{self.place}.{name}"
        self._new.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def finished(self) -> onnx.ModelProto:
        """The new graph, without what nothing reads."""
        read, nodes = set(self._outputs), []
        for node in reversed(self._nodes):
            if read.intersection(node.output):
                read.update(node.input)
                nodes.append(node)
        old, new = self._old.graph, self._new.graph
        new.name = old.name
        new.node.extend(reversed(nodes))
        new.input.extend(old.input)
        new.output.extend(old.output)
        tensors = (*old.initializer, *self._constants.values())
        new.initializer.extend(tensor for tensor in tensors if tensor.name in read)
        return self._new

    def _weighted_sum(self, maps: Sequence[str], factors: Sequence[float]) -> str:
        """Sum of maps times factors, with no product by 1 and no change of sign alone: each is a pass of memory."""
        terms = sorted(((f, x) for f, x in zip(factors, maps, strict=True) if f), key=lambda term: term[0] < 0)
        total = self._times(terms[0][1], terms[0][0])
        for factor, x in terms[1:]:
            total = self.add("Add" if factor > 0 else "Sub", [total, self._times(x, abs(factor))], "sum")
        return total

    def _times(self, x: str, factor: float) -> str:
        assert factor > 0  # every row of every scheme begins with one, its terms sorted
        if factor == 1:
            return x
        if (x, factor) not in self._scaled:
            name = f"grounder.decoder.times.{factor:g}"
            self._constants[name] = numpy_helper.from_array(np.array(factor, self._kind), name)
            self._scaled[x, factor] = self.add("Mul", [x, name], "times")
        return self._scaled[x, factor]
