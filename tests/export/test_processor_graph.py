"""Graphs for processors are put into a staged bundle and taken out of it, and nothing else there changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from tclkit.export.decoder import DecoderForm
from tclkit.export.precision import PrecisionConfig, PreparedGraph
from tclkit.export.processor_graph import (
    PROCESSOR_FORM,
    install_graph,
    processor_form,
    remove_outdated_graphs,
    remove_processor_graph,
)
from tclkit.runtime.bundle import Bundle, open_bundle, write_manifest
from tclkit.runtime.errors import InputError


@pytest.fixture
def folder(tiny_bundle_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle_folder, tmp_path / "tiny"))


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Bundle:
    raw = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    edit(raw)
    write_manifest(folder, raw)
    return open_bundle(folder)


def prepared(folder: Path, precision: str, form: DecoderForm | None) -> PreparedGraph:
    """The tiny graph, as if it had been made in a precision."""
    config = PrecisionConfig(precision=precision, decoder=form)  # type: ignore[arg-type]
    model = onnx.load(folder / "image.onnx")
    return PreparedGraph(model=model, config=config, wide=(), layers=(), int8_share=0.0, sensitivities=())


@pytest.mark.parametrize(
    ("exported", "wanted", "form"),
    [
        (None, None, PROCESSOR_FORM),  # bundles of before there were forms
        ("direct", None, PROCESSOR_FORM),
        ("direct", "phases", "phases"),
        ("direct", "direct", None),
        ("winograd4", None, None),
        ("winograd4", "winograd4", None),
    ],
)
def test_which_form_a_processor_gets(
    exported: str | None, wanted: DecoderForm | None, form: str | None, folder: Path
) -> None:
    made = change(folder, lambda raw: raw["provenance"].update({"decoder": exported} if exported else {}))
    assert processor_form(made, wanted) == form


@pytest.mark.parametrize("wanted", ["direct", "winograd2"])
def test_what_was_rewritten_is_not_rewritten_again(wanted: DecoderForm, folder: Path) -> None:
    made = change(folder, lambda raw: raw["provenance"].update(decoder="phases"))
    with pytest.raises(
        InputError, match=r"tiny was exported with --decoder phases.*Leave --decoder out.*tclkit export"
    ):
        processor_form(made, wanted)


def test_graphs_come_and_go(folder: Path) -> None:
    (entry,) = open_bundle(folder).manifest.images
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = [
        install_graph(folder, entry, prepared(folder, *made))
        for made in [("fp32", "winograd4"), ("int8", "phases"), ("int8", None), ("fp16", None)]
    ]
    assert files == ["image.cpu.onnx", "image.cpu.int8.onnx", "image.int8.onnx", "image.fp16.onnx"]
    bundle = open_bundle(folder)  # every hash fits
    (image,) = bundle.manifest.images
    assert dict(image.files) == {"fp32": "image.onnx", "int8": "image.int8.onnx", "fp16": "image.fp16.onnx"}
    found = {precision: (graph.file, graph.decoder) for precision, graph in image.processor.items()}
    assert found == {"fp32": ("image.cpu.onnx", "winograd4"), "int8": ("image.cpu.int8.onnx", "phases")}
    assert {graph.source_sha256 for graph in image.processor.values()} == {bundle.manifest.files["image.onnx"].sha256}
    assert (folder / "image.onnx").read_bytes() == before["image.onnx"]

    change(
        folder, lambda raw: raw["checks"].update(int8={"image.cpu.int8.onnx": {}, "image.int8.onnx": {"mask_iou": 1}})
    )
    assert remove_processor_graph(folder, (64, 64), "int8") == "image.cpu.int8.onnx"
    assert remove_processor_graph(folder, (64, 64), "int8") is None
    bundle = open_bundle(folder)
    assert bundle.manifest.checks["int8"] == {"image.int8.onnx": {"mask_iou": 1}}
    assert set(bundle.manifest.images[0].processor) == {"fp32"}
    assert remove_processor_graph(folder, (64, 64), "fp32") == "image.cpu.onnx"
    assert "processor" not in json.loads((folder / "bundle.json").read_text(encoding="utf-8"))["images"][0]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "image.int8.onnx", "image.fp16.onnx"])


def test_a_new_one_takes_the_place_of_one_by_another_name(
    folder: Path, add_processor_graph: Callable[..., str]
) -> None:
    add_processor_graph(folder)
    (folder / "image.cpu.onnx").rename(folder / "mine.onnx")
    entry = change(folder, lambda raw: raw["images"][0]["processor"]["fp32"].update(file="mine.onnx")).manifest.images[
        0
    ]
    install_graph(folder, entry, prepared(folder, "fp32", "phases"))
    assert not (folder / "mine.onnx").exists()
    assert "mine.onnx" not in open_bundle(folder).manifest.files


def test_outdated_ones_go_and_that_is_said(
    folder: Path, add_processor_graph: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    add_processor_graph(folder)
    assert remove_outdated_graphs(folder) == []
    add_processor_graph(folder, "int8", source_sha256="ab" * 32)
    assert remove_outdated_graphs(folder) == ["image.cpu.int8.onnx"]
    assert "removed: image.cpu.int8.onnx was made from another float32 graph" in caplog.text
    assert set(open_bundle(folder).manifest.images[0].processor) == {"fp32"}
