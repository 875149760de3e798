"""`tclkit export`: what was trained becomes a bundle that `tclkit segment` takes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import Result

from tclkit.cli.export import parse_sizes
from tclkit.runtime import open_bundle
from tclkit.tcl import TCL, ClipConfig, TCLConfig, save_checkpoint
from tclkit.tcl.tokenizer_file import pruned_tokenizer_json, vocabulary_size

Invoke = Callable[..., Result]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tcl.pt in the current folder: two layers, untrained."""
    monkeypatch.chdir(tmp_path)
    tokenizer_json = pruned_tokenizer_json(["a photo of a red circle."])
    torch.manual_seed(0)
    config = ClipConfig(
        embed_dim=16,
        image_size=32,
        patch_size=16,
        vision_width=32,
        vision_layers=2,
        vision_head_width=16,
        context_length=12,
        vocab_size=vocabulary_size(tokenizer_json),
        text_width=16,
        text_heads=1,
        text_layers=1,
        quick_gelu=False,
    )
    extra = {"name": "tiny", "tokenizer_json": tokenizer_json, "templates": ["a {}."], "image_size": 32}
    save_checkpoint("tcl.pt", TCL(TCLConfig(clip=config, decoder_blocks=1)), extra=extra)
    return Path("tcl.pt")


def test_from_checkpoint_to_segment(invoke: Invoke, checkpoint: Path, scene: Path) -> None:
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
