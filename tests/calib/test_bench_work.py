from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tclkit.calib import bench_work
from tclkit.calib.bench_work import graph_gflop, image_inputs, masks_gflop, reference_gflop
from tclkit.runtime import open_bundle
from tclkit.runtime.errors import InputError
from tclkit.runtime.manifest import Manifest
from tclkit.tcl import TCL, TCLConfig


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return open_bundle("tcl-shapes", verify=False).manifest


def save(path: Path, node: onnx.NodeProto, *shapes: tuple[Any, ...]) -> Path:
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip("ab", shapes, strict=False)]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one", inputs, [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.mark.parametrize(
    ("operator", "attributes", "shapes", "expected"),
    [
        ("MatMul", {}, [("N", 5), (5, 7)], 2 * 3 * 5 * 7),
        ("MatMul", {}, [("N", 4, 5), ("N", 5, 7)], 2 * 3 * 4 * 5 * 7),
        ("Gemm", {"transA": 1, "transB": 1}, [(5, "N"), (7, 5)], 2 * 3 * 5 * 7),
        ("Conv", {"kernel_shape": [3, 3], "pads": [1] * 4}, [("N", 4, 6, 5), (8, 4, 3, 3)], 2 * 3 * 8 * 30 * 4 * 9),
        ("Conv", {"kernel_shape": [1, 1], "group": 2}, [("N", 4, 6, 5), (8, 2, 1, 1)], 2 * 3 * 8 * 30 * 2),
        ("Relu", {}, [("N", 5)], 0),
    ],
    ids=["matrices", "stacks", "gemm", "convolution", "groups", "no product"],
)
def test_products_by_hand(
    tmp_path: Path, operator: str, attributes: dict[str, Any], shapes: list[tuple[Any, ...]], expected: int
) -> None:
    names = ["a", "b"][: len(shapes)]
    path = save(tmp_path / "one.onnx", helper.make_node(operator, names, ["y"], **attributes), *shapes)
    given = {n: tuple(3 if d == "N" else d for d in shape) for n, shape in zip(names, shapes, strict=True)}
    assert graph_gflop(path, given) * 1e9 == pytest.approx(expected)


def test_a_size_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "one.onnx", helper.make_node("MatMul", ["a", "b"], ["y"]), ("N", 5), (5, 7))
    with pytest.raises(InputError, match=r"one\.onnx: the size of MatMul y is not known"):
        graph_gflop(path, {})


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(InputError, match=r"one\.onnx cannot be read to count"):
        graph_gflop(path, {})


@pytest.mark.parametrize(("batch", "prompts", "kp_w"), [(1, 20, 0.3), (2, 1, 0.3), (1, 3, 0.0)])
def test_the_reference_is_what_torch_counts(manifest: Manifest, batch: int, prompts: int, kp_w: float) -> None:
    model = TCL(TCLConfig.from_dict(manifest.provenance["configs"]["model"]))
    images, text = torch.zeros(batch, 3, 128, 64), torch.ones(prompts, 128)
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention hides its products from the counter
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.generate_masks(images, text, kp_w=kp_w)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    found = reference_gflop(replace(manifest, kp_w=kp_w), (128, 64), batch, prompts)
    assert found == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-9)


def test_the_graph_does_no_more_than_the_reference(manifest: Manifest) -> None:
    bundle = open_bundle("tcl-shapes", verify=False)
    graph = graph_gflop(bundle.path("image.onnx"), image_inputs((128, 128), 1))
    assert graph_gflop(bundle.path("image.onnx"), image_inputs((128, 128), 2)) == pytest.approx(2 * graph)
    reference = reference_gflop(manifest, (128, 128), 1, 20)
    assert reference is not None
    assert 0.2 * reference < graph + masks_gflop(manifest, (128, 128), 1, 20) < reference


@pytest.mark.parametrize(
    "provenance",
    [{}, {"configs": {}}, {"configs": {"model": {"clip": {}}}}, {"configs": {"model": {"decoder_blocks": 2}}}],
    ids=str,
)
def test_a_bundle_without_sizes_has_no_reference(manifest: Manifest, provenance: dict[str, Any]) -> None:
    assert reference_gflop(replace(manifest, provenance=MappingProxyType(provenance)), (128, 128), 1, 1) is None


def test_neighbours_are_not_guessed(manifest: Manifest) -> None:
    provenance = MappingProxyType({**manifest.provenance, "kp_attention": "neighbours"})
    assert reference_gflop(replace(manifest, provenance=provenance), (128, 128), 1, 1) is None


def test_without_onnx_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_work.importlib.util, "find_spec", lambda name: None)
    assert not bench_work.can_count()
    assert "pip install" in bench_work.ONNX_REMEDY
