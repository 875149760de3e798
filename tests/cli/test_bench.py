import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import Result

Invoke = Callable[..., Result]
QUICK = ("--rounds", "2", "--warm-up", "1", "--no-memory", "--threads", "1", "--image", "small.png")


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small picture in the current folder, and small matrices for the machine's peak."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save("small.png")
    from tclkit.calib import bench

    opened = bench.open_gemm_meters
    monkeypatch.setattr(bench, "open_gemm_meters", lambda names, threads, side: opened(names, threads=threads, side=64))


def test_tables_files_and_exit_code(tiny_model: Path, invoke: Invoke) -> None:
    result = invoke("bench", *QUICK, "--backend", "onnxruntime,tensorrt", "--precision", "fp32", "--prompts", "2,1")
    assert result.exit_code == 0
    for text in ("Frames of tiny", "Did not run", "Where the time goes", "Matrix multiplication", "machine:"):
        assert text in result.stdout
    assert "tensorrt" in result.stdout.partition("Did not run")[2]
    document = json.loads(Path("tclkit-bench/results.json").read_text(encoding="utf-8"))
    assert [(row["contender"], row["prompts"]) for row in document["rows"]] == [
        ("onnxruntime fp32", 2),
        ("onnxruntime fp32", 1),
    ]
    with Image.open("tclkit-bench/chart.png") as chart:
        assert (chart.format, chart.size[0]) == ("PNG", 1200)
    assert sorted(path.name for path in Path("tclkit-bench").iterdir()) == ["chart.png", "results.json"]


def test_one_document_for_a_pipe(tiny_model: Path, invoke: Invoke) -> None:
    arguments = ("--backend", "onnxruntime", "--prompts", "2", "--batch", "1,3", "--size", "64x64", "-o", "here")
    result = invoke("bench", *QUICK, *arguments, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document == json.loads(Path("here/results.json").read_text(encoding="utf-8"))
    assert [row["batch"] for row in document["rows"]] == [1, 3]
    assert document["settings"]["seed"] == 0


def test_when_none_runs_it_fails_and_says_why(
    tiny_model: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tclkit.calib.bench.open_gemm_meters", lambda *_, **__: pytest.fail("the peak was measured"))
    Path("tclkit-bench").mkdir()
    Path("tclkit-bench/results.json").write_text("of an earlier run")
    result = invoke("bench", *QUICK, "--backend", "onnxruntime", "--precision", "int8", "--prompts", "2")
    assert result.exit_code == 1
    assert Path("tclkit-bench/results.json").read_text() == "of an earlier run"
    assert "written" not in result.stderr
    assert "error: onnxruntime int8: " in result.stderr
    assert "no image graph in int8" in result.stderr
    assert not Path("tclkit-bench/chart.png").exists()


def test_against_torch(invoke: Invoke) -> None:
    result = invoke("bench", *QUICK, "--backend", "onnxruntime", "--prompts", "1", "--against", "torch", "--json")
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["rows"]
    assert [row["contender"] for row in rows] == ["onnxruntime fp32", "torch fp32"]
    assert rows[1]["gflop"] > rows[0]["gflop"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "onnxrutnime"], "unknown backend 'onnxrutnime'"),
        (["--backend", ""], "unknown backend ''"),
        (["--precision", "fp32,fp8"], "unknown precision 'fp8'"),
        (["--prompts", "1,,2"], "no whole number"),
        (["--prompts", "-3"], "no whole number"),
        (["--prompts", "0"], "from 1 to 10000, got 0"),
        (["--prompts", "99999999999"], "from 1 to 10000"),
        (["--batch", "two"], "no whole number"),
        (["--batch", "2,2"], "batches should be different ones"),
        (["--size", "448"], "write HEIGHTxWIDTH"),
        (["--size", "-448x448"], "write HEIGHTxWIDTH"),
        (["--rounds", "0"], "--rounds"),
        (["--against", "jax"], "--against"),
    ],
    ids=str,
)
def test_wrong_usage_is_told_before_anything_runs(invoke: Invoke, arguments: list[str], message: str) -> None:
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not Path("tclkit-bench").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tcl-shaeps"], "tcl-shaeps"),
        (["--size", "0x448"], "no image graph for 0x448, only for 64x64"),
        (["--image", "missing.jpg"], "missing.jpg does not exist"),
        (["--image", "."], "is a folder, not an image"),
        (["-o", "small.png"], "small.png is a file, but the results need a folder: give another with -o"),
        (["-o", "small.png/here"], "small.png is a file, but the results need a folder: give another with -o"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_one_line(tiny_model: Path, invoke: Invoke, arguments: list[str], message: str) -> None:
    result = invoke("bench", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1
    assert result.stdout == ""


def test_a_disk_that_fills_up_costs_the_files_only(
    tiny_model: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    result = invoke("bench", *QUICK, "--backend", "onnxruntime", "--precision", "fp32", "--prompts", "1")
    assert result.exit_code == 1
    assert "Frames of tiny" in result.stdout
    assert "error: tclkit-bench/results.json: No space left on device\n" in result.stderr
