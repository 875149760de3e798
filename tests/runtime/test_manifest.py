"""bundle.json is read strictly: each wrong, missing or unknown key is one clear error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tclkit.runtime.errors import BundleError
from tclkit.runtime.manifest import manifest_from_dict

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def raw(tiny_bundle_folder: Path) -> dict[str, Any]:
    return json.loads((tiny_bundle_folder / "bundle.json").read_text(encoding="utf-8"))


def test_a_valid_one(raw: dict[str, Any]) -> None:
    manifest = manifest_from_dict(raw, where="bundle.json")
    assert manifest.thresholds.background == 0.5
    assert manifest.preprocessing.mean == (123.675, 116.28, 103.53)
    assert manifest.checks == raw["checks"]
    with pytest.raises(TypeError):
        manifest.files["x"] = None  # type: ignore[index]


def test_precisions_are_those_of_every_size(raw: dict[str, Any]) -> None:
    raw["images"][0]["files"]["fp16"] = "image.onnx"
    assert manifest_from_dict(raw, where="").precisions == ("fp32", "fp16")
    raw["images"].append({"height": 32, "width": 32, "files": {"fp16": "image.onnx"}})
    assert manifest_from_dict(raw, where="").precisions == ("fp16",)


@pytest.mark.parametrize(("version", "remedy"), [(2, "Take a newer tclkit"), (0, "export the bundle again")])
def test_another_schema(raw: dict[str, Any], version: int, remedy: str) -> None:
    raw["schema_version"] = version
    with pytest.raises(BundleError, match=rf"schema_version {version}, this tclkit reads 1\. .*{remedy}"):
        manifest_from_dict(raw, where="models/x/bundle.json")


TOP_KEYS = (
    "schema_version name description created tclkit_version model images masks text tokenizer preprocessing templates "
    "kp_w thresholds vocabulary files provenance checks"
)


@pytest.mark.parametrize("key", TOP_KEYS.split())
def test_a_missing_key(raw: dict[str, Any], key: str) -> None:
    del raw[key]
    with pytest.raises(BundleError, match=rf"lacks the key '{key}'"):
        manifest_from_dict(raw, where="models/x/bundle.json")


@pytest.mark.parametrize(
    ("section", "key"),
    [("model", "patch_size"), ("thresholds", "background"), ("preprocessing", "mean")],
)
def test_a_missing_key_in_a_section(raw: dict[str, Any], section: str, key: str) -> None:
    del raw[section][key]
    with pytest.raises(BundleError, match=rf"lacks the key '{section}\.{key}'"):
        manifest_from_dict(raw, where="models/x/bundle.json")


WRONG: list[tuple[Change, str]] = [
    (lambda raw: raw.update(name=7), r"'name' should be a text, found 7"),
    (lambda raw: raw.update(kp_w="0.3"), r"'kp_w' should be a number in \[0, 1\]"),
    (lambda raw: raw.update(kp_w=1.5), r"'kp_w' should be a number in \[0, 1\]"),
    (lambda raw: raw.update(kp_w=True), r"'kp_w' should be a number in \[0, 1\]"),
    (lambda raw: raw.update(templates=[]), "at least one template"),
    (lambda raw: raw.update(templates=["a photo"]), r"one \"\{\}\" each, found 'a photo'"),
    (lambda raw: raw.update(templates=["{} and {}"]), r"one \"\{\}\" each"),
    (lambda raw: raw.update(templates="a {}"), "'templates' should be a list of texts"),
    (lambda raw: raw["model"].update(patch_size=0), r"'model\.patch_size' should be an integer above 0, found 0"),
    (lambda raw: raw["model"].update(embed_dim=9.0), r"'model\.embed_dim' should be an integer above 0"),
    (lambda raw: raw.update(model=[]), "'model' should be an object"),
    (lambda raw: raw["preprocessing"].update(mean=[1, 2]), "three numbers"),
    (lambda raw: raw["preprocessing"].update(mean=[1, 2, 10**400]), "three numbers"),
    (lambda raw: raw["preprocessing"].update(mean=[1, 2, float("inf")]), "three numbers"),
    (lambda raw: raw.update(images=[]), "lists no image graph"),
    (lambda raw: raw["images"].append(raw["images"][0]), "lists an image size twice"),
    (lambda raw: raw["images"][0].update(height=60), "60x64 is no multiple of the patch, 16"),
    (lambda raw: raw["images"][0].update(files={}), "names no file"),
    (lambda raw: raw["images"][0]["files"].update(fp31="image.onnx"), r"unknown key 'images\[0\]\.files\.fp31'"),
    (lambda raw: raw.update(masks="other.onnx"), r"uses 'other\.onnx' but does not list it"),
    (lambda raw: raw.update(template=["{}"]), "unknown key 'template', the nearest known one is 'templates'"),
    (lambda raw: raw["model"].update(patchsize=16), r"unknown key 'model\.patchsize'.* 'patch_size'"),
    (lambda raw: raw["files"]["text.onnx"].update(sha256="ab"), "64 lower-case hexadecimal digits"),
    (lambda raw: raw["files"]["text.onnx"].update(size_bytes=-1), "0 or more"),
    (lambda raw: raw.update(vocabulary={"note": "n"}), r"lacks the key 'vocabulary\.words'"),
    (lambda raw: raw.update(vocabulary=["red"]), "'vocabulary' should be an object"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_value(raw: dict[str, Any], change: Change, message: str) -> None:
    change(raw)
    with pytest.raises(BundleError, match=message) as caught:
        manifest_from_dict(raw, where="models/x/bundle.json")
    assert "models/x/bundle.json" in str(caught.value)
    assert "again" in str(caught.value)


SOURCE = "ab" * 32


def with_processor(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The manifest with a float32 graph for processors, some of its keys changed."""
    record = {"sha256": "cd" * 32, "size_bytes": 1}
    raw["files"] |= {"image.cpu.onnx": record, "image.cpu.int8.onnx": record}
    source = raw["files"]["image.onnx"]["sha256"]
    made = {"file": "image.cpu.onnx", "decoder": "winograd4", "source_sha256": source} | changes
    raw["images"][0]["processor"] = {"fp32": made}
    return raw


def test_an_exported_bundle_has_no_graphs_for_processors(raw: dict[str, Any]) -> None:
    manifest = manifest_from_dict(raw, where="")
    (image,) = manifest.images
    assert image.processor == {}
    assert manifest.processor_graph(image, "fp32") is None
    assert manifest.outdated_files == ()


def test_graphs_for_processors(raw: dict[str, Any]) -> None:
    manifest = manifest_from_dict(with_processor(raw), where="")
    (image,) = manifest.images
    graph = manifest.processor_graph(image, "fp32")
    assert graph is not None
    assert (graph.file, graph.decoder) == ("image.cpu.onnx", "winograd4")
    assert manifest.processor_graph(image, "int8") is None
    assert manifest.outdated_files == ()
    assert manifest.precisions == ("fp32",)
    assert image.size == (64, 64)


def test_one_of_another_float32_graph_is_outdated(raw: dict[str, Any]) -> None:
    manifest = manifest_from_dict(with_processor(raw, source_sha256=SOURCE), where="")
    assert manifest.processor_graph(manifest.images[0], "fp32") is None
    assert manifest.outdated_files == ("image.cpu.onnx",)
    del raw["images"][0]["files"]["fp32"]
    raw["images"][0]["files"]["fp16"] = "image.onnx"
    assert manifest_from_dict(raw, where="").outdated_files == ("image.cpu.onnx",)


BAD_PROCESSOR: list[tuple[Change, str]] = [
    (lambda image: image.update(processor={}), r"'images\[0\]\.processor' should be at least one graph"),
    (lambda image: image.update(processor=[]), r"'images\[0\]\.processor' should be an object"),
    (lambda image: image.update(processor=None), r"'images\[0\]\.processor' should be an object"),
    (lambda image: image["processor"].update(fp16=image["processor"]["fp32"]), r"unknown key .*processor\.fp16"),
    (lambda image: image["processor"].update(fp32="image.cpu.onnx"), r"processor\.fp32' should be an object"),
    (lambda image: image["processor"]["fp32"].update(form="x"), r"unknown key .*processor\.fp32\.form"),
    (lambda image: image["processor"]["fp32"].pop("file"), r"lacks the key .*processor\.fp32\.file"),
    (lambda image: image["processor"]["fp32"].pop("decoder"), r"lacks the key .*processor\.fp32\.decoder"),
    (lambda image: image["processor"]["fp32"].update(decoder=4), r"processor\.fp32\.decoder' should be a text"),
    (lambda image: image["processor"]["fp32"].update(source_sha256="AB" * 32), "64 lower-case hexadecimal digits"),
    (lambda image: image["processor"]["fp32"].update(file="image.onnx"), "'image.onnx' .*and for something else too"),
    (lambda image: image["processor"]["fp32"].update(file="text.onnx"), "'text.onnx' .*and for something else too"),
    (lambda image: image["processor"].update(int8=image["processor"]["fp32"]), "and for something else too"),
    (
        lambda image: image["processor"]["fp32"].update(file="../image.onnx"),
        r"uses '\.\./image\.onnx' but does not",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_PROCESSOR)
def test_wrong_graphs_for_processors(raw: dict[str, Any], change: Change, message: str) -> None:
    change(with_processor(raw)["images"][0])
    with pytest.raises(BundleError, match=message) as caught:
        manifest_from_dict(raw, where="models/x/bundle.json")
    assert "models/x/bundle.json" in str(caught.value)
    assert "again" in str(caught.value)
