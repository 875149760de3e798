"""`tclkit segment` on images and prompts as they should be."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

Invoke = Callable[..., Result]
Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.usefixtures("tiny_model")


def rows(result: Result) -> dict[str, list[str]]:
    """The printed table: prompt -> its other cells."""
    lines = [line.rsplit(maxsplit=3) for line in result.stdout.splitlines() if "%" in line]
    return {name.strip(): [f"{area} {percent}", regions] for name, area, percent, regions in lines}


def document(result: Result) -> dict:  # type: ignore[type-arg]
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def areas(image: dict) -> dict[str, float]:  # type: ignore[type-arg]
    return {prompt["name"]: prompt["area_fraction"] for prompt in image["prompts"]}


def test_one_image(invoke: Invoke, scene: Path) -> None:
    result = invoke("segment", scene, "red", "blue", "green", "--kp", "0")
    assert result.exit_code == 0, result.stderr
    assert rows(result) == {"red": ["50.0 %", "1"], "blue": ["25.0 %", "1"], "green": ["0.0 %", "0"]}
    assert "overlay: scene-overlay.png" in result.stderr
    overlay = np.asarray(Image.open("scene-overlay.png").convert("RGB"))
    assert overlay.shape[1] >= 64


def test_json_says_all_and_writes_nothing(invoke: Invoke, scene: Path) -> None:
    result = invoke("segment", scene, "red", "blue", "--kp", "0", "--json", "--backend", "onnxruntime")
    assert (result.exit_code, result.stderr) == (0, "")
    found = document(result)
    assert found["model"] == "tiny"
    assert found["backend"] == "onnxruntime"
    assert found["prompts"] == ["red", "blue"]
    assert found["failed"] == []
    (image,) = found["images"]
    assert image["file"] == str(scene)
    assert image["overlay"] is None
    assert image["image"] == {"height": 64, "width": 64}
    assert found["precision"] == "fp32"
    assert image["settings"] == {
        "threshold": 0.5,
        "fit": "whole",
        "kp_w": 0.0,
        "pamr": False,
        "flip": False,
        "sizes": [[64, 64]],
        "windows": 1,
        "precision": "fp32",
    }
    assert areas(image) == pytest.approx({"red": 0.5, "blue": 0.25}, abs=0.01)
    assert [region["box"] for region in image["prompts"][1]["regions"]] == [[0, 32, 32, 64]]
    assert image["timings_ms"]
    assert list(Path().glob("*overlay*")) == []


def test_mirrored_and_in_several_sizes(
    invoke: Invoke, scene: Path, write_tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    model = write_tiny_bundle(tmp_path / "model", more_sizes=[(128, 128)])
    result = invoke("segment", scene, "red", "blue", "--kp", "0", "--json", "--flip", "--scales", "--model", model)
    assert result.exit_code == 0, result.stderr
    found = document(result)
    (image,) = found["images"]
    assert areas(image) == pytest.approx({"red": 0.5, "blue": 0.25}, abs=0.01)
    assert (image["settings"]["flip"], image["settings"]["sizes"]) == (True, [[128, 128], [64, 64]])
    assert found["stats"]["windows"] == 4


def test_one_size_is_no_scale(invoke: Invoke, scene: Path) -> None:
    result = invoke("segment", scene, "red", "--scales")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "tclkit export CHECKPOINT -o FOLDER --size 64x64 --size 128x128" in result.stderr


def test_the_second_call_runs_no_text_encoder(run_process: Run, scene: Path) -> None:
    arguments = ("segment", scene, "red", "blue", "--json")
    first, second = (json.loads(run_process(*arguments).stdout)["stats"] for _ in range(2))
    assert first["text_encoder_runs"] > 0
    assert (second["text_encoder_runs"], second["text_cache_hits"]) == (0, 2)


def test_overlay_goes_where_it_is_sent(invoke: Invoke, scene: Path) -> None:
    places = {"found.png": "found.png", "out/new.jpg": "out/new.jpg", "out": "out/scene-overlay.png"}
    for output, written in places.items():
        assert invoke("segment", scene, "red", "-o", output).exit_code == 0
        with Image.open(written) as image:
            assert image.format == ("JPEG" if written.endswith(".jpg") else "PNG")


def test_an_overlay_is_written_over_but_an_input_never(invoke: Invoke, scene: Path) -> None:
    assert invoke("segment", scene, "red").exit_code == 0
    assert invoke("segment", scene, "blue").exit_code == 0
    before = scene.read_bytes()
    result = invoke("segment", scene, "red", "-o", scene)
    assert result.exit_code == 1
    assert "is an input and is not overwritten" in result.stderr
    assert scene.read_bytes() == before


def test_standard_input(invoke: Invoke, scene: Path) -> None:
    result = invoke("segment", "-", "red", "blue", "--kp", "0", stdin=scene.read_bytes())
    assert result.exit_code == 0, result.stderr
    assert rows(result)["red"] == ["50.0 %", "1"]
    assert Path("stdin-overlay.png").is_file()


@pytest.fixture
def pictures(scene: Path) -> Path:
    """A folder of three good images and a text that calls itself one."""
    folder = scene.parent
    shutil.copy(scene, folder / "again.png")
    Image.new("RGB", (40, 20), (0, 0, 255)).save(folder / "blue.jpg", quality=95)
    (folder / "notes.jpg").write_text("no image")
    (folder / "readme.txt").write_text("not even named as one")
    return folder


def test_a_folder_goes_on_after_a_bad_image_and_ends_with_1(invoke: Invoke, pictures: Path) -> None:
    result = invoke("segment", pictures, "red", "blue", "--kp", "0")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{pictures / 'again.png'}: red 50.0 %, blue 25.0 %",
        f"{pictures / 'blue.jpg'}: blue 100.0 %",
        f"{pictures / 'scene.png'}: red 50.0 %, blue 25.0 %",
    ]
    stderr = result.stderr.splitlines()
    assert stderr[0].startswith(f"error: {pictures / 'notes.jpg'} is not an image")
    assert stderr[1] == "3 overlay(s) in tclkit-overlays"
    assert stderr[2] == f"error: 1 of 4 images could not be used: {pictures / 'notes.jpg'}"
    assert sorted(path.name for path in Path("tclkit-overlays").iterdir()) == [
        "again-overlay.png",
        "blue-overlay.png",
        "scene-overlay.png",
    ]


def test_json_lists_failures(invoke: Invoke, pictures: Path) -> None:
    result = invoke("segment", pictures, "red", "--json", "-o", "out")
    assert result.exit_code == 1
    found = document(result)
    assert len(found["images"]) == 3
    assert {image["overlay"] for image in found["images"]} == {
        str(Path("out", f"{name}-overlay.png")) for name in ("again", "blue", "scene")
    }
    (failed,) = found["failed"]
    assert failed["file"] == str(pictures / "notes.jpg")
    assert "is not an image" in failed["error"]


def test_a_glob(invoke: Invoke, pictures: Path) -> None:
    result = invoke("segment", str(pictures / "*.png"), "green", "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count(": nothing found\n") == 2


@pytest.mark.parametrize("fit", ["whole", "stretch", "slide"])
@pytest.mark.parametrize("pamr", [[], ["--pamr"]], ids=["plain", "pamr"])
def test_fits_and_pamr(invoke: Invoke, scene: Path, fit: str, pamr: list[str]) -> None:
    result = invoke("segment", scene, "red", "blue", "--kp", "0", "--json", "--fit", fit, *pamr)
    assert result.exit_code == 0, result.stderr
    (image,) = document(result)["images"]
    assert areas(image) == pytest.approx({"red": 0.5, "blue": 0.25}, abs=0.03)


def test_threshold_and_background(invoke: Invoke, scene: Path) -> None:
    def found(*options: str) -> dict[str, float]:
        (image,) = document(invoke("segment", scene, "red", "blue", "--kp", "0", "--json", *options))["images"]
        return areas(image)

    assert found("--threshold", "1") == {"red": 0.0, "blue": 0.0}
    assert sum(found("--no-background").values()) == pytest.approx(1)
    assert invoke("segment", scene, "red", "--no-background", "--threshold", "0.4").exit_code == 2


@pytest.mark.parametrize("option", ["--threshold", "--kp"])
@pytest.mark.parametrize("value", ["-0.1", "1.5", "nan", "much"])
def test_a_share_out_of_range_is_a_usage_error(invoke: Invoke, scene: Path, option: str, value: str) -> None:
    result = invoke("segment", scene, "red", option, value)
    assert result.exit_code == 2
    assert option in result.stderr


def test_a_prompt_bank_needs_no_text_encoder(invoke: Invoke, scene: Path) -> None:
    assert invoke("embed", "red", "blue", "-o", "bank.npz").exit_code == 0
    result = invoke("segment", scene, "--bank", "bank.npz", "--kp", "0", "--json")
    assert result.exit_code == 0, result.stderr
    found = document(result)
    assert areas(found["images"][0]) == pytest.approx({"red": 0.5, "blue": 0.25}, abs=0.01)
    assert found["stats"]["text_encoder_runs"] == 0


@pytest.mark.parametrize("arguments", [["red", "--bank", "bank.npz"], []], ids=["both", "neither"])
def test_prompts_or_a_bank(invoke: Invoke, scene: Path, arguments: list[str]) -> None:
    assert invoke("segment", scene, *arguments).exit_code == 2


def test_words_outside_a_small_world_are_announced(
    invoke: Invoke, scene: Path, models_folder: Path, write_tiny_bundle: Callable[..., Path]
) -> None:
    model = write_tiny_bundle(models_folder / "small", vocabulary=["red", "blue", "circle"])
    result = invoke("segment", scene, "a red circle", "a dog", "--model", model, "--json")
    assert result.exit_code == 0
    assert "warning: " in result.stderr
    assert "dog" in result.stderr
    assert "circle" not in result.stderr
    assert document(result)["prompts"] == ["a red circle", "a dog"]


@pytest.mark.parametrize("options", [("--exact",), ("--exact", "--precision", "fp32")])
@pytest.mark.parametrize("backend", ["auto", "openvino", "onnxruntime"])
def test_exact_is_float32(invoke: Invoke, scene: Path, backend: str, options: tuple[str, ...]) -> None:
    result = invoke("segment", scene, "red", "--json", "--backend", backend, *options)
    assert document(result)["precision"] == "fp32"


def test_exact_is_no_other_precision(invoke: Invoke, scene: Path) -> None:
    result = invoke("segment", scene, "red", "--exact", "--precision", "int8")
    assert result.exit_code == 2
    assert "--exact is float32, --precision asks for int8" in result.stderr


def test_ctrl_c_is_one_line(scene: Path) -> None:
    # A shell's background job, as CI may be, inherits that SIGINT is ignored: here it must arrive.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from tclkit.cli import run; run()"
    )
    command = [sys.executable, "-c", program, "segment", "-", "red", "--debug", "--backend", "onnxruntime"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert "backend onnxruntime" in process.stderr.readline()  # the model is open; next it waits for the image
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)  # before stdin is closed: an end of input must not come first
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout, stderr) == (130, "", "interrupted\n")


def test_names_that_look_like_markup(invoke: Invoke, scene: Path) -> None:
    result = invoke("segment", scene, "[bold]red[/bold]", "red :cat:")
    assert result.exit_code == 0, result.stderr
    assert "[bold]red[/bold]" in result.stdout
    assert "red :cat:" in result.stdout
