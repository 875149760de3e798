"""Bundles: found by name or path, read strictly, confined to their folder, and refused when a byte is wrong."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from tclkit.runtime import bundle as bundle_module
from tclkit.runtime.bundle import find_bundle, list_bundles, open_bundle, read_manifest, write_manifest
from tclkit.runtime.errors import BundleError
from tclkit.runtime.files import models_folder

FILES = ["bundle.json", "image.onnx", "masks.onnx", "text.onnx", "tokenizer.json"]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tiny_bundle_folder: Path, tmp_path: Path) -> Path:
    """A tiny bundle that a test may damage, sealed as the exporter seals it."""
    copy = shutil.copytree(tiny_bundle_folder, tmp_path / "model")
    write_manifest(copy, raw_manifest(copy))
    return copy


def raw_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bundle.json").read_text(encoding="utf-8"))


def change_manifest(folder: Path, change: Change) -> None:
    """Edit bundle.json by hand, seal removed."""
    raw = raw_manifest(folder)
    raw.pop("manifest_sha256", None)
    change(raw)
    (folder / "bundle.json").write_text(json.dumps(raw), encoding="utf-8")


def test_opens_and_says_what_it_holds(tiny_bundle_folder: Path, tiny: ModuleType) -> None:
    bundle = open_bundle(tiny_bundle_folder)
    manifest = bundle.manifest
    assert bundle.name == "tiny"
    assert bundle.path("image.onnx") == (tiny_bundle_folder / "image.onnx").resolve()
    assert bundle.size_bytes == sum((tiny_bundle_folder / file).stat().st_size for file in FILES[1:])
    assert manifest.model.patch_size == 16
    assert manifest.model.embed_dim == tiny.WIDTH
    assert manifest.templates == tiny.TEMPLATES
    assert manifest.images[0].files == {"fp32": "image.onnx"}
    assert manifest.precisions == ("fp32",)
    assert manifest.has_kp
    assert manifest.vocabulary is None


def test_options_reach_the_manifest(write_tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    options = {"size": (64, 96), "more_sizes": [(32, 32)], "patch": 8, "kp_w": 0.0, "vocabulary": ["red"]}
    manifest = open_bundle(write_tiny_bundle(tmp_path / "x", **options)).manifest
    assert [(image.height, image.width) for image in manifest.images] == [(64, 96), (32, 32)]
    assert not manifest.has_kp
    assert manifest.vocabulary is not None
    assert manifest.vocabulary.words == ("red",)


@pytest.mark.parametrize("by", ["folder", "text", "bundle.json", "link"])
def test_paths_that_open_a_bundle(folder: Path, by: str) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    paths = {"folder": folder, "text": str(folder), "bundle.json": folder / "bundle.json", "link": link}
    assert open_bundle(paths[by]).folder == folder.resolve()


def test_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert open_bundle("model").folder == folder.resolve()


def test_names_are_looked_up_among_installed_models_then_embedded_ones(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = tmp_path / "embedded"
    monkeypatch.setattr(bundle_module, "_embedded_folder", lambda: embedded)
    for name in ("both", "embedded-only"):
        shutil.copytree(folder, embedded / name)
    for name in ("both", "installed-only", ".both.17-ab.tmp"):
        shutil.copytree(folder, models_folder() / name)
    assert find_bundle("both") == (models_folder() / "both").resolve()
    assert find_bundle("embedded-only") == (embedded / "embedded-only").resolve()
    assert [bundle.folder.name for bundle in list_bundles()] == ["both", "embedded-only", "installed-only"]


@pytest.mark.parametrize("name", ["nothing-here", "../x", "/nowhere/x", "", " ", "\0", "a\nb", "x" * 5000, "..", "."])
def test_unknown_names(name: str) -> None:
    with pytest.raises(BundleError, match=r"model|bundle|looked up") as caught:
        open_bundle(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_an_unknown_name_is_told_both_ways_on(folder: Path) -> None:
    shutil.copytree(folder, models_folder() / "tcl-vit-b-16")
    with pytest.raises(BundleError) as caught:
        open_bundle("tcl-vit-b16")
    message = str(caught.value)
    assert "Either fetch a published model: tclkit pull tcl-vit-b-16, or build one" in message
    assert "tclkit export CHECKPOINT -o" in message
    assert "Did you mean 'tcl-vit-b-16'?" in message
    assert "tcl-vit-b-16" in caught.value.values["installed"]


def test_a_folder_without_bundle_json(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is no bundle: there is no bundle\.json in it"):
        open_bundle(tmp_path)


def test_broken_models_are_left_out_of_the_list(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(folder, models_folder() / "good")
    shutil.copytree(folder, models_folder() / "bad")
    (models_folder() / "bad" / "bundle.json").write_text("{", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        names = [bundle.folder.name for bundle in list_bundles()]
    assert "good" in names
    assert "bad" not in names
    assert "not valid JSON" in caplog.text


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("where", [0.0, 0.37, 0.62, 1.0])
def test_one_flipped_byte_is_refused(folder: Path, file: str, where: float) -> None:
    path = folder / file
    data = bytearray(path.read_bytes())
    index = int(where * (len(data) - 1))
    while data[index : index + 1].isspace():  # white space between JSON values carries nothing
        index -= 1
    data[index] ^= 0x01
    path.write_bytes(data)
    with pytest.raises(BundleError, match=file) as caught:
        open_bundle(folder)
    assert "again" in str(caught.value)


def test_every_flipped_byte_of_bundle_json_is_refused_or_harmless(folder: Path) -> None:
    before = read_manifest(folder)
    path = folder / "bundle.json"
    data = path.read_bytes()
    for index in range(0, len(data), 5):
        path.write_bytes(data[:index] + bytes([data[index] ^ 0x02]) + data[index + 1 :])
        try:
            assert read_manifest(folder) == before
        except BundleError:
            continue


def test_damage_names_the_file_and_both_hashes(folder: Path) -> None:
    path = folder / "masks.onnx"
    expected = raw_manifest(folder)["files"]["masks.onnx"]["sha256"]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 0xFF]))
    with pytest.raises(BundleError, match=r"masks\.onnx is damaged: expected SHA-256 \w{64}, found \w{64}") as caught:
        open_bundle(folder)
    assert caught.value.values["expected"] == expected
    assert caught.value.values["found"] != expected
    assert open_bundle(folder, verify=False).name == "tiny"


@pytest.mark.parametrize("size", [0, 100])
def test_a_truncated_file(folder: Path, size: int) -> None:
    os.truncate(folder / "text.onnx", size)
    with pytest.raises(BundleError, match=rf"text\.onnx is damaged: expected size \d+ bytes, found {size} bytes"):
        open_bundle(folder)


@pytest.mark.parametrize("verify", [True, False])
def test_a_missing_file(folder: Path, verify: bool) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json is listed in bundle\.json but is not there"):
        open_bundle(folder, verify=verify)


def test_a_folder_in_the_place_of_a_file(folder: Path) -> None:
    (folder / "text.onnx").unlink()
    (folder / "text.onnx").mkdir()
    with pytest.raises(BundleError, match=r"text\.onnx is not a regular file"):
        open_bundle(folder)


@pytest.mark.parametrize(
    "file",
    ["../outside.onnx", "/etc/hostname", "a/../../outside.onnx", "..\\outside.onnx", "c:outside.onnx", "", "a\0b"],
)
@pytest.mark.parametrize("verify", [True, False])
def test_paths_that_leave_the_bundle(folder: Path, file: str, verify: bool) -> None:
    (folder.parent / "outside.onnx").write_bytes((folder / "text.onnx").read_bytes())

    def move(raw: dict[str, Any]) -> None:
        raw["files"][file] = raw["files"].pop("text.onnx")
        raw["text"] = file

    change_manifest(folder, move)
    with pytest.raises(BundleError, match="no path inside the bundle"):
        open_bundle(folder, verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_link_that_leaves_the_bundle(folder: Path, verify: bool) -> None:
    outside = folder.parent / "outside.onnx"
    (folder / "text.onnx").rename(outside)
    (folder / "text.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match=r"leads outside the bundle, to .*outside\.onnx"):
        open_bundle(folder, verify=verify)


def test_a_linked_folder_that_leaves_the_bundle(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / "text.onnx").rename(outside / "text.onnx")
    (folder / "sub").symlink_to(outside)

    def move(raw: dict[str, Any]) -> None:
        raw["files"]["sub/text.onnx"] = raw["files"].pop("text.onnx")
        raw["text"] = "sub/text.onnx"

    change_manifest(folder, move)
    with pytest.raises(BundleError, match="leads outside the bundle"):
        open_bundle(folder)


def test_links_inside_the_bundle_are_fine(folder: Path) -> None:
    (folder / "blobs").mkdir()
    (folder / "text.onnx").rename(folder / "blobs" / "text.onnx")
    (folder / "text.onnx").symlink_to("blobs/text.onnx")
    assert open_bundle(folder).path("text.onnx") == folder.resolve() / "blobs" / "text.onnx"


def test_links_in_a_circle(folder: Path) -> None:
    (folder / "text.onnx").unlink()
    (folder / "text.onnx").symlink_to("text.onnx")
    with pytest.raises(BundleError, match="is not there"):
        open_bundle(folder)


def test_a_file_that_is_not_listed_is_not_handed_out(tiny_bundle_folder: Path) -> None:
    with pytest.raises(BundleError, match=r"lists no file 'engine\.bin'"):
        open_bundle(tiny_bundle_folder).path("engine.bin")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"bundle"',
        b"\xff\xfe{}",
        b'{"schema_version": NaN}',
        b'{"kp_w": 1e999}',
        b"[" * 100_000,
    ],
    ids=["empty", "truncated", "list", "null", "text", "not UTF-8", "NaN", "infinite", "deep"],
)
def test_what_is_no_json_object(folder: Path, text: bytes) -> None:
    (folder / "bundle.json").write_bytes(text)
    with pytest.raises(BundleError, match=r"bundle\.json (is not valid JSON|should hold a JSON object)"):
        open_bundle(folder)


def test_truncated_json(folder: Path) -> None:
    path = folder / "bundle.json"
    data = path.read_bytes()
    for size in range(0, len(data) - 2, 97):
        path.write_bytes(data[:size])
        with pytest.raises(BundleError, match="not valid JSON"):
            open_bundle(folder)


def test_write_manifest_records_every_file_and_seals(folder: Path) -> None:
    (folder / "engines").mkdir()
    (folder / "engines" / "a.engine").write_bytes(b"abc")
    written = write_manifest(folder, raw_manifest(folder) | {"files": {}, "kp_w": 0.25})
    assert open_bundle(folder).manifest == written
    assert set(written.files) == set(FILES[1:])  # engines belong to one device, and the bundle travels
    text = (folder / "bundle.json").read_text(encoding="utf-8").replace("0.25", "0.75")
    (folder / "bundle.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=r"bundle\.json is damaged: expected SHA-256"):
        open_bundle(folder)


def test_write_manifest_refuses_what_could_not_be_read(folder: Path) -> None:
    before = (folder / "bundle.json").read_bytes()
    with pytest.raises(BundleError, match="kp_w"):
        write_manifest(folder, raw_manifest(folder) | {"kp_w": 2})
    assert (folder / "bundle.json").read_bytes() == before


def test_text_encoder_hash_follows_what_makes_embeddings(
    tiny_bundle_folder: Path, write_tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    first = open_bundle(tiny_bundle_folder).text_encoder_hash
    same = open_bundle(write_tiny_bundle(tmp_path / "a", size=(32, 32), kp_w=0.0)).text_encoder_hash
    other = open_bundle(write_tiny_bundle(tmp_path / "b", context_length=16)).text_encoder_hash
    assert first == same
    assert first != other
    assert len(first) == 64


@pytest.mark.parametrize("suffix", [".onnx", ".graph"])
def test_a_graph_that_keeps_weights_in_other_files_is_refused(folder: Path, suffix: str) -> None:
    model = onnx.load(folder / "image.onnx")
    tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    (folder / "unlisted.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="unlisted.bin")
    raw = raw_manifest(folder)
    raw["images"][0]["files"]["fp32"] = f"image{suffix}"
    (folder / "image.onnx").unlink()
    (folder / f"image{suffix}").write_bytes(model.SerializeToString())
    write_manifest(folder, raw)
    with pytest.raises(BundleError, match=rf"image\{suffix} keeps weights in other files, which no hash"):
        open_bundle(folder)
