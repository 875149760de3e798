"""Fixtures of the command line's tests: an installed tiny model, a scene it knows, and a way to call commands."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

Invoke = Callable[..., Result]


@pytest.fixture
def invoke() -> Invoke:
    """Call `tclkit` with these arguments inside this process; `stdin` is bytes."""
    from tclkit.cli.main import app

    def call(*arguments: str | Path, stdin: bytes | None = None) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, prog_name="tclkit")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def run_process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call `tclkit` in a process of its own; keyword arguments go to subprocess.run."""

    def call(*arguments: str | Path, **settings: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from tclkit.cli import run; run()", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **settings)  # type: ignore[call-overload,no-any-return]

    return call


@pytest.fixture
def models_folder() -> Path:
    """Where this test's tclkit keeps installed models."""
    return Path(os.environ["TCLKIT_HOME"]) / "models"


@pytest.fixture
def tiny_model(tiny_bundle_folder: Path, models_folder: Path) -> Path:
    """The tiny bundle, installed under the default model's name: it knows eight colours."""
    return Path(shutil.copytree(tiny_bundle_folder, models_folder / "tcl-shapes"))


@pytest.fixture
def scene_hwc(tiny: ModuleType) -> np.ndarray:
    """64x64 RGB: upper half red, the lower left quarter blue, the rest of no colour that the model knows."""
    image = np.empty((64, 64, 3), np.uint8)
    image[:] = tiny.OTHER_RGB
    image[:32] = tiny.PALETTE["red"]
    image[32:, :32] = tiny.PALETTE["blue"]
    return image


@pytest.fixture
def scene(scene_hwc: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The scene as pictures/scene.png below the current folder, which is the test's own."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pictures" / "scene.png"
    path.parent.mkdir()
    Image.fromarray(scene_hwc).save(path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_tiny_tcl: Callable[..., Any]) -> Path:
    """tcl.pt in the current folder: two layers, untrained."""
    from tclkit.tcl import save_checkpoint
    from tclkit.tcl.tokenizer_file import pruned_tokenizer_json, vocabulary_size

    monkeypatch.chdir(tmp_path)
    tokenizer_json = pruned_tokenizer_json(["a photo of a red circle."])
    extra = {"name": "tiny", "tokenizer_json": tokenizer_json, "templates": ["a {}."], "image_size": 32}
    save_checkpoint("tcl.pt", make_tiny_tcl(vocabulary_size(tokenizer_json)), extra=extra)
    return Path("tcl.pt")
