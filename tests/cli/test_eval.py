"""`tclkit eval` and `tclkit data`: all benchmarks in miniature through the command line, and what goes wrong there."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

Invoke = Callable[..., Result]
BENCHMARKS = ("voc", "voc20", "context", "context59", "coco_stuff", "coco_object", "cityscapes", "ade20k")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def data(here: Path, mini: ModuleType) -> Path:
    mini.write_all(here / "data")
    return here / "data"


@pytest.fixture
def model(class_bundle_folder: Path) -> list[str]:
    return ["--model", str(class_bundle_folder)]


def rows(result: Result) -> list[list[str]]:
    """Cells of the table's rows; no cell of these tests holds a space."""
    lines = [line.split() for line in result.stdout.splitlines() if line.strip() and "─" not in line]
    return lines[1:]


def document(result: Result) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def figures(result: Result) -> Any:
    """The document without times."""
    found = document(result)
    for evaluation in found["evaluations"]:
        for views in evaluation["results"].values():
            for view in views.values():
                del view["latency_ms"]
    return found


def test_all_benchmarks(invoke: Invoke, data: Path, model: list[str]) -> None:
    prepared = invoke("data", "prepare", "all", "--root", "data")
    assert prepared.exit_code == 0, prepared.stderr
    assert prepared.stdout.splitlines() == [
        f"{key}: complete, {2 if key.startswith('context') else 3} images" for key in BENCHMARKS
    ]
    result = invoke("eval", "--benchmark", "all", "--data", "data", "--no-pictures", *model)
    assert result.exit_code == 0, result.stderr
    found = rows(result)
    assert [row[0] for row in found] == list(BENCHMARKS)
    assert [row[3] for row in found] == ["51.2", "77.5", "24.3", "30.3", "19.6", "30.4", "23.1", "14.9"]  # the paper's
    assert all(60 < float(row[2]) < 100 for row in found)
    assert result.stderr.count("not the published protocol: windows are not 448x448") == 8
    written = json.loads(Path("tclkit-eval/results.json").read_text())
    assert [one["benchmark"] for one in written["evaluations"]] == list(BENCHMARKS)
    assert written["failed"] == []
    assert list(Path("tclkit-eval").glob("*.png")) == []


def test_what_is_missing_is_named_and_the_others_run(invoke: Invoke, data: Path, model: list[str]) -> None:
    for key in ("cityscapes", "context"):
        invoke("data", "prepare", key, "--root", "data")
    split = data / "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt"
    split.unlink()
    (data / "ade/ADEChallengeData2016/images/validation/ADE_val_00000001.jpg").write_bytes(b"\xff\xd8 no more")
    labels = data / "ade/ADEChallengeData2016/annotations/validation"
    Image.new("RGB", (65, 130)).save(labels / "ADE_val_00000002.png")
    Image.new("L", (10, 10)).save(data / "VOCdevkit/VOC2012/SegmentationClass/2007_000042.png")
    named = [part for key in ("ade20k", "context", "voc20", "cityscapes") for part in ("-b", key)]
    result = invoke("eval", *named, "--data", "data", "--json", "--no-pictures", *model)
    assert result.exit_code == 1
    found = document(result)
    by_key = {one["benchmark"]: one for one in found["evaluations"]}
    assert by_key["cityscapes"]["left_out"] == []
    assert by_key["ade20k"]["images"] == {"total": 3, "counted": 1, "pending": 0}
    first, second = by_key["ade20k"]["left_out"]
    assert (first["name"], second["name"]) == ("ADE_val_00000001", "ADE_val_00000002")
    assert "ADE_val_00000001.jpg" in first["reason"]
    assert "holds RGB pixels" in second["reason"]
    ((failed,),) = [found["failed"]]
    assert failed["benchmark"] == "context"
    assert str(split.relative_to(data.parent)) in failed["reason"]
    (mismatch,) = by_key["voc20"]["left_out"]
    assert "is 10 x 10 pixels, but" in mismatch["reason"]
    for text in (
        "error: context: ",
        "error: ade20k: ADE_val_00000001: ",
        "error: voc20: 2007_000042: ",
        "error: left out: 2 image(s) of ade20k, 1 image(s) of voc20",
        "error: not evaluated: context",
    ):
        assert text in result.stderr


def test_prepare_says_what_is_missing(invoke: Invoke, data: Path) -> None:
    checked = invoke("data", "prepare", "coco_object", "--root", "data", "--check")
    assert (checked.exit_code, checked.stdout) == (1, "")
    assert "tclkit data prepare coco_object" in checked.stderr
    (data / "VOCdevkit/VOC2012/SegmentationClass/2007_000042.png").unlink()
    result = invoke("data", "prepare", "voc", "--root", "data", "--json")
    assert result.exit_code == 1
    (report,) = document(result)["benchmarks"]
    assert (report["images"], len(report["missing"])) == (3, 1)
    assert report["missing"][0].endswith("2007_000042.png does not exist")
    assert invoke("data", "prepare", "voc21", "--root", "data").exit_code == 2
    assert invoke("data").exit_code == 2


def test_own_data(invoke: Invoke, here: Path, mini: ModuleType, model: list[str]) -> None:
    mini.write_own(here / "own")
    result = invoke("eval", "-b", "folder", "--data", "own", "--kp", "0", "--classes", *model)
    assert result.exit_code == 0, result.stderr
    (row, *rest) = rows(result)
    assert row[0] == "folder"
    assert row[3] == "-"  # nobody published a figure for it
    assert float(row[2]) > 90
    assert {line[0] for line in rest} >= {"background", "car", "sky"}
    for part in ("confusion", "best", "worst"):
        with Image.open(f"tclkit-eval/folder-{part}.png") as picture:
            assert picture.format == "PNG"
    (here / "names.txt").write_text("nothing\ncar\nsky\n")
    result = invoke("eval", "-b", "folder", "--data", "own", "--names", "names.txt", "--json", "--no-pictures", *model)
    (found,) = document(result)["evaluations"]
    assert [one["name"] for one in found["results"]["fp32"]["all"]["classes"]] == ["nothing", "car", "sky"]


def test_the_synthetic_world(invoke: Invoke, here: Path) -> None:
    """The model that ships, on scenes it has not seen, asked for what is there and for all 64 names."""
    result = invoke("eval", "--limit", "4", "--no-pictures")
    assert result.exit_code == 0, result.stderr
    (present, everything) = rows(result)
    assert (present[:3], everything[:3]) == (["shapes", "present", "fp32"], ["shapes", "all", "fp32"])
    assert float(present[3]) > float(everything[3])
    assert float(present[3]) > 40
    assert present[-1] == "4"
    again = invoke("eval", "--limit", "4", "--no-pictures")
    assert again.stdout == result.stdout  # times, too: nothing was computed again


def test_several_sizes(
    invoke: Invoke, data: Path, tiny: ModuleType, mini: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of both sizes; another run than that of one size, and the published protocol no longer."""
    monkeypatch.setattr(tiny, "PALETTE", mini.CLASS_COLOURS)
    model = tiny.write_tiny_bundle(tmp_path / "model", more_sizes=[(128, 128)])
    arguments = ["eval", "-b", "voc20", "--data", "data", "--model", model, "--flip"]
    (plain,) = rows(invoke(*arguments, "--no-pictures"))
    result = invoke(*arguments, "--scales")
    assert result.exit_code == 0, result.stderr
    (row,) = rows(result)
    assert row[2] != plain[2]
    assert float(row[2]) > 60
    assert "not the published protocol: masks are the mean over several sizes of the image" in result.stderr
    assert Path("tclkit-eval/voc20-best.png").is_file()


@pytest.fixture
def with_half(here: Path, tiny: ModuleType) -> Path:
    """tcl-shapes with a graph under fp16 and int8 whose weights are rounded to half and to 8 bits."""
    import onnx
    from onnx import numpy_helper

    from tclkit.runtime import find_bundle

    folder = Path(shutil.copytree(find_bundle("tcl-shapes"), here / "half"))
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest.pop("manifest_sha256", None)
    for precision in ("fp16", "int8"):
        graph = onnx.load(folder / "image.onnx")
        for constant in graph.graph.initializer:
            values = numpy_helper.to_array(constant)
            if values.dtype == np.float32 and values.ndim >= 2:
                scale = np.abs(values).max() / 127
                rounded = values.astype(np.float16) if precision == "fp16" else np.round(values / scale) * scale
                constant.CopyFrom(numpy_helper.from_array(rounded.astype(np.float32), constant.name))
        onnx.save(graph, folder / f"image.{precision}.onnx")
        manifest["images"][0]["files"][precision] = f"image.{precision}.onnx"
    tiny.write_manifest(folder, manifest)
    return folder


def test_precisions_side_by_side(invoke: Invoke, with_half: Path) -> None:
    result = invoke("eval", "--compare", "fp32,fp16,int8", "--limit", "3", "--model", with_half, "--no-pictures")
    assert result.exit_code == 0, result.stderr
    found = rows(result)
    assert [row[1:3] for row in found] == [
        [view, precision] for view in ("present", "all") for precision in ("fp32", "fp16", "int8")
    ]
    agreement = {(row[1], row[2]): float(row[7]) for row in found}
    assert agreement["all", "fp32"] == 100
    assert 99 < agreement["all", "fp16"] <= 100
    assert 50 < agreement["all", "int8"] < 100
    assert all(float(row[6]) > 0 for row in found)  # milliseconds


def test_a_killed_run_goes_on(invoke: Invoke, here: Path, mini: ModuleType, model: list[str]) -> None:
    """SIGKILL in the middle, while images are slow; then the same command, and the figures of one run."""
    mini.write_own(here / "own")
    for number in range(3, 12):
        for part in ("images", "labels"):
            shutil.copy(here / f"own/{part}/shot-{number % 3}.png", here / f"own/{part}/shot-{number:02}.png")
    arguments = ["eval", "-b", "folder", "--data", "own", "--json", "--no-pictures", *model]
    slow = (
        "import time; from tclkit.calib.prediction import Predictor as P; predict = P.predict\n"
        "P.predict = lambda self, example: (time.sleep(0.1), predict(self, example))[1]\n"
        "from tclkit.cli import run; run()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments, "-o", "killed"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline_s = time.monotonic() + 60
    while lines_of(here / "killed") < 4 and time.monotonic() < deadline_s and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    kept = lines_of(here / "killed")
    assert 3 < kept < 12
    resumed, whole = (invoke(*arguments, "-o", folder) for folder in ("killed", "whole"))
    assert figures(resumed) == figures(whole)
    assert f"{kept - 1} of 12 images are from the journal in killed/journal" in resumed.stderr
    assert "from the journal" not in whole.stderr
    assert document(whole)["evaluations"][0]["images"] == {"total": 12, "counted": 12, "pending": 0}
    assert lines_of(here / "killed") == 12 + 2  # each file begins with a line of its own; no image is there twice


def lines_of(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (folder / "journal").glob("*.jsonl"))


def test_ranks_and_workers(invoke: Invoke, here: Path, mini: ModuleType, model: list[str]) -> None:
    mini.write_own(here / "own")
    arguments = ["eval", "-b", "folder", "--data", "own", "--json", *model]
    first = invoke(*arguments, "-o", "shared", "--rank", "0", "--world-size", "2")
    assert first.exit_code == 0
    assert document(first)["evaluations"][0]["images"]["pending"] == 1
    assert "1 of 3 images are still to come from other ranks" in first.stderr
    assert list(Path("shared").glob("*.png")) == []
    last = invoke(*arguments, "-o", "shared", "--rank", "1", "--world-size", "2")
    whole = invoke(*arguments, "-o", "whole", "--workers", "2")
    assert figures(last) == figures(whole)
    assert Path("shared/folder-confusion.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-b", "voc"], "--data DIR is needed"),
        (["--data", "d"], "shapes draws its own images"),
        (["-b", "vok", "--data", "d"], "did you mean 'voc'"),
        (["-b", "voc", "--data", "d", "--names", "n"], "--names goes with --benchmark folder"),
        (["--compare", "fp32,fp8"], "not 'fp8'"),
        (["--compare", "fp32,fp16", "--precision", "fp16"], "exclude each other"),
        (["-b", "ade20k", "--data", "d", "--threshold", "0.5"], "no effect on ade20k"),
        (["-b", "voc20", "--data", "d", "--contrast", "sky"], "no effect on voc20"),
        (["--clip", "ViT-B-16"], "--clip goes with --torch CHECKPOINT"),
        (["--contrast", " "], "--contrast: is empty"),
        (["--rank", "3", "--world-size", "2"], "ranks of 2 are 0 to 1"),
        (["--compare", "fp32,fp32"], "one or more different"),
        (["--limit", "0"], "--limit"),
        (["--threshold", "2"], "not in the range"),
    ],
)
def test_usage_errors(invoke: Invoke, here: Path, arguments: list[str], text: str) -> None:
    result = invoke("eval", *arguments)
    assert result.exit_code == 2
    message = " ".join(result.stderr.replace("│", " ").split())
    assert text in message
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--precision", "int8"], "no image graph in int8"),
        (["--torch", "no-such.pt"], "there is no file no-such.pt"),
        (["--scales"], "of one aspect in two sizes or more, found 128x128"),
        (["-o", "file"], "file is a file, but the results need a folder"),
    ],
)
def test_errors_are_one_line(invoke: Invoke, here: Path, arguments: list[str], text: str) -> None:
    Path("file").write_text("")
    result = invoke("eval", *arguments)
    assert result.exit_code == 1
    assert text in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_where_nothing_was_evaluated_earlier_results_stay(invoke: Invoke, here: Path) -> None:
    Path("tclkit-eval").mkdir()
    Path("tclkit-eval/results.json").write_text("of an earlier run")
    result = invoke("eval", "-b", "voc", "--data", "nope")
    assert result.exit_code == 1
    assert Path("tclkit-eval/results.json").read_text() == "of an earlier run"
    assert "results:" not in result.stderr
