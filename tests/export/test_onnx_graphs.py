"""The written graphs: what they are made of, what they promise, and what they compute."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tclkit.export.graph_edit import GraphIndex
from tclkit.export.graph_rules import OPERATORS, OPSET, check_graph
from tclkit.export.layers import quantizable_layers
from tclkit.export.onnx_graphs import write_graph, write_image_graph, write_masks_graph, write_text_graph
from tclkit.export.wrapper import ImageGraph, MasksGraph, TextGraph
from tclkit.runtime.errors import ExportError
from tclkit.tcl import TCL, ClipConfig, TCLConfig
from tclkit.tcl.batches import IMAGE_MEAN, IMAGE_STD, images_to_tensor
from tclkit.tcl.model import normalize

TABLE = json.loads((Path(__file__).parent / "tensorrt-operators-10.1.json").read_text())
TYPES = {1: "FP32", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "FP16", 2: "UINT8"}

# Largest difference between ONNX Runtime 1.32 and torch 2.15 allowed, and the largest measured (x86-64, fp32).
UNIT_VECTORS = 2e-5  # 6e-7
TEXTS = 2e-5  # 3.9e-6, of values up to 3.5
MASKS = 2e-5  # 9e-7
HALF_STORED = 5e-3  # 3e-4


@pytest.fixture(scope="module")
def graphs(golden_bundle: Path) -> dict[str, onnx.ModelProto]:
    return {path.name: onnx.load(path) for path in sorted(golden_bundle.glob("*.onnx"))}


@pytest.fixture(scope="module")
def run(golden_bundle: Path) -> Callable[..., list[np.ndarray]]:
    """run("image.onnx", image=...) -> outputs."""
    sessions: dict[str, onnxruntime.InferenceSession] = {}

    def outputs(file: str, **feeds: np.ndarray) -> list[np.ndarray]:
        if file not in sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            sessions[file] = onnxruntime.InferenceSession(str(golden_bundle / file), options)
        found: list[np.ndarray] = sessions[file].run(None, feeds)
        return found

    return outputs


def interface(values: list[onnx.ValueInfoProto]) -> dict[str, tuple[int, list[str | int]]]:
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


def golden_bytes(golden: Path, size: tuple[int, int]) -> np.ndarray:
    """The authors' images as bytes."""
    images = np.load(golden / f"infer_{size[0]}x{size[1]}.npz")["image"].transpose(0, 2, 3, 1)
    return np.clip(np.rint(images * IMAGE_STD + IMAGE_MEAN), 0, 255).astype(np.uint8)


def unit_rows(*shape: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_interfaces_are_the_promised_ones(graphs: dict[str, onnx.ModelProto]) -> None:
    byte, real, whole = TensorProto.UINT8, TensorProto.FLOAT, TensorProto.INT64
    assert list(graphs) == ["image-96x80.onnx", "image.onnx", "masks.onnx", "text.onnx"]
    image, masks, text = (graphs[f"{name}.onnx"].graph for name in ("image", "masks", "text"))
    assert interface(image.input) == {"image": (byte, ["batch", 64, 64, 3])}
    assert interface(image.output) == {
        "grounded": (real, ["batch", 64, 16, 16]),
        "kp": (real, ["batch", 64, 4, 4]),
    }
    assert interface(masks.input) == {
        "grounded": (real, ["batch", 64, "4*h", "4*w"]),
        "text": (real, ["prompts", 64]),
        "kp": (real, ["batch", 64, "h", "w"]),
        "kp_w": (real, []),
    }
    assert interface(masks.output) == {"masks": (real, ["batch", "prompts", "4*h", "4*w"])}
    assert interface(text.input) == {"token_ids": (whole, ["texts", "tokens"])}
    assert interface(text.output) == {"embeddings": (real, ["texts", 64])}


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_allowed_operators_are_in_tensorrts_table(operator: str) -> None:
    assert TABLE["opset"]["max"] >= OPSET
    assert TABLE["operators"][operator]["supported"]


def test_graphs_keep_to_operators_and_types_of_the_table(graphs: dict[str, onnx.ModelProto]) -> None:
    for file, model in graphs.items():
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.input)}
        types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
        for node in inferred.node:
            allowed = TABLE["operators"][node.op_type]["types"]
            if node.op_type == "Cast":
                continue
            for name in filter(None, node.input):
                assert TYPES[types[name]] in allowed, (file, node.op_type, name)


def test_graphs_keep_to_the_tables_restrictions(graphs: dict[str, onnx.ModelProto]) -> None:
    for model in graphs.values():
        constants = {tensor.name for tensor in model.graph.initializer}
        for node in model.graph.node:
            axes_at = {"ReduceL2": 1, "Slice": 3, "Unsqueeze": 1, "Squeeze": 1}.get(node.op_type)
            if axes_at is not None and len(node.input) > axes_at:
                assert node.input[axes_at] in constants, node
            if node.op_type == "LayerNormalization":
                assert len(node.output) == 1
            if node.op_type == "Resize":
                attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
                assert attributes["mode"] in (b"nearest", b"linear")
                assert attributes["coordinate_transformation_mode"] in (b"half_pixel", b"asymmetric")
                assert attributes.get("nearest_mode", b"floor") == b"floor"
                assert not attributes.get("antialias", 0)


def test_bytes_are_cast_at_once(graphs: dict[str, onnx.ModelProto]) -> None:
    readers = [node.op_type for node in graphs["image.onnx"].graph.node if "image" in node.input]
    assert readers == ["Cast"]


def test_opset_domain_and_single_file(graphs: dict[str, onnx.ModelProto], golden_bundle: Path) -> None:
    for file, model in graphs.items():
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
        assert {node.domain for node in model.graph.node} == {""}
        onnx.checker.check_model(model, full_check=True)
        check_graph(model, where=file)
    assert sorted(path.suffix for path in golden_bundle.iterdir()) == [".json"] * 2 + [".onnx"] * 4


def test_norm_and_gelu_stay_whole_operators(graphs: dict[str, onnx.ModelProto]) -> None:
    image = Counter(node.op_type for node in graphs["image.onnx"].graph.node)
    text = Counter(node.op_type for node in graphs["text.onnx"].graph.node)
    # ln_pre, 2 x 2 blocks, 2 x 2 self-only blocks, 4 decoder branches, 2 before the projections
    assert image["LayerNormalization"] == 1 + 4 + 4 + 4 + 2
    assert image["Gelu"] == 4  # the decoder's; OpenAI's towers use x·sigmoid(1.702x)
    assert image["Sigmoid"] == 4
    assert image["Softmax"] == 2  # none in the last blocks
    assert image["Conv"] == 5
    assert text["LayerNormalization"] == 5
    assert text["Erf"] == image["Erf"] == image["Tanh"] == 0


def test_nothing_of_this_machine_is_written(golden_bundle: Path) -> None:
    home = str(Path(__file__).parents[2]).encode()
    for path in golden_bundle.glob("*.onnx"):
        content = path.read_bytes()
        assert home not in content
        assert not re.search(rb"site-packages|\.py\b", content)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("file", "size"), [("image.onnx", (64, 64)), ("image-96x80.onnx", (96, 80))])
def test_image_graphs_equal_torch_on_the_authors_images(
    golden: Path,
    golden_model: TCL,
    run: Callable[..., list[np.ndarray]],
    file: str,
    size: tuple[int, int],
    batch: int,
) -> None:
    images = np.resize(golden_bytes(golden, size), (batch, *size, 3))
    with torch.no_grad():
        expected = golden_model.image_features(images_to_tensor(images))
    grounded, kp = run(file, image=images)
    assert np.abs(grounded - normalize(expected.grounded_BDhw, 1).numpy()).max() < UNIT_VECTORS
    assert np.abs(kp - normalize(expected.kp_BDhw, 1).numpy()).max() < UNIT_VECTORS


@pytest.mark.parametrize("kp_w", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("batch", "prompts", "grid"), [(1, 1, (1, 1)), (2, 5, (4, 4)), (3, 2, (2, 7))])
def test_masks_graph_equals_torch_on_any_grid(
    golden_model: TCL,
    run: Callable[..., list[np.ndarray]],
    batch: int,
    prompts: int,
    grid: tuple[int, int],
    kp_w: float,
) -> None:
    h, w = grid
    grounded, kp = unit_rows(batch, 64, 4 * h, 4 * w), unit_rows(batch, 64, h, w, seed=1)
    text, weight = unit_rows(prompts, 64, seed=2), np.float32(kp_w)
    found = run("masks.onnx", grounded=grounded, kp=kp, text=text, kp_w=np.asarray(weight))[0]
    tensors = (torch.from_numpy(array) for array in (grounded, text, kp))
    expected = MasksGraph(golden_model)(*tensors, torch.tensor(kp_w))
    assert found.shape == (batch, prompts, 4 * h, 4 * w)
    assert np.abs(found - expected.numpy()).max() < MASKS


@pytest.mark.parametrize(("texts", "length"), [(1, 1), (1, 2), (3, 9), (2, 77)])
def test_text_graph_equals_torch_at_any_length(
    golden: Path, golden_model: TCL, run: Callable[..., list[np.ndarray]], texts: int, length: int
) -> None:
    token_ids = np.load(golden / "text_tiny.npz")["tokens"].reshape(-1, 77)[:texts, :length].astype(np.int64)
    expected = golden_model.encode_text(torch.from_numpy(token_ids)).numpy()
    assert np.abs(run("text.onnx", token_ids=token_ids)[0] - expected).max() < TEXTS


def test_text_graph_takes_the_first_end_of_text(golden_model: TCL, run: Callable[..., list[np.ndarray]]) -> None:
    token_ids = np.array([[1022, 5, 1023, 7, 1023], [1022, 5, 1023, 0, 0]], np.int64)
    first, second = run("text.onnx", token_ids=token_ids)[0]
    assert np.abs(first - second).max() < TEXTS


def test_the_same_model_gives_the_same_bytes(make_model: Callable[..., TCL], tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        write_text_graph(TextGraph(make_model().clip), tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_half_stored_weights_take_half_the_space(
    golden: Path, golden_model: TCL, golden_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "image.onnx"
    write_image_graph(ImageGraph(golden_model, (64, 64), with_kp=False), path, half_weights=True)
    model = onnx.load(path)
    large = [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) >= 1024]
    assert {tensor.data_type for tensor in large} == {TensorProto.FLOAT16}
    assert path.stat().st_size < 0.52 * (golden_bundle / "image.onnx").stat().st_size
    images = golden_bytes(golden, (64, 64))
    with torch.no_grad():
        expected = normalize(golden_model.image_features(images_to_tensor(images)).grounded_BDhw, 1).numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert np.abs(session.run(["grounded"], {"image": images})[0] - expected).max() < HALF_STORED


def test_without_kp_the_inputs_and_outputs_are_not_there(make_model: Callable[..., TCL], tmp_path: Path) -> None:
    model = make_model()
    write_image_graph(ImageGraph(model, (64, 32), with_kp=False), tmp_path / "image.onnx")
    write_masks_graph(MasksGraph(model, with_kp=False), 24, tmp_path / "masks.onnx")
    image, masks = (onnx.load(tmp_path / name).graph for name in ("image.onnx", "masks.onnx"))
    assert [value.name for value in image.output] == ["grounded"]
    assert [value.name for value in masks.input] == ["grounded", "text"]
    assert Counter(node.op_type for node in image.node)["Gelu"] == 1 + 1 + 4  # trunk, grounder's block, decoder


def small_graph(opset: int = 20, operator: str = "Add", domain: str = "") -> onnx.ModelProto:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y", "z")]
    node = helper.make_node(operator, ["x", "y"], ["z"], domain=domain)
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    graph = helper.make_graph([node], "g", value[:2], value[2:])
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def test_a_plain_graph_passes() -> None:
    check_graph(small_graph(), where="torch wrote x.onnx")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small_graph(opset=21), r"opsets \{'': 21\}"),
        (small_graph(opset=18), r"opsets \{'': 18\}"),
        (small_graph(operator="FusedMatMul", domain="com.microsoft"), r"com\.microsoft\.FusedMatMul"),
        (small_graph(operator="Pow"), "the operators Pow, which not every TensorRT"),
        (small_graph(operator="Softmax"), "a fault"),
    ],
)
def test_graphs_that_some_runtime_would_not_read_are_refused(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ExportError, match=rf"(?s)wrote x\.onnx with .*{message}.*pip install -U"):
        check_graph(model, where="torch wrote x.onnx")


def test_weights_in_other_files_are_refused() -> None:
    model = small_graph()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "w"))
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(ExportError, match="weights in other files"):
        check_graph(model, where="torch wrote x.onnx")


class Untraceable(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no way")


def test_a_module_that_cannot_be_exported_is_one_error_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"could not export x\.onnx: .*pip install -U"):
        write_graph(Untraceable().eval(), tmp_path / "x.onnx", {"x": torch.zeros(2)}, ["y"], ({},))
    assert list(tmp_path.iterdir()) == []


def test_modules_keep_their_own_weights_and_names_where_values_are_equal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    towers = {"vision_width": 64, "vision_layers": 3, "text_width": 16, "text_heads": 2, "text_layers": 1}
    config = ClipConfig(embed_dim=16, image_size=32, patch_size=16, quick_gelu=False, **towers)
    model = TCL(TCLConfig(clip=config))  # as initialised: biases 0, norms 1
    model.grounder.open_gates(0.5)
    write_image_graph(ImageGraph(model, (32, 48)), tmp_path / "image.onnx")
    graph = onnx.load(tmp_path / "image.onnx")
    index = GraphIndex(graph)
    layers = quantizable_layers(graph)
    names = [layer.name for layer in layers]
    assert len(names) == len(set(names))
    assert Counter(layer.block for layer in layers) == {
        "trunk.0": 4,
        "trunk.1": 4,
        "grounder.block": 3,
        "grounder.decoder.0": 2,
        "grounder.decoder.1": 2,
        "grounder.projection": 1,
        "kp.block": 3,
        "kp.projection": 1,
    }
    shared = [name for name in index.weights if name.endswith((".weight", ".bias")) and len(index.readers[name]) > 1]
    assert shared == []
    norms = [node for node in graph.graph.node if node.op_type == "LayerNormalization"]
    for node in norms:
        weight, bias = (name.rpartition(".")[0] for name in node.input[1:])
        assert weight == bias
    assert len({node.input[1] for node in norms}) == len(norms)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    found = onnxruntime.InferenceSession(str(tmp_path / "image.onnx")).run(None, {"image": images})
    features = model.image_features(images_to_tensor(images))
    for array, tensor in zip(found, (features.grounded_BDhw, features.kp_BDhw), strict=True):
        assert np.abs(array - normalize(tensor, 1).detach().numpy()).max() < UNIT_VECTORS
