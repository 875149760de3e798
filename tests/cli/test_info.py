"""`tclkit info`: models, backends, versions, folders."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from tclkit.runtime import EngineRecord, current_device, read_manifest, write_engine

Invoke = Callable[..., Result]


def test_json(invoke: Invoke, tiny_model: Path) -> None:
    found = json.loads(invoke("info", "--json").stdout)
    (model,) = [model for model in found["models"] if model["folder"] == str(tiny_model)]
    assert model["image_sizes"] == ["64x64"]
    assert model["precisions"] == ["fp32"]
    assert {backend["name"]: backend["available"] for backend in found["backends"]}["onnxruntime"] is True
    assert found["versions"]["tclkit"]
    assert found["folders"]["models"] == {
        "path": str(tiny_model.parent),
        "size_bytes": sum(path.stat().st_size for path in tiny_model.iterdir()),
    }


def test_tables(invoke: Invoke, tiny_model: Path) -> None:
    result = invoke("info")
    assert result.exit_code == 0
    for word in ("Models", "knows eight colours", "Backends", "ready", "Versions", "numpy", "Folders", "cache"):
        assert word in result.stdout


def test_a_damaged_model_is_announced_and_the_others_are_listed(invoke: Invoke, tiny_model: Path) -> None:
    damaged = tiny_model.parent / "broken" / "bundle.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    result = invoke("info")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: left out: ")
    assert "knows eight colours" in result.stdout


def test_engines_and_whether_they_fit(
    invoke: Invoke, tiny_model: Path, tensorrt_simulator: Callable[..., object]
) -> None:
    tensorrt_simulator("10.3.0")
    device, manifest = current_device(), read_manifest(tiny_model)
    record = EngineRecord(
        graph="image",
        precision="fp32",
        height=64,
        width=64,
        graph_sha256=manifest.files["image.onnx"].sha256,
        tensorrt_version=device.tensorrt_version,
        compute_capability=device.compute_capability,
        device_name=device.device_name,
        system=device.system,
        max_batch=8,
        max_prompts=256,
    )
    write_engine(tiny_model, record, b"engine")
    write_engine(tiny_model, dataclasses.replace(record, tensorrt_version="10.7.0"), b"engine")

    def engines() -> list[dict[str, Any]]:
        models = json.loads(invoke("info", "--json").stdout)["models"]
        (found,) = [model["engines"] for model in models if model["folder"] == str(tiny_model)]
        return list(found)

    fitting, other = engines()
    assert (fitting["file"], fitting["fits"], fitting["why_not"]) == (f"{record.stem}.engine", True, "")
    assert (fitting["precision"], fitting["image_size"], fitting["max_batch"]) == ("fp32", "64x64", 8)
    assert not other["fits"]
    assert "built with TensorRT 10.7.0 on sm_87 (Orin), but this machine has TensorRT 10.3.0" in other["why_not"]
    table = " ".join(invoke("info").stdout.split())
    assert "Engines" in table
    assert "TensorRT 10.3.0" in table
    tensorrt_simulator("10.3.0", compute_capability=(8, 9), device_name="L4")
    assert [engine["fits"] for engine in engines()] == [False, False]


def test_engines_where_there_is_no_tensorrt(
    invoke: Invoke, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tensorrt_simulator: Callable[..., object]
) -> None:
    tensorrt_simulator("10.3.0")
    sha256 = read_manifest(tiny_model).files["image.onnx"].sha256
    record = EngineRecord(
        graph="image",
        precision="fp32",
        height=64,
        width=64,
        graph_sha256=sha256,
        tensorrt_version="10.3.0",
        compute_capability="8.7",
        device_name="Orin",
        system="Linux aarch64",
        max_batch=1,
        max_prompts=1,
    )
    write_engine(tiny_model, record, b"engine")
    with monkeypatch.context() as patched:  # undone before the simulator goes
        patched.setitem(sys.modules, "tensorrt", None)
        found = json.loads(invoke("info", "--json").stdout)
    (engine,) = [engine for model in found["models"] for engine in model["engines"]]
    assert not engine["fits"]
    assert engine["why_not"].startswith("tensorrt cannot be imported")


@pytest.mark.parametrize("outdated", [False, True])
def test_graphs_for_processors(
    outdated: bool, invoke: Invoke, tiny_model: Path, add_processor_graph: Callable[..., str]
) -> None:
    add_processor_graph(tiny_model, "int8", source_sha256="ab" * 32 if outdated else None)
    (model,) = [
        one for one in json.loads(invoke("info", "--json").stdout)["models"] if one["folder"] == str(tiny_model)
    ]
    assert model["precisions"] == ["fp32"]
    (graph,) = model["for_processors"]
    assert (graph["file"], graph["precision"], graph["outdated"]) == ("image.cpu.int8.onnx", "int8", outdated)
    table = invoke("info").stdout
    assert "winograd4" in table
    assert ("outdated" in table) == outdated
