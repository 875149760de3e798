"""`tclkit build-engine` and `tclkit verify` as they are typed; what they do is tested in tests/export/test_build.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

from tclkit.runtime import open_bundle

Invoke = Callable[..., Result]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Eight pictures of blocks of colour, in a folder below the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(32, 0).repeat(32, 1)).save(tmp_path / "photos" / f"{i}.png")
    return "photos"


def test_fp16_without_tensorrt_prepares_and_says_how_to_go_on(invoke: Invoke, models_folder: Path) -> None:
    result = invoke("build-engine", "--fp16")
    assert result.exit_code == 3, result.stderr
    assert "image.fp16.onnx" in result.stdout
    assert "passed" in result.stdout
    assert f"no engine was built: TensorRT is not installed here. Copy {models_folder / 'tcl-shapes'}" in result.stderr
    assert "run the same command there" in result.stderr
    assert f"what was built is in a copy of it, {models_folder / 'tcl-shapes'}" in result.stderr
    (following,) = [line for line in result.stderr.splitlines() if line.startswith("next")]
    assert following.endswith("/tcl-shapes --backend onnxruntime --precision fp16")
    again = invoke("build-engine", "--fp16", "--prepare-only", "--json")
    assert again.exit_code == 0
    document = json.loads(again.stdout)
    assert document["verdicts"] == []  # the graph is there, and nothing was compiled
    assert document["missing"] is None
    assert "image.fp16.onnx is taken as the bundle holds it" in again.stderr
    segmented = invoke("verify", "--model", "tcl-shapes", "--report", models_folder / "report.md")
    assert segmented.exit_code == 0, segmented.stderr
    assert "tclkit verify: tcl-shapes: passed" in (models_folder / "report.md").read_text(encoding="utf-8")


def test_int8_on_images_of_ones_own(invoke: Invoke, photos: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("red circle\nblue square\n", encoding="utf-8")
    options = ("--prompts", "names.txt", "--min-iou", "0", "--min-agreement", "0.5", "--ranges", "entropy")
    result = invoke("build-engine", "--int8", "--calibration", photos, "--prepare-only", "-o", "mine", *options)
    assert result.exit_code == 0, result.stderr
    assert "100% of the multiplications" in result.stderr
    bundle = open_bundle("mine")
    note = bundle.manifest.checks["int8"]["image.int8.onnx"]
    assert note["prompts"] == 2
    assert note["thresholds"]["label_agreement"] == 0.5
    assert note["made"]["range_method"] == "entropy"
    verified = invoke("verify", "mine", "--calibration", photos, "--images", "4", "--prompts", "names.txt", "--json")
    assert verified.exit_code == 0, verified.stderr
    assert json.loads(verified.stdout)["verdicts"][0]["figures"]["prompts"] == 2


def test_below_the_gate_the_table_is_an_error_and_nothing_is_written(invoke: Invoke, photos: str) -> None:
    options = ("--min-cosine", "1", "--prepare-only", "-o", "mine")
    result = invoke("build-engine", "--int8", "--calibration", photos, *options)
    assert result.exit_code == 1
    assert "image.int8.onnx differs too much" in result.stderr
    assert "(needs 1" in result.stderr
    assert "--auto" in result.stderr
    assert not Path("mine").exists()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        ((), 2, "choose one of the four"),
        (("--fp16", "--int8"), 2, "choose one of the four"),
        (("--bf16",), 2, "is for processors: add --device cpu"),
        (("--fp16", "--device", "cpu"), 2, "no processor computes in it: take --bf16 or --int8"),
        (("--int8", "--auto", "--decoder-only"), 2, "choose one of the two"),
        (("--int8", "--smoothing", "0.5", "--no-smoothing"), 2, "choose one of the two"),
        (("--int8", "--smoothing", "2"), 2, "not in the range 0 to 1"),
        (("--fp16", "--min-iou", "nan"), 2, "not in the range 0 to 1"),
        (("--fp16", "--seed", "-1"), 2, "--seed"),
        (("--fp16", "--decoder-only"), 2, "chooses layers for INT8"),
        (("--fp16", "--max-batch", "0"), 2, "--max-batch"),
        (("--fp16", "--size", "big"), 2, "is no size"),
        (("--fp16", "--size", "64x64"), 1, "has image graphs for 128x128, not for 64x64"),
        (("--fp16", "--auto"), 2, "auto chooses layers for INT8"),
        (("--fp32", "--prepare-only"), 2, "nothing to prepare"),
        (("--bf16", "--device", "cpu", "--decoder", "direct", "--prepare-only"), 2, "nothing to prepare"),
        (("--int8", "--decoder", "winograd4"), 2, "other forms of the decoder are for processors: add --device cpu"),
        (("--fp32", "--device", "cpu", "--decoder", "winograd"), 2, "is not one of"),
        (("--int8", "--device", "cpu"), 1, "INT8 needs images to calibrate on"),
        (("--int8",), 1, "INT8 needs images to calibrate on"),
        (("--int8", "--calibration", "none"), 1, "none"),
        (("--int8", "--calibration", "empty"), 1, "empty"),
        (("--fp16", "--prompts", "none.txt"), 1, "cannot be read as a list of prompts"),
        (("--fp16", "--model", "nothing-like-it"), 1, "is not installed"),
        (("--fp16", "-o", "photos"), 1, "holds other files"),
    ],
)
def test_what_cannot_be_done_is_said(
    invoke: Invoke, photos: str, arguments: tuple[Any, ...], exit_code: int, message: str
) -> None:
    Path("empty").mkdir()
    result = invoke("build-engine", *arguments)
    assert result.exit_code == exit_code, result.stderr
    assert "a copy of it" not in result.stderr
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert sorted(path.name for path in Path().iterdir()) == ["empty", "photos"]


@pytest.mark.parametrize("report", [".", "photos", "photos/0.png/report.md"])
def test_a_report_that_cannot_be_written_is_told_before_anything_is_judged(
    invoke: Invoke, photos: str, report: str
) -> None:
    result = invoke("verify", "--report", report)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "with --report" in result.stderr


def test_verify_takes_one_model(invoke: Invoke) -> None:
    result = invoke("verify", "tcl-shapes", "--model", "tcl-shapes")
    assert result.exit_code == 2
    assert "give one of them" in result.stderr


@pytest.mark.usefixtures("without_openvino")
def test_verify_of_a_bundle_with_nothing_to_judge(invoke: Invoke) -> None:
    result = invoke("verify")
    assert result.exit_code == 0, result.stderr
    assert "nothing to judge: tcl-shapes has float32 graphs only" in result.stderr
    assert "TensorRT is not installed here" in result.stderr


def test_the_whole_path_on_a_processor(invoke: Invoke, scene: Path, models_folder: Path) -> None:
    built = invoke("build-engine", "--device", "cpu", "--fp32")
    assert built.exit_code == 0, built.stderr
    assert "image-fp32-128x128 in OpenVINO" in built.stdout
    assert "decoder  winograd4 in the graph that processors run" in built.stderr
    assert "image.cpu.onnx" in built.stdout
    assert "compiled image-fp32-128x128 for OpenVINO" in built.stderr
    assert (models_folder / "tcl-shapes" / "engines" / "openvino" / "image-fp32-128x128.json").is_file()
    document = json.loads(invoke("segment", scene, "red circle", "--json").stdout)
    assert (document["backend"], document["precision"]) == ("openvino", "fp32")
    verified = invoke("verify")
    assert verified.exit_code == 0, verified.stderr
    assert "image-fp32-128x128 in OpenVINO" in verified.stdout
    (model,) = json.loads(invoke("info", "--json").stdout)["models"]
    (built_here,) = model["on_cpu"]
    assert (built_here["precision"], built_here["fits"], built_here["why_not"]) == ("fp32", True, "")
    (graph,) = model["for_processors"]
    assert graph == {
        "file": "image.cpu.onnx",
        "precision": "fp32",
        "image_size": "128x128",
        "decoder": "winograd4",
        "outdated": False,
    }
    assert model["precisions"] == ["fp32"]
    assert "Built for processors" in invoke("info").stdout
    direct = invoke("build-engine", "--device", "cpu", "--fp32", "--decoder", "direct")
    assert direct.exit_code == 0, direct.stderr
    assert "image.cpu.onnx is removed" in direct.stderr
    assert json.loads(invoke("info", "--json").stdout)["models"][0]["for_processors"] == []


@pytest.mark.usefixtures("without_openvino")
def test_a_processor_without_openvino(invoke: Invoke, models_folder: Path) -> None:
    missing = 'nothing was compiled: OpenVINO is not installed here (pip install ".[openvino]" in a checkout of tclkit'
    result = invoke("build-engine", "--device", "cpu", "--bf16", "--decoder", "direct")
    assert result.exit_code == 3
    assert missing in result.stderr
    assert not models_folder.exists()  # there was nothing to prepare
    result = invoke("build-engine", "--device", "cpu", "--bf16")
    assert result.exit_code == 3
    assert missing in result.stderr
    assert (models_folder / "tcl-shapes" / "image.cpu.onnx").is_file()


def test_the_whole_path_on_the_simulator(
    invoke: Invoke, tensorrt_simulator: Callable[..., Any], scene: Path, models_folder: Path
) -> None:
    tensorrt_simulator("10.3.0", device_name="Orin")
    built = invoke("build-engine", "--fp16", "--max-prompts", "16")
    assert built.exit_code == 0, built.stderr
    assert "image-fp16-128x128-trt10.3.0-sm87.engine" in built.stderr
    assert (models_folder / "tcl-shapes" / "engines" / "image-fp16-128x128-trt10.3.0-sm87.engine").is_file()
    segmented = invoke("segment", scene, "red circle", "blue star", "--json")
    assert segmented.exit_code == 0, segmented.stderr
    document = json.loads(segmented.stdout)
    assert (document["backend"], document["precision"]) == ("tensorrt", "fp16")
    verified = invoke("verify")
    assert verified.exit_code == 0, verified.stderr
    assert "image-fp16-128x128-trt10.3.0-sm87.engine" in verified.stdout
    tensorrt_simulator("11.4.0.106", compute_capability=(9, 0), device_name="H100")
    elsewhere = invoke("segment", scene, "red circle")
    assert elsewhere.exit_code == 0
    assert "TensorRT 10.3.0" in elsewhere.stderr
    assert "TensorRT 11.4" in elsewhere.stderr
