"""`tclkit info`: models, backends, versions, folders."""

import json
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

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
