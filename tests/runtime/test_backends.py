"""The choice of a backend is announced, and never made silently another one."""

import importlib.util
import logging
from pathlib import Path

import pytest

from tclkit.runtime import backends
from tclkit.runtime.backends import Backend, available_backends, choose_backend
from tclkit.runtime.bundle import Bundle, open_bundle
from tclkit.runtime.errors import BackendError


@pytest.fixture(scope="module")
def bundle(tiny_bundle_folder: Path) -> Bundle:
    return open_bundle(tiny_bundle_folder)


def test_the_status_of_every_backend() -> None:
    statuses = {status.name: status for status in available_backends()}
    assert list(statuses) == ["tensorrt", "openvino", "onnxruntime"]
    assert statuses["onnxruntime"].available
    assert statuses["onnxruntime"].version
    assert statuses["onnxruntime"].remedy == ""
    assert not statuses["tensorrt"].available
    assert "--backend onnxruntime" in statuses["tensorrt"].remedy


def test_auto_announces_its_choice(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        backend: Backend = choose_backend("auto", bundle)
    assert backend.name == "onnxruntime"
    assert "best backend available here (onnxruntime " in backend.reason
    assert backend.reason in caplog.text


def test_by_name(bundle: Bundle) -> None:
    backend = choose_backend("onnxruntime", bundle, threads=1)
    assert backend.name == "onnxruntime"
    assert backend.reason.startswith("asked for (onnxruntime ")


@pytest.mark.parametrize("name", ["tensorrt", "openvino"])
def test_what_is_not_implemented_is_refused(bundle: Bundle, name: str) -> None:
    with pytest.raises(BackendError, match=rf"backend {name} cannot be used\. .*take --backend onnxruntime"):
        choose_backend(name, bundle)


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
    monkeypatch.setattr(backends, "_DISTRIBUTIONS", dict.fromkeys(backends._DISTRIBUTIONS, ("no-such-package",)))
    assert {s.name: s.version for s in available_backends()}["onnxruntime"] == "unknown"


def test_a_precision_the_bundle_does_not_have(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="tiny has no image graph in int8, only in fp32"):
        choose_backend("auto", bundle, precision="int8")
