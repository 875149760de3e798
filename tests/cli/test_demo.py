"""`tclkit demo`: sample scenes, one of them segmented, and what to do next."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from tclkit.cli.demo import read_samples, samples_folder
from tclkit.runtime import Segmenter, load_image
from tclkit.runtime.errors import BundleError

Invoke = Callable[..., Result]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_demo_tells_what_it_did_and_what_comes_next(invoke: Invoke) -> None:
    """On the model that ships inside the package."""
    result = invoke("demo")
    assert result.exit_code == 0, result.stderr
    samples = read_samples(samples_folder())
    assert {path.name for path in Path("tclkit-demo").iterdir()} == {
        "scene-1-overlay.png",
        *(sample.file for sample in samples),
    }
    for word in ("tcl-shapes", *samples[0].prompts, str(Path("tclkit-demo/scene-1-overlay.png").resolve()), "Next:"):
        assert word in result.stderr
    for prompt in samples[0].prompts:
        assert prompt in result.stdout


def test_every_command_that_the_demo_proposes_works(invoke: Invoke) -> None:
    lines = [line.strip() for line in invoke("demo", "-o", "a folder").stderr.splitlines()]
    proposed = [line for line in lines if line.startswith("tclkit segment") and "photo.jpg" not in line]
    assert len(proposed) == 2
    for line in proposed:
        result = invoke(*shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, (line, result.stderr)
        assert "%" in result.stdout


def test_the_demo_can_be_run_again(invoke: Invoke) -> None:
    Path("tclkit-demo").mkdir()
    Path("tclkit-demo/mine.txt").write_text("mine")
    first, second = invoke("demo"), invoke("demo")
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert first.stdout == second.stdout
    assert Path("tclkit-demo/mine.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_one_line(invoke: Invoke) -> None:
    Path("file").write_text("")
    result = invoke("demo", "-o", "file/inside")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: file is a file, but the results need a folder")
    assert result.stderr.count("\n") == 1


def test_the_shipped_model_finds_what_the_samples_name() -> None:
    """Every prompt of every sample scene covers some of it; what is not there covers next to nothing."""
    segmenter = Segmenter.open("tcl-shapes")
    for sample in read_samples(samples_folder()):
        result = segmenter(load_image(samples_folder() / sample.file), list(sample.prompts))
        assert min(result.areas.values()) > 0.002, (sample, result.areas)
        assert sum(result.areas.values()) < 0.6, (sample, result.areas)


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"scenes": 3}', '{"scenes": []}', '{"scenes": [{"file": "a.png"}]}']
)
def test_a_damaged_list_of_samples_is_an_error_of_ours(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "samples.json").write_text(text)
    with pytest.raises(BundleError, match=r"samples\.json .*; install tclkit again"):
        read_samples(tmp_path)


def test_the_list_of_samples_is_complete() -> None:
    listed = {sample.file for sample in read_samples(samples_folder())}
    assert listed == {path.name for path in samples_folder().glob("*.png")}
    for file in listed:
        with Image.open(samples_folder() / file) as image:
            assert np.asarray(image.convert("RGB")).std() > 5
    assert json.loads((samples_folder() / "samples.json").read_text(encoding="utf-8"))
