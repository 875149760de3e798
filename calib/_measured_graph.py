"""An ONNX graph with measuring nodes beside its tensors, run on the CPU with ONNX Runtime.

Only what the measurements need is kept of the graph, and only small results leave it. The measuring nodes stand after
all others, those of the last tensor first: ONNX Runtime (measured with 1.32) starts its execution order from the last
node that nobody reads, so a tensor is measured and freed soon after it is made. In the order of the tensors they would
all run at the end with every tensor alive (a ViT-B/16 at 448x448, all 339 tensors: 3.8 GB instead of 0.3 GB).
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tclkit.runtime.errors import BackendError, InputError
from tclkit.runtime.processor import usable_cpus

Batch = NDArray[Any] | Mapping[str, NDArray[Any]]
MICROSOFT = "com.microsoft"

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
_SMALL_ELEMENTS = 4096  # constants up to this size may hold shapes and axes, which shape inference reads
_PREFIX = "tclkit_measured_"


class Tensors:
    """Types and shapes of a graph's tensors, by ONNX shape inference.

    Raises:
        InputError: the graph is not valid.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        weights = {weight.name for weight in model.graph.initializer}
        self._inputs = [info.name for info in model.graph.input if info.name not in weights]
        self._produced = [name for node in model.graph.node for name in node.output if name]
        try:
            graph = onnx.shape_inference.infer_shapes(_without_weights(model)).graph
        except Exception as error:  # onnx raises RuntimeError and its own, which share no base
            raise InputError(f"the graph is not valid ONNX: {_first_line(error)}") from error
        infos = (*graph.value_info, *graph.output, *graph.input)
        self._types = {info.name: info.type.tensor_type for info in infos if info.type.HasField("tensor_type")}

    def floats(self) -> list[str]:
        """Tensors made by nodes that are floats or of unknown type, in the graph's order; empty ones are left out."""
        return [name for name in self._produced if self._may_be_float(name) and not self._is_empty(name)]

    def check(self, names: Iterable[str]) -> None:
        """Refuse names of no input and of no node's output, and tensors that are not floats, with an InputError."""
        activations = dict.fromkeys((*self._inputs, *self._produced))
        for name in names:
            if name not in activations:
                close = difflib.get_close_matches(name, activations, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise InputError(f"the graph has no input or activation {name!r}.{hint}", tensor=name)
            if not self._may_be_float(name):
                kind = TensorProto.DataType.Name(self._types[name].elem_type)
                raise InputError(f"tensor {name!r} holds {kind}; only floats have a range", tensor=name)

    def is_float32(self, name: str) -> bool:
        """Whether the tensor is known to be float32."""
        return name in self._types and self._types[name].elem_type == TensorProto.FLOAT

    def rank(self, name: str) -> int:
        """Number of dimensions; InputError if shape inference does not know it."""
        if name not in self._types or not self._types[name].HasField("shape"):
            raise InputError(f"the number of dimensions of tensor {name!r} is not known", tensor=name)
        return len(self._types[name].shape.dim)

    def _may_be_float(self, name: str) -> bool:
        return name not in self._types or self._types[name].elem_type in _FLOATS | {TensorProto.UNDEFINED}

    def _is_empty(self, name: str) -> bool:
        if name not in self._types:
            return False
        return any(dim.HasField("dim_value") and dim.dim_value == 0 for dim in self._types[name].shape.dim)


class Measurement:
    """Nodes that measure tensors of a graph, and the session that runs them; see the module.

    Args:
        model: the graph; it is not changed.
        tensors: its types and shapes.
    """

    def __init__(self, model: onnx.ModelProto, tensors: Tensors) -> None:
        self._model, self._tensors = model, tensors
        self._blocks: list[list[onnx.NodeProto]] = []
        self._constants: list[onnx.TensorProto] = []
        self._outputs: list[str] = []
        self._opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)

    def add_extremes(self, tensor: str, channel_axis: int | None) -> None:
        """Measure largest, smallest and sum of magnitudes, of all or by channel; and the number of elements."""
        with _Block(self, tensor) as block:
            kept: dict[str, Any] = {"keepdims": 0}
            axes: list[str] = []
            if channel_axis is not None:
                others = _other_axes(tensor, self._tensors.rank(tensor), channel_axis)
                if self._opset >= 18:
                    axes = [block.constant(np.asarray(others, np.int64), "axes")]
                else:
                    kept["axes"] = others
            for operator in ("ReduceMax", "ReduceMin", "ReduceL1"):  # the sum is there for its NaN: maxima lose it
                block.node(operator, [block.source, *axes], result=True, **kept)
            block.node("Size", [block.source], result=True)

    def add_quantized(self, tensor: str, step: float) -> None:
        """Measure the tensor in whole steps, as int16."""
        with _Block(self, tensor) as block:
            inputs = [
                block.constant(np.asarray(step, np.float32), "step"),
                block.constant(np.asarray(0, np.int16), "zero"),
            ]
            # ONNX's own operator takes int16 from opset 21 on; this one is older, and it is a single vectorised pass.
            block.node("QuantizeLinear", [block.source, *inputs], result=True, domain=MICROSOFT)

    def runs(self, batches: Iterable[Batch]) -> Iterator[tuple[int, list[NDArray[Any]]]]:
        """Run batch after batch, image by image where the graph allows it.

        Yields (images run so far, results in the order they were added).

        Raises:
            InputError: there is no batch, or it does not fit the graph.
            BackendError: ONNX Runtime cannot load the graph.
        """
        session = _session_from_model(self._built())
        done = 0
        for feeds, images in _feeds(session, batches):
            try:
                results: list[NDArray[Any]] = session.run(self._outputs, feeds)
            except Exception as error:  # onnxruntime's own exceptions share no base but this
                shapes = ", ".join(f"{name} {value.dtype} {value.shape}" for name, value in feeds.items())
                raise InputError(f"ONNX Runtime could not run the graph on {shapes}: {_first_line(error)}") from error
            done += images
            yield done, results
            del results  # else these are alive beside the next ones
        if done == 0:
            raise InputError("there are no calibration images to measure activations on")

    def _built(self) -> onnx.ModelProto:
        wanted = {name for block in self._blocks for node in block for name in node.input}
        nodes = _nodes_behind(self._model, wanted)
        read = wanted | {name for node in nodes for name in _inputs_of(node)}
        built = onnx.ModelProto(ir_version=self._model.ir_version)
        built.opset_import.extend(self._model.opset_import)
        if not any(entry.domain == MICROSOFT for entry in built.opset_import):
            built.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
        built.functions.extend(self._model.functions)
        graph = built.graph
        graph.name = self._model.graph.name or "measured"
        graph.input.extend(self._model.graph.input)
        graph.initializer.extend(weight for weight in self._model.graph.initializer if weight.name in read)
        graph.sparse_initializer.extend(
            weight for weight in self._model.graph.sparse_initializer if weight.values.name in read
        )
        graph.initializer.extend(self._constants)
        graph.node.extend(nodes)
        for block in reversed(self._blocks):
            graph.node.extend(block)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._outputs)
        return built


class _Block:
    """The measuring nodes of one tensor."""

    def __init__(self, owner: Measurement, tensor: str) -> None:
        self._owner, self._nodes = owner, list[onnx.NodeProto]()
        self._name = f"{_PREFIX}{len(owner._blocks)}"
        self.source = tensor
        if not owner._tensors.is_float32(tensor):
            self.source = self.node("Cast", [tensor], to=TensorProto.FLOAT)

    def __enter__(self) -> "_Block":
        return self

    def __exit__(self, *_: object) -> None:
        self._owner._blocks.append(self._nodes)

    def node(self, operator: str, inputs: Sequence[str], *, result: bool = False, **attributes: Any) -> str:
        output = f"{self._name}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [output], name=output, **attributes))
        if result:
            self._owner._outputs.append(output)
        return output

    def constant(self, value: NDArray[Any], what: str) -> str:
        name = f"{self._name}_{what}"
        self._owner._constants.append(numpy_helper.from_array(value, name))
        return name


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with its large weights as inputs of their shape, so that shape inference need not copy them."""
    light = onnx.ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    graph = light.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    inputs = {info.name for info in model.graph.input}
    for weight in model.graph.initializer:
        if int(np.prod(weight.dims)) <= _SMALL_ELEMENTS:
            graph.initializer.append(weight)
        elif weight.name not in inputs:
            graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims)))
    return light


def _nodes_behind(model: onnx.ModelProto, names: set[str]) -> list[onnx.NodeProto]:
    """Nodes that the named tensors depend on, in the order of the graph."""
    wanted, kept = set(names), []
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(_inputs_of(node))
    return kept[::-1]


def _inputs_of(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, also from inside its branches and loop bodies."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _inputs_of(inner)
            yield from (info.name for info in graph.output)


def _other_axes(tensor: str, rank: int, channel_axis: int) -> list[int]:
    if not -rank <= channel_axis < rank:
        raise InputError(f"tensor {tensor!r} has {rank} dimensions; there is no axis {channel_axis}", tensor=tensor)
    return [axis for axis in range(rank) if axis != channel_axis % rank]


def _session_from_model(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised, and told once
    try:
        data = model.SerializeToString()
    except Exception as error:  # protobuf's error for 2 GB has changed its class over time
        raise InputError(f"the graph cannot be measured, it is too large: {_first_line(error)}") from error
    model.Clear()  # the weights are in `data` now
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base but this
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the graph to measure it: {_first_line(error)}"
        ) from error


def _feeds(
    session: onnxruntime.InferenceSession, batches: Iterable[Batch]
) -> Iterator[tuple[dict[str, NDArray[Any]], int]]:
    """(feeds, number of images) of every run; one image at a time unless the graph is made for a fixed batch."""
    inputs = session.get_inputs()
    for batch in batches:
        if isinstance(batch, Mapping):
            yield dict(batch), 1
            continue
        if len(inputs) != 1:
            names = ", ".join(entry.name for entry in inputs)
            raise InputError(f"the graph has the inputs {names}; give every batch as a mapping from these to arrays")
        name, shape = inputs[0].name, inputs[0].shape
        fixed = bool(shape) and isinstance(shape[0], int) and shape[0] > 1
        step = len(batch) if fixed else 1
        for start in range(0, len(batch), step):
            yield {name: np.ascontiguousarray(batch[start : start + step])}, step


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
