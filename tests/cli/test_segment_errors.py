"""`tclkit segment` on everything that can be wrong: one clear line, the right exit code, nothing half written."""

import contextlib
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from tclkit.runtime import write_manifest

Invoke = Callable[..., Result]
Run = Callable[..., subprocess.CompletedProcess[str]]

BUNDLE_FILES = ["bundle.json", "image.onnx", "masks.onnx", "text.onnx", "tokenizer.json"]


def assert_refused(result: Result, *fragments: str) -> None:
    """Exit 1, nothing on stdout, one line on stderr that says these things, no overlay and no temporary file left."""
    assert (result.exit_code, result.stdout) == (1, ""), result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for fragment in fragments:
        assert fragment in result.stderr
    assert written() == []


def areas(result: Result | subprocess.CompletedProcess[str]) -> dict[str, float]:
    """Share of each prompt in the only image of a --json document."""
    (image,) = json.loads(result.stdout)["images"]
    return {prompt["name"]: prompt["area_fraction"] for prompt in image["prompts"]}


def written() -> list[str]:
    return sorted(path.name for path in Path().rglob("*") if "overlay" in path.name or path.name.endswith(".tmp"))


# Images


def truncated(path: Path, whole: Path) -> None:
    path.write_bytes(whole.read_bytes()[:-40])


def huge_header(path: Path, whole: Path) -> None:
    """A PNG of 30,000 x 30,000 pixels by its header, with hardly any data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


BAD_IMAGES: dict[str, tuple[Callable[[Path, Path], object], list[str]]] = {
    "missing.png": (lambda path, whole: None, ["missing.png: no such file"]),
    "empty.png": (lambda path, whole: path.write_bytes(b""), ["empty.png is empty"]),
    "truncated.png": (truncated, ["truncated.png is truncated or damaged"]),
    "text.jpg": (lambda path, whole: path.write_text("hello"), ["text.jpg is not an image", "JPEG, PNG"]),
    "header.png": (lambda path, whole: path.write_bytes(whole.read_bytes()[:20]), ["header.png"]),
    "thin.png": (
        lambda path, whole: Image.new("RGB", (3000, 1)).save(path),
        ["thin.png: the image is 3000 x 1", "use the fit 'stretch'"],
    ),
    "huge.png": (huge_header, ["huge.png is 30000 x 30000", "the limit is 100,000,000. Scale it down first\n"]),
}


@pytest.mark.usefixtures("tiny_model")
def test_a_precision_that_the_model_does_not_have(invoke: Invoke, scene: Path) -> None:
    result = invoke("segment", scene, "red", "--precision", "fp16", "--backend", "onnxruntime")
    assert_refused(result, "tiny has no image graph in fp16, only in fp32")


@pytest.mark.usefixtures("tiny_model", "without_openvino")
def test_tensorrt_without_engines(invoke: Invoke, scene: Path, tensorrt_simulator: Callable[..., object]) -> None:
    """Asked for, it is refused; left to choose, the fallback is announced."""
    tensorrt_simulator("10.3.0")
    refused = invoke("segment", scene, "red", "--backend", "tensorrt")
    assert_refused(refused, "no engines were built for tiny. Build them here: tclkit build-engine --fp16 --model")
    announced = invoke("segment", scene, "red", "--json")
    assert announced.exit_code == 0
    assert json.loads(announced.stdout)["backend"] == "onnxruntime"
    assert "warning: tiny does not run on TensorRT 10.3.0: no engines were built for tiny" in announced.stderr


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_cannot_be_used(invoke: Invoke, scene: Path, name: str) -> None:
    make, fragments = BAD_IMAGES[name]
    make(Path(name), scene)
    assert_refused(invoke("segment", name, "red"), *fragments)


@pytest.mark.usefixtures("tiny_model")
def test_empty_standard_input(invoke: Invoke, scene: Path) -> None:
    assert_refused(invoke("segment", "-", "red", stdin=b""), "standard input is empty")


def rotated_by_exif(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: to be turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def with_alpha(image: Image.Image, path: Path) -> None:
    image.putalpha(255)
    image.save(path)


ODD_IMAGES: dict[str, tuple[Callable[[Image.Image, Path], object], dict[str, float]]] = {
    "one-pixel.png": (lambda image, path: Image.new("RGB", (1, 1), (255, 0, 0)).save(path), {"red": 1.0}),
    "grey.png": (lambda image, path: Image.new("L", (64, 64), 255).save(path), {"white": 1.0}),
    "grey16.png": (
        lambda image, path: Image.fromarray(np.full((64, 64), 65535, np.uint16)).save(path),
        {"white": 1.0},
    ),
    "palette.gif": (lambda image, path: image.save(path), {"red": 0.5, "blue": 0.25}),
    "cmyk.jpg": (lambda image, path: Image.new("CMYK", (64, 64), (0, 0, 0, 255)).save(path), {"black": 1.0}),
    "alpha.png": (with_alpha, {"red": 0.5, "blue": 0.25}),
    "exif.png": (rotated_by_exif, {"red": 0.5, "blue": 0.25}),
}


@pytest.mark.usefixtures("tiny_model", "scene")
@pytest.mark.parametrize("name", ODD_IMAGES)
def test_an_odd_image_is_segmented(invoke: Invoke, scene_hwc: np.ndarray, name: str) -> None:
    save, expected = ODD_IMAGES[name]
    save(Image.fromarray(scene_hwc), Path(name))
    result = invoke("segment", name, "red", "blue", "white", "black", "--kp", "0", "--json", "-o", "found.png")
    assert result.exit_code == 0, result.stderr
    assert {prompt: share for prompt, share in areas(result).items() if share} == pytest.approx(expected, abs=0.02)
    with Image.open(name) as source, Image.open("found.png") as overlay:
        assert overlay.width >= source.width or name == "exif.png"


@pytest.mark.usefixtures("tiny_model", "scene")
def test_exif_rotation_is_applied(invoke: Invoke, scene_hwc: np.ndarray) -> None:
    """Upright, red is on top: its box is as wide as the image."""
    rotated_by_exif(Image.fromarray(scene_hwc), Path("exif.png"))
    (image,) = json.loads(invoke("segment", "exif.png", "red", "--kp", "0", "--json").stdout)["images"]
    assert [region["box"] for region in image["prompts"][0]["regions"]] == [[0, 0, 64, 32]]


# Prompts


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize(
    ("prompts", "fragments"),
    [
        ([""], ["prompt 1 is empty"]),
        (["red", "  "], ["prompt 2 is empty"]),
        ([" ".join(["red"] * 400)], ["400 words", "too long"]),
        (["red", "blue", "Red "], ["prompts 1 and 3 are the same"]),
    ],
    ids=["empty", "blank", "400 words", "duplicate"],
)
def test_a_prompt_that_cannot_be_used(invoke: Invoke, scene: Path, prompts: list[str], fragments: list[str]) -> None:
    assert_refused(invoke("segment", scene, *prompts), *fragments)


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize("prompt", ["🐶", "красный", "a\u0301", "红色的圆", "x" * 30])
def test_any_text_is_a_prompt(invoke: Invoke, scene: Path, prompt: str) -> None:
    result = invoke("segment", scene, prompt, "red", "--json", "-o", "found.png")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["prompts"] == [prompt, "red"]


# Models


def test_a_model_that_is_not_installed_names_two_ways_on(invoke: Invoke, scene: Path) -> None:
    result = invoke("segment", scene, "red", "--model", "tcl-vit-b-16")
    assert "Did you mean" not in result.stderr
    assert_refused(result, "'tcl-vit-b-16' is not installed", "tclkit pull tcl-vit-b-16", "tclkit export CHECKPOINT -o")


@pytest.mark.usefixtures("tiny_model")
@pytest.mark.parametrize(
    ("backend", "exit_code", "fragment"), [("tensorrt", 1, "--backend onnxruntime"), ("cuda", 2, "--backend")]
)
def test_a_backend_that_is_not_there(invoke: Invoke, scene: Path, backend: str, exit_code: int, fragment: str) -> None:
    result = invoke("segment", scene, "red", "--backend", backend)
    assert result.exit_code == exit_code
    assert fragment in result.stderr


@pytest.mark.parametrize("file", BUNDLE_FILES)
def test_a_flipped_byte_in_any_file_of_a_bundle(invoke: Invoke, scene: Path, tiny_model: Path, file: str) -> None:
    write_manifest(tiny_model, json.loads((tiny_model / "bundle.json").read_text(encoding="utf-8")))  # sealed
    assert invoke("segment", scene, "red", "--json").exit_code == 0
    path = tiny_model / file
    whole = path.read_bytes()
    for position in np.linspace(0, len(whole) - 2, 12).astype(int):  # the last byte of bundle.json is a line end
        flipped = bytearray(whole)
        flipped[position] ^= 1
        path.write_bytes(bytes(flipped))
        assert_refused(invoke("segment", scene, "red"), "bundle.json" if file == "bundle.json" else file)


def test_a_missing_file_of_a_bundle(invoke: Invoke, scene: Path, tiny_model: Path) -> None:
    (tiny_model / "text.onnx").unlink()
    assert_refused(invoke("segment", scene, "red"), "text.onnx", "tclkit pull")


# The machine


def limited_file_size() -> None:
    """No file may grow beyond a block: writing fails midway, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, 256))


@pytest.mark.usefixtures("tiny_model")
def test_a_disk_that_fills_up_leaves_no_half_overlay(run_process: Run, scene: Path) -> None:
    warm = run_process("segment", scene, "red", "--json")
    assert warm.returncode == 0, warm.stderr
    result = run_process("segment", scene, "red", preexec_fn=limited_file_size)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
    assert written() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 64 kB, where this user may mount one."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if mount is None or os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    yield folder  # type: ignore[misc]
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("tiny_model")
def test_a_full_disk_leaves_no_half_overlay(invoke: Invoke, scene: Path, small_disk: Path) -> None:
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(b"x" * 1024):
            pass
    result = invoke("segment", scene, "red", "-o", small_disk / "found.png")
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.usefixtures("tiny_model")
def test_a_cache_folder_that_cannot_be_made_is_announced_and_done_without(invoke: Invoke, scene: Path) -> None:
    (Path(os.environ["TCLKIT_HOME"]) / "cache").write_text("a file where the folder should be")
    result = invoke("segment", scene, "red", "--kp", "0", "--json")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: ")
    assert "cache" in result.stderr
    assert areas(result) == {"red": 0.5}


@pytest.mark.usefixtures("tiny_model")
def test_processes_that_fill_one_cache(scene: Path) -> None:
    prompts = [f"red {number}" for number in range(40)]
    command = [sys.executable, "-c", "from tclkit.cli import run; run()", "segment", str(scene), *prompts, "--json"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [stderr for _, stderr in answers] == ["", "", ""]
    after = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (after["stats"]["text_encoder_runs"], after["stats"]["text_cache_hits"]) == (0, 40)
    found = [json.loads(stdout)["images"][0]["prompts"] for stdout, _ in answers]
    assert found == [after["images"][0]["prompts"]] * 3


def test_an_empty_contrast_is_not_called_prompt_1(invoke: Invoke, scene: Path) -> None:
    result = invoke("segment", scene, "red", "--contrast", "")
    assert result.exit_code == 2
    assert "--contrast: is empty" in result.stderr
