"""Fixtures that tests of several packages share.

Tests run with --import-mode=importlib, so test files cannot import each other: what they share arrives as fixtures.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from tclkit.runtime.bundle import MANIFEST_NAME, write_manifest

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of golden data; a test that asks for a missing file in it fails."""
    return TESTS / "golden"


def shared_module(name: str, path: str) -> ModuleType:
    """A module or package under tests/ that test files share, imported once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tests/runtime/tiny_bundle.py: `tiny.write_tiny_bundle`, `tiny.PALETTE`, ..."""
    return shared_module("tclkit_tests_tiny_bundle", "runtime/tiny_bundle.py")


@pytest.fixture(scope="session")
def simulator_package() -> ModuleType:
    """The package tests/tensorrt_simulator: `simulator_package.VERSIONS`, `simulator_package.violations`, ..."""
    return shared_module("tclkit_tests_tensorrt_simulator", "tensorrt_simulator/__init__.py")


@pytest.fixture
def tensorrt_simulator(simulator_package: ModuleType) -> Iterator[Callable[..., Any]]:
    """Function that installs a simulated machine with TensorRT; see tests/tensorrt_simulator."""
    fixtures = importlib.import_module(f"{simulator_package.__name__}.fixtures")
    with fixtures.simulators() as install:
        yield install


@pytest.fixture(scope="session")
def make_tiny_tcl() -> Callable[..., Any]:
    """make_tiny_tcl(vocab_size=40, context_length=12): an untrained TCL of two layers for 32 pixels, its gates open."""
    return _make_tiny_tcl


def _make_tiny_tcl(vocab_size: int = 40, context_length: int = 12) -> Any:
    import torch

    from tclkit.tcl import TCL, ClipConfig, TCLConfig

    torch.manual_seed(0)
    config = ClipConfig(
        embed_dim=16,
        image_size=32,
        patch_size=16,
        vision_width=32,
        vision_layers=2,
        vision_head_width=16,
        context_length=context_length,
        vocab_size=vocab_size,
        text_width=16,
        text_heads=1,
        text_layers=1,
        quick_gelu=False,
    )
    model = TCL(TCLConfig(clip=config, decoder_blocks=1))
    for name, parameter in model.grounder.named_parameters():
        if name.endswith("gate"):
            parameter.data.fill_(0.7)
    return model


@pytest.fixture(scope="session")
def mini() -> ModuleType:
    """The module tests/calib/mini_benchmarks.py: `mini.write_all`, `mini.CLASS_COLOURS`, ..."""
    return shared_module("tclkit_tests_mini_benchmarks", "calib/mini_benchmarks.py")


@pytest.fixture(scope="session")
def made_up() -> ModuleType:
    """The module tests/calib/bench_made_up.py: `made_up.made_up_row`, `made_up.made_up_result`."""
    return shared_module("tclkit_tests_bench_made_up", "calib/bench_made_up.py")


@pytest.fixture(scope="session")
def class_bundle_folder(tiny: ModuleType, mini: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle that calls its eight colours by names of classes of the benchmarks; for reading only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "PALETTE", mini.CLASS_COLOURS)
        return tiny.write_tiny_bundle(tmp_path_factory.mktemp("models") / "classes")  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def write_tiny_bundle(tiny: ModuleType) -> Callable[..., Path]:
    """Function that writes a tiny bundle into a folder; see tests/runtime/tiny_bundle.py."""
    return tiny.write_tiny_bundle  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def tiny_bundle_folder(write_tiny_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle with default options, for reading only; copy it before changing it."""
    return write_tiny_bundle(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def add_processor_graph() -> Callable[..., str]:
    """add_processor_graph(folder, precision="fp32", source_sha256=None): put a graph for processors into a bundle.

    It is the float32 graph with another name inside, so that its hash is another; made from the bundle's float32 graph,
    unless `source_sha256` says from which. Returns its file name.
    """
    return _add_processor_graph


def _add_processor_graph(
    folder: Path, precision: str = "fp32", *, graph: bytes | None = None, source_sha256: str | None = None
) -> str:
    raw = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    image = raw["images"][0]
    common = image["files"]["fp32"]
    file = "image.cpu.onnx" if precision == "fp32" else f"image.cpu.{precision}.onnx"
    if graph is None:
        model = onnx.load(folder / common)
        model.graph.name = f"{precision} for processors"
        graph = model.SerializeToString()
    (folder / file).write_bytes(graph)
    source = source_sha256 or raw["files"][common]["sha256"]
    made = {"file": file, "decoder": "winograd4", "source_sha256": source}
    image["processor"] = image.get("processor", {}) | {precision: made}
    write_manifest(folder, raw)
    return file


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """A light install: OpenVINO, which the development environment has, is not there to be found."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == "openvino" else real(name, package)
    )


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own models and cache."""
    monkeypatch.setenv("TCLKIT_HOME", str(tmp_path_factory.mktemp("home")))
