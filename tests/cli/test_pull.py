"""`tclkit pull`: options reach the library; progress and the next command are told. Pulling itself: tests/export."""

import importlib.util
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import tclkit.export.pull

Invoke = Callable[..., Result]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> dict[str, Any]:
    """What the library was asked for, instead of asking the internet."""
    seen: dict[str, Any] = {}

    def pull(name: str, **options: Any) -> Path:
        options.pop("progress")("tcl.pth", 2000, 2000)
        options.pop("export_progress")("done", 5, 5)
        seen.update(name=name, **options)
        return tiny_model

    monkeypatch.setattr(tclkit.export.pull, "pull", pull)
    return seen


def test_pulling_by_name(invoke: Invoke, asked: dict[str, Any]) -> None:
    result = invoke("pull", "tcl-vit-b-16")
    assert result.exit_code == 0, result.stderr
    given = {key: value for key, value in asked.items() if value is not None}
    assert given == {"name": "tcl-vit-b-16", "decoder": "direct"}
    assert result.stderr.startswith("tcl.pth: 2.0 kB of 2.0 kB\n[5/5] done\n")
    assert result.stderr.endswith("tclkit segment IMAGE PROMPT... --model tcl-vit-b-16\n")
    assert "image.onnx" in result.stdout


def test_local_copies_and_mirrors(invoke: Invoke, asked: dict[str, Any]) -> None:
    files = ["--checkpoint", "tcl.pth", "--clip", "clip.pt", "-o", "bundle", "--size", "448x448", "--size", "448x672"]
    addresses = [
        "--decoder",
        "winograd4",
        "--url",
        "https://a/tcl.pth",
        "--clip-url",
        "https://b/clip.pt",
        "--sha256",
        "ab",
    ]
    result = invoke("pull", "tcl-vit-b-16", *files, *addresses)
    assert result.exit_code == 0, result.stderr
    assert asked == {
        "name": "tcl-vit-b-16",
        "checkpoint": Path("tcl.pth"),
        "clip": "clip.pt",
        "url": "https://a/tcl.pth",
        "clip_url": "https://b/clip.pt",
        "sha256": "ab",
        "out": Path("bundle"),
        "sizes": [(448, 448), (448, 672)],
        "decoder": "winograd4",
    }


def test_an_unknown_model_is_one_line(invoke: Invoke) -> None:
    result = invoke("pull", "tcl-vit-b-61")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Did you mean 'tcl-vit-b-16'?" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [(["pull", "tcl-vit-b-16"], "export"), (["export", "tcl.pt", "-o", "out"], "export"), (["train"], "train")],
)
def test_without_torch_the_remedy_is_named(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, arguments: list[str], extra: str
) -> None:
    find_spec = importlib.util.find_spec

    def without_torch(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "torch" else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_torch)
    result = invoke(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "this command needs torch, which the light install leaves out" in result.stderr
    assert f'pip install ".[{extra}]" in a checkout of tclkit' in result.stderr
