"""How much arithmetic a graph, and the reference model, does: multiplications and additions of its matrix products.

Everything else (norms, activations, sums, reorderings) is left out, in both: it is a percent or two of the operations,
and no library's peak is stated in it.
"""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tclkit.runtime.errors import InputError
from tclkit.runtime.extras import install_command
from tclkit.runtime.manifest import Manifest

if TYPE_CHECKING:
    import onnx

ONNX_REMEDY = f"GFLOP are counted in the ONNX graphs, which needs the onnx package: {install_command('build')}"
Shapes = Mapping[str, tuple[int, ...]]


def can_count() -> bool:
    """Whether the onnx package is there, which reads graphs; `ONNX_REMEDY` says how to get it."""
    return importlib.util.find_spec("onnx") is not None


def graph_gflop(path: str | Path, inputs: Shapes) -> float:
    """Count what one run of a graph multiplies and adds in MatMul, Gemm and Conv, in billions.

    Args:
        path: the ONNX file; INT8 and half-precision graphs count the same operations as float ones.
        inputs: shape of every input of the run.

    Raises:
        InputError: the file is no valid ONNX graph, or a product's size does not follow from the inputs' sizes.
    """
    import onnx

    try:
        model = onnx.load(path)
        _fix_inputs(model, inputs)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # protobuf's, onnx's and the file system's errors share no base but this
        raise InputError(f"{path} cannot be read to count its operations: {error}", path=str(path)) from error
    shapes = _known_shapes(inferred)
    counted = [node for node in inferred.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    return sum(_operations(node, shapes, path) for node in counted) / 1e9


def _fix_inputs(model: "onnx.ModelProto", inputs: Shapes) -> None:
    for value in model.graph.input:
        if value.name in inputs:
            dims = value.type.tensor_type.shape.dim
            for dim, size in zip(dims, inputs[value.name], strict=True):
                dim.dim_value = size
    del model.graph.value_info[:]  # written by the exporter for sizes that were not known


def _known_shapes(model: "onnx.ModelProto") -> dict[str, tuple[int, ...]]:
    graph = model.graph
    shapes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            shapes[value.name] = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)  # 0: not known
    return shapes


def _operations(node: "onnx.NodeProto", shapes: Mapping[str, tuple[int, ...]], path: str | Path) -> int:
    """Two for every multiplication: the products summed into one element of the output, times its elements."""
    output, (left, right) = shapes.get(node.output[0], ()), (shapes.get(name, ()) for name in node.input[:2])
    if node.op_type == "Conv":
        summed = math.prod(right[1:])  # channels of the group, and the kernel
    elif node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute):
        summed = left[0] if left else 0
    else:
        summed = left[-1] if left else 0
    if not output or not all(output) or not summed:
        raise InputError(f"{path}: the size of {node.op_type} {node.name or node.output[0]} is not known to onnx")
    return 2 * summed * math.prod(output)


def image_inputs(size: tuple[int, int], batch: int) -> Shapes:
    """Shapes of an image graph's inputs for `graph_gflop`."""
    return {"image": (batch, *size, 3)}


def masks_gflop(manifest: Manifest, size: tuple[int, int], batch: int, prompts: int) -> float:
    """What a masks graph multiplies and adds, in billions: every cell of each grid with every text, once.

    Args:
        manifest: of the bundle.
        size: (H, W) of the images.
        batch: images.
        prompts: texts.
    """
    model = manifest.model
    cells = (size[0] // model.patch_size) * (size[1] // model.patch_size)
    compared = cells * model.mask_scale**2 + (cells if manifest.has_kp else 0)
    return 2 * batch * compared * prompts * model.embed_dim / 1e9


def reference_gflop(manifest: Manifest, size: tuple[int, int], batch: int, prompts: int) -> float | None:
    """The same of the reference model in torch (tcl/model.py), from the sizes that bundle.json's provenance states.

    It multiplies as the authors' code does, but for the last block: there, too, each patch attends to itself alone.

    Args:
        manifest: of the bundle.
        size: (H, W) of the images.
        batch: images.
        prompts: texts they are compared with.

    Returns:
        Billions of operations, or None for a bundle that does not state the model's sizes, or whose KP branch attends
        to neighbours.
    """
    config = _model_config(manifest)
    if config is None or manifest.provenance.get("kp_attention", "self") != "self":
        return None
    clip = config["clip"]
    C, D, patch = clip["vision_width"], clip["embed_dim"], clip["patch_size"]
    cells = (size[0] // patch) * (size[1] // patch)
    L, hidden = cells + 1, int(C * clip["vision_mlp_ratio"])
    mlp = 2 * 2 * L * C * hidden
    block = 2 * L * C * 3 * C + 2 * 2 * L * L * C + 2 * L * C * C + mlp
    self_only = 2 * 2 * L * C * C + mlp
    fine = [cells * 4 ** (doubling + 1) for doubling in range(config["decoder_blocks"])]
    decoder = sum(2 * 2 * 9 * C * C * positions for positions in fine)
    grounder = self_only + decoder + 2 * fine[-1] * C * D
    branch = self_only + 2 * L * C * D if manifest.has_kp else 0
    trunk = 2 * cells * 3 * patch * patch * C + (clip["vision_layers"] - 1) * block
    return float(batch * (trunk + grounder + branch)) / 1e9 + masks_gflop(manifest, size, batch, prompts)


def _model_config(manifest: Manifest) -> Mapping[str, Any] | None:
    config = manifest.provenance.get("configs", {}).get("model")
    needed = ("vision_width", "embed_dim", "patch_size", "vision_layers", "vision_mlp_ratio")
    if not isinstance(config, Mapping) or not isinstance(config.get("clip"), Mapping):
        return None
    return config if "decoder_blocks" in config and all(key in config["clip"] for key in needed) else None
