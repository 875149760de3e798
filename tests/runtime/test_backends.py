"""The choice of a backend is announced, and never made silently another one."""

import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tclkit.runtime import backends
from tclkit.runtime.backends import Backend, available_backends, choose_backend, image_file
from tclkit.runtime.bundle import Bundle, open_bundle, write_manifest
from tclkit.runtime.errors import BackendError
from tclkit.runtime.extras import install_command


@pytest.fixture(scope="module")
def bundle(tiny_bundle_folder: Path) -> Bundle:
    return open_bundle(tiny_bundle_folder)


def test_the_status_of_every_backend() -> None:
    statuses = {status.name: status for status in available_backends()}
    assert list(statuses) == ["tensorrt", "openvino", "onnxruntime"]
    assert statuses["onnxruntime"].available
    assert statuses["onnxruntime"].version
    assert statuses["onnxruntime"].remedy == ""
    assert statuses["openvino"].available
    assert statuses["openvino"].remedy == ""


@pytest.mark.usefixtures("without_openvino")
def test_the_status_of_openvino_in_a_light_install() -> None:
    status = available_backends()[1]
    assert (status.name, status.available, status.version) == ("openvino", False, None)
    assert status.remedy == f"It is not installed: {install_command('openvino')}. Or take --backend onnxruntime"


def without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorrt" else real(name))


def test_the_status_of_tensorrt(monkeypatch: pytest.MonkeyPatch, tensorrt_simulator: Callable[..., Any]) -> None:
    simulator = tensorrt_simulator("10.13.3.9")
    status = available_backends()[0]
    assert (status.name, status.available, status.version, status.remedy) == ("tensorrt", True, "10.13.3.9", "")
    code = simulator.cudart.cudaError_t.cudaErrorInsufficientDriver
    with monkeypatch.context() as patched:
        patched.setattr(simulator.cudart, "cudaGetDeviceCount", lambda: (code, None))
        status = available_backends()[0]
        assert (status.available, status.version) == (False, "10.13.3.9")
        assert "cudaErrorInsufficientDriver" in status.remedy
        assert "pip install 'cuda-python<13'" in status.remedy
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "cuda.bindings", None)
        assert install_command("tensorrt") in available_backends()[0].remedy
    without_tensorrt(monkeypatch)
    status = available_backends()[0]
    assert (status.available, status.version) == (False, None)
    assert "Jetson: it comes with JetPack" in status.remedy


@pytest.mark.usefixtures("without_openvino")
def test_auto_announces_its_choice(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_tensorrt(monkeypatch)
    with caplog.at_level(logging.INFO):
        backend: Backend = choose_backend("auto", bundle)
    assert backend.name == "onnxruntime"
    assert "best backend available here (onnxruntime " in backend.reason
    assert backend.reason.endswith(", fp32)")
    assert backend.reason in caplog.text
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_auto_takes_openvino_where_it_is_installed(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_tensorrt(monkeypatch)
    with caplog.at_level(logging.INFO):
        backend = choose_backend("auto", bundle)
    assert (backend.name, backend.precision) == ("openvino", "fp32")
    assert backend.reason.startswith("the best backend available here (OpenVINO ")
    assert "build-engine --" in backend.reason
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_what_was_not_judged_here_goes_to_onnxruntime_with_a_warning(
    tiny_bundle_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_tensorrt(monkeypatch)
    folder = Path(shutil.copytree(tiny_bundle_folder, tmp_path / "tiny"))
    raw = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    (folder / "image.int8.onnx").write_bytes((folder / "image.onnx").read_bytes())
    raw["images"][0]["files"]["int8"] = "image.int8.onnx"
    write_manifest(folder, raw)
    bundle = open_bundle(folder)
    with pytest.raises(BackendError, match=r"int8 was not judged .*Build it here: .*--int8 --model .* --device cpu"):
        choose_backend("openvino", bundle, precision="int8")
    with caplog.at_level(logging.WARNING):
        backend = choose_backend("auto", bundle, precision="int8")
    assert (backend.name, backend.precision) == ("onnxruntime", "int8")
    assert "tiny does not run on OpenVINO" in caplog.text
    assert "int8 was not judged" in backend.reason


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt"])
def test_bfloat16_is_openvinos(name: str, bundle: Bundle, tensorrt_simulator: Callable[..., Any]) -> None:
    tensorrt_simulator("10.13.3.9")
    with pytest.raises(BackendError, match="bf16"):
        choose_backend(name, bundle, precision="bf16")


def test_by_name(bundle: Bundle) -> None:
    backend = choose_backend("onnxruntime", bundle, threads=1)
    assert backend.name == "onnxruntime"
    assert backend.reason.startswith("asked for (onnxruntime ")


@pytest.mark.usefixtures("without_openvino")
def test_openvino_by_name_where_it_is_not_installed(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match=r"backend openvino cannot be used\. .*take --backend onnxruntime"):
        choose_backend("openvino", bundle)


def test_tensorrt_by_name_where_it_is_not_installed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    without_tensorrt(monkeypatch)
    with pytest.raises(
        BackendError, match=r"backend tensorrt cannot be used\. It is not installed\. Jetson: .*JetPack"
    ):
        choose_backend("tensorrt", bundle)


@pytest.mark.parametrize("name", ["", "cuda", "ONNXRuntime"])
def test_unknown_names(bundle: Bundle, name: str) -> None:
    with pytest.raises(BackendError, match=r"unknown backend .* Choose auto, tensorrt, openvino, onnxruntime"):
        choose_backend(name, bundle)


def test_nothing_installed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not any(status.available for status in available_backends())
    with pytest.raises(BackendError, match=r"no backend is installed\. Install one: pip install onnxruntime"):
        choose_backend("auto", bundle)
    with pytest.raises(BackendError, match="It is not installed: pip install onnxruntime"):
        choose_backend("onnxruntime", bundle)


def test_a_package_without_metadata_counts_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(backends, "_DISTRIBUTIONS", dict.fromkeys(backends._DISTRIBUTIONS, ("no-such-package",)))
    assert {s.name: s.version for s in available_backends()}["onnxruntime"] == "unknown"


def test_a_loaded_module_without_spec_counts_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("openvino")
    module.__spec__ = None
    module.__version__ = "2025.3"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openvino", module)
    monkeypatch.setattr(backends, "_DISTRIBUTIONS", dict.fromkeys(backends._DISTRIBUTIONS, ("no-such-package",)))
    assert {s.name: s.version for s in available_backends()}["openvino"] == "2025.3"


def test_a_precision_the_bundle_does_not_have(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="tiny has no image graph in int8, only in fp32"):
        choose_backend("auto", bundle, precision="int8")


def test_which_graph_a_backend_runs(
    tiny_bundle_folder: Path, tmp_path: Path, add_processor_graph: Callable[..., str]
) -> None:
    folder = Path(shutil.copytree(tiny_bundle_folder, tmp_path / "tiny"))
    for precision in ("fp32", "int8"):
        add_processor_graph(folder, precision)
    bundle = open_bundle(folder)
    found = {
        name: [image_file(bundle, name, precision, (64, 64)) for precision in ("fp32", "bf16", "int8", "fp16")]
        for name in ("openvino", "onnxruntime", "tensorrt")
    }
    assert found == {
        "openvino": ["image.cpu.onnx", "image.cpu.onnx", "image.cpu.int8.onnx", None],
        "onnxruntime": ["image.onnx", None, None, None],
        "tensorrt": ["image.onnx", None, None, None],
    }
    assert image_file(bundle, "onnxruntime", "fp32", (32, 32)) is None
