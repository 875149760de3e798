"""The modules of wrapper.py as ONNX files that ONNX Runtime, OpenVINO and TensorRT from 10.0 on all read."""

import ast
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.export import Dim

from tclkit.runtime.errors import ExportError
from tclkit.runtime.extras import install_command
from tclkit.runtime.files import atomic_file

from .decoder import DEFAULT_DECODER, DecoderForm
from .decoder_graph import rewrite_decoder
from .graph_edit import GraphIndex, replace_weights
from .graph_rules import IR_VERSION, LARGEST_FILE_BYTES, OPSET, check_graph
from .wrapper import ImageGraph, MasksGraph, TextGraph

_HALVED_FROM_SIZE = 1024  # elements; smaller tensors gain nothing


def write_image_graph(
    graph: ImageGraph, path: Path, *, half_weights: bool = False, decoder: DecoderForm = DEFAULT_DECODER
) -> None:
    """Write `image` uint8 [batch, H, W, 3] -> `grounded` [batch, D, s·h, s·w] (and `kp` [batch, D, h, w]).

    Args:
        graph: what to export.
        path: the file, never half written.
        half_weights: see `write_graph`.
        decoder: form of the decoder; see decoder.py.

    Raises:
        ConfigError: unknown form of the decoder.
        ExportError: see `write_graph`.
    """
    outputs = ["grounded", "kp"] if graph.kp is not None else ["grounded"]
    example = torch.zeros(2, *graph.size, 3, dtype=torch.uint8)
    dynamic = ({0: Dim("batch")},)
    model = _exported(graph, path.name, {"image": example}, outputs, dynamic)
    if decoder != DEFAULT_DECODER:
        model = rewrite_decoder(model, decoder)
    _write(model, path, half_weights=half_weights)


def write_masks_graph(graph: MasksGraph, embed_dim: int, path: Path) -> None:
    """Write `grounded`, `text` [prompts, D] (and `kp`, `kp_w`) -> `masks` [batch, prompts, s·h, s·w].

    Raises:
        ExportError: see `write_graph`.
    """
    batch, prompts, h, w, scale = Dim("batch"), Dim("prompts"), Dim("h"), Dim("w"), graph.mask_scale
    inputs = {"grounded": torch.zeros(2, embed_dim, scale * 3, scale * 5), "text": torch.zeros(4, embed_dim)}
    dynamic: list[dict[int, Any]] = [{0: batch, 2: scale * h, 3: scale * w}, {0: prompts}]
    if graph.with_kp:
        inputs |= {"kp": torch.zeros(2, embed_dim, 3, 5), "kp_w": torch.tensor(0.3)}
        dynamic += [{0: batch, 2: h, 3: w}, {}]
    write_graph(graph, path, inputs, ["masks"], dynamic)


def write_text_graph(graph: TextGraph, path: Path, *, half_weights: bool = False) -> None:
    """Write `token_ids` int64 [texts, tokens] -> `embeddings` [texts, D].

    Raises:
        ExportError: see `write_graph`.
    """
    dynamic = ({0: Dim("texts"), 1: Dim("tokens", max=len(graph.positions))},)
    example = torch.zeros(2, min(3, len(graph.positions)), dtype=torch.int64)
    write_graph(graph, path, {"token_ids": example}, ["embeddings"], dynamic, half_weights=half_weights)


def write_graph(
    module: nn.Module,
    path: Path,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic_shapes: Sequence[Mapping[int, Any]],
    *,
    half_weights: bool = False,
) -> None:
    """Export one module to one self-contained ONNX file and check it; the same module gives the same bytes.

    Args:
        module: in eval mode.
        path: the file, never half written.
        inputs: name -> example, in the order of the module's arguments.
        outputs: names.
        dynamic_shapes: for each input, axis -> torch.export.Dim.
        half_weights: store large weights as float16, each followed by a Cast to float32.

    Raises:
        ExportError: torch could not export it, or wrote what the runtimes we target do not read.
    """
    _write(_exported(module, path.name, inputs, outputs, dynamic_shapes), path, half_weights=half_weights)


def _write(model: onnx.ModelProto, path: Path, *, half_weights: bool) -> None:
    if half_weights:
        _halve_weights(model)
    size = model.ByteSize()
    if size > LARGEST_FILE_BYTES:
        raise ExportError(
            f"{path.name} would have {size / 1e9:.1f} GB, more than one ONNX file holds (2.1 GB). "
            "Export a smaller model, or with half_weights (--half-weights)",
            size_bytes=size,
        )
    check_graph(model, where=f"torch {torch.__version__} wrote {path.name}")
    with atomic_file(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def _exported(
    module: nn.Module,
    file: str,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic_shapes: Sequence[Mapping[int, Any]],
) -> onnx.ModelProto:
    with warnings.catch_warnings():
        # torch 2.15: axes that must be equal get one name, and it warns that the second is not used.
        warnings.filterwarnings("ignore", message="# The axis name: .* will not be used")
        try:
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=tuple(dynamic_shapes),
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # torch, onnxscript and onnx-ir each raise kinds of their own
            reason = str(error).strip().partition("\n")[0]
            raise ExportError(
                f"torch {torch.__version__} could not export {file}: {type(error).__name__}: {reason}. {_REMEDY}"
            ) from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    _unshare_weights(model)
    _strip(model)
    return model


_REMEDY = f"Install the versions that tclkit was tested with: {install_command('export', upgrade=True)}"


_KINDS: Mapping[str, Mapping[int, str]] = {
    "LayerNormalization": {1: "weight", 2: "bias"},
    "Conv": {1: "weight", 2: "bias"},
    "Gemm": {1: "weight", 2: "bias"},
    "MatMul": {1: "weight"},
    "Add": {0: "bias", 1: "bias"},
}
"""Operator -> input -> what a module calls it."""


def _unshare_weights(model: onnx.ModelProto) -> None:
    """Give every module its own weights under its own name again, where torch merged equal ones.

    The quantiser knows layers by these names and changes weights one by one; biases as initialised are all zero, and
    would all be called like the first of them. onnxscript: DeduplicateInitializersPass (seen with torch 2.14), which
    keeps the place of every node in its metadata.
    """
    index = GraphIndex(model)
    copies: dict[str, TensorProto] = {}
    shared = {
        name: tensor
        for name, tensor in index.weights.items()
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) and len(index.readers[name]) > 1
    }
    for node in model.graph.node:
        place = _module_of(node)
        for i, name in enumerate(node.input):
            kind = _KINDS.get(node.op_type, {}).get(i)
            own = f"{place}.{kind}"
            if name not in shared or not place or kind is None or own in index.weights:
                continue
            if own not in copies:
                copies[own] = TensorProto()
                copies[own].CopyFrom(shared[name])
                copies[own].name = own
            node.input[i] = own
    replace_weights(model, [*model.graph.initializer, *copies.values()])


def _module_of(node: NodeProto) -> str:
    """Name of the module that a node was traced in, such as "trunk.0.ln_1"; empty where torch did not say."""
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
    names = ast.literal_eval(scopes)  # of the modules around it, then its own
    return str(names[-2]) if len(names) > 1 else ""


def _strip(model: onnx.ModelProto) -> None:
    """Remove what no runtime reads: stack traces with paths of this machine, and intermediate shapes."""
    model.ir_version = min(model.ir_version, IR_VERSION)
    model.ClearField("metadata_props")
    model.doc_string = ""
    graph = model.graph
    for message in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        message.doc_string = ""
        message.ClearField("metadata_props")
    graph.ClearField("value_info")


def _halve_weights(model: onnx.ModelProto) -> None:
    """Store large float32 weights as float16 with a Cast behind each, which runtimes fold when they load the graph."""
    graph, casts = model.graph, []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) < _HALVED_FROM_SIZE:
            continue
        name, values = tensor.name, numpy_helper.to_array(tensor)
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], name=f"{name}.float", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    graph.ClearField("node")
    graph.node.extend(nodes)
