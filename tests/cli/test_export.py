"""`tclkit export`: what was trained becomes a bundle that `tclkit segment` takes."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer
from typer.testing import Result

from tclkit.cli.export import Decoder, export, parse_sizes
from tclkit.export.decoder import DECODER_FORMS, DEFAULT_DECODER
from tclkit.runtime import open_bundle

Invoke = Callable[..., Result]


def test_from_checkpoint_to_segment_and_eval(
    invoke: Invoke, checkpoint: Path, scene: Path, mini: ModuleType, tmp_path: Path
) -> None:
    result = invoke("export", checkpoint, "-o", "my bundle", "--size", "32x64", "--name", "mine")
    assert result.exit_code == 0, result.stderr
    for file in ("image.onnx", "masks.onnx", "text.onnx", "tokenizer.json"):
        assert file in result.stdout
    assert "e-0" in result.stdout  # the error against torch
    folder = Path("my bundle").resolve()
    assert f"tclkit segment IMAGE PROMPT... --model '{folder}'" in result.stderr
    bundle = open_bundle("my bundle")
    assert bundle.name == "mine"
    assert [(image.height, image.width) for image in bundle.manifest.images] == [(32, 64)]
    assert invoke("segment", scene, "a red circle", "--model", folder).exit_code == 0
    mini.write_own(tmp_path / "own")
    arguments = ["eval", "-b", "folder", "--data", tmp_path / "own", "--model", folder, "--no-pictures", "--json"]
    result = invoke(*arguments, "--threshold", "0", "--torch", checkpoint)
    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)["evaluations"]
    graph, torch = (found["results"][name]["all"] for name in ("fp32", "torch"))
    assert torch["agreement"] >= 0.999
    assert torch["latency_ms"] > 0
    predicted = np.sum(torch["confusion"], axis=0)
    assert (predicted > 0.02 * predicted.sum()).sum() == 2  # both classes: agreeing is no matter of course
    assert graph["miou_percent"] == pytest.approx(torch["miou_percent"], abs=0.1)
    again = invoke(*arguments, "--threshold", "0", "--torch", checkpoint, "--workers", "2")
    assert json.loads(again.stdout) == json.loads(result.stdout)  # nothing was computed again
    checkpoint.write_bytes(checkpoint.read_bytes() + b"more")
    other = invoke(*arguments, "--torch", checkpoint)
    assert (other.exit_code, other.stdout) == (1, "")
    assert "error: mine was not exported from tcl.pt" in other.stderr


@pytest.mark.parametrize(
    ("more", "exit_code", "message"),
    [
        (["--size", "448"], 2, "'448' is no size; write HEIGHTxWIDTH"),
        (["--size", "30x32"], 1, "image size 30x32 is no multiple of the model's patch, 16"),
        (["-o", "other"], 1, "other holds other files"),
        (["-o", "tcl.pt"], 1, "tcl.pt is a file"),
    ],
)
def test_what_cannot_be_exported(
    invoke: Invoke, checkpoint: Path, more: list[str], exit_code: int, message: str
) -> None:
    Path("other").mkdir()
    Path("other/file").write_text("mine")
    result = invoke("export", checkpoint, "-o", "bundle", *more)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert message in result.stderr
    assert sorted(path.name for path in Path().rglob("*")) == ["file", "other", "tcl.pt"]


def test_no_checkpoint(invoke: Invoke, checkpoint: Path) -> None:
    checkpoint.write_text("no checkpoint")
    for path in (checkpoint, Path("nowhere.pt")):
        result = invoke("export", path, "-o", "bundle")
        assert (result.exit_code, result.stdout) == (1, "")
        assert str(path) in result.stderr.splitlines()[-1]
        assert not Path("bundle").exists()


@pytest.mark.parametrize(("text", "size"), [("448x672", (448, 672)), ("16X32", (16, 32))])
def test_sizes(text: str, size: tuple[int, int]) -> None:
    assert parse_sizes([text]) == [size]
    assert parse_sizes(None) is parse_sizes([]) is None


@pytest.mark.parametrize("text", ["", "448", "x", "448x", "0x448", "-1x4", "448x448x3", "4.5x3", "1000000x1"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no size"):
        parse_sizes([text])


def test_the_forms_of_the_decoder_are_those_of_the_library() -> None:
    assert [form.value for form in Decoder] == list(DECODER_FORMS)
    assert inspect.signature(export).parameters["decoder"].default == DEFAULT_DECODER
