"""Records say what passed the gate where, are read strictly, and count for nothing elsewhere."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino
import pytest

from tclkit.runtime import cpu_records
from tclkit.runtime.bundle import open_bundle
from tclkit.runtime.cpu_records import (
    CPU_RECORDS_FOLDER,
    GATE_FIGURES,
    CpuIdentity,
    CpuRecord,
    cpu_identity,
    cpu_misfit,
    fitting_precisions,
    graph_file,
    outdated_graphs,
    read_cpu_records,
    write_cpu_record,
)
from tclkit.runtime.errors import BundleError
from tclkit.runtime.openvino_backend import openvino_core

HERE = CpuIdentity(openvino_version="2026.4.1-1", processor="EPYC", flags_sha256="a" * 64, system="Linux x86_64")


@pytest.fixture
def folder(tiny_bundle_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle_folder, tmp_path / "tiny"))


def record(folder: Path, precision: str = "bf16", size: tuple[int, int] = (64, 64), **changes: Any) -> CpuRecord:
    figures = dict.fromkeys(GATE_FIGURES, 0.99)
    values: dict[str, Any] = {
        "precision": precision,
        "height": size[0],
        "width": size[1],
        "graph_sha256": open_bundle(folder).manifest.files["image.onnx"].sha256,
        "figures": figures,
        "thresholds": figures,
        **dataclasses.asdict(HERE),
    }
    return CpuRecord(**(values | changes))


def test_what_is_written_is_read(folder: Path) -> None:
    written = write_cpu_record(folder, record(folder))
    bundle = open_bundle(folder)
    assert read_cpu_records(bundle) == (written,)
    assert written.created
    assert written.tclkit_version
    assert written.name == "image-bf16-64x64"
    assert cpu_misfit(bundle, written, HERE) == ""
    assert fitting_precisions(bundle, HERE) == ("bf16",)


def test_the_fastest_comes_first_and_every_size_counts(write_tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path / "two", more_sizes=[(32, 96)])
    bundle = open_bundle(folder)
    for precision in ("fp32", "bf16"):
        write_cpu_record(folder, record(folder, precision))
    assert fitting_precisions(bundle, HERE) == ()
    files = {(entry.height, entry.width): entry.files["fp32"] for entry in bundle.manifest.images}
    other = bundle.manifest.files[files[32, 96]].sha256
    for precision in ("fp32", "bf16"):
        write_cpu_record(folder, record(folder, precision, (32, 96), graph_sha256=other))
    assert fitting_precisions(bundle, HERE) == ("bf16", "fp32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"openvino_version": "2025.1.0-7"}, "judged with OpenVINO 2025.1.0 on EPYC, but this machine has OpenVINO 2"),
        ({"processor": "Xeon"}, "judged with OpenVINO 2026.4.1 on Xeon, but"),
        ({"flags_sha256": "b" * 64}, "but this machine has another processor of this name"),
        ({"system": "Linux aarch64"}, "but this machine has another processor of this name"),
        ({"graph_sha256": "c" * 64}, "judged with another image graph than tiny has now"),
        ({"precision": "int8"}, "judged with another image graph"),
        ({"height": 128}, "judged with another image graph"),
    ],
)
def test_what_does_not_fit_counts_for_nothing(folder: Path, change: dict[str, Any], message: str) -> None:
    made = write_cpu_record(folder, record(folder, **change))
    bundle = open_bundle(folder)
    assert message in cpu_misfit(bundle, made, HERE)
    assert fitting_precisions(bundle, HERE) == ()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda raw: "no json", "is not valid JSON"),
        (lambda raw: "[]", "an object was expected, found list"),
        (lambda raw: raw | {"schema_version": 2}, "'schema_version' should be 1, found 2"),
        (lambda raw: {**raw, "graph_sha256": "xyz"}, "'graph_sha256' should be 64 lower-case hexadecimal digits"),
        (lambda raw: {**raw, "precision": "half"}, "'precision' should be one of fp32, fp16, bf16, int8"),
        (lambda raw: {**raw, "precision": "fp32"}, "describes image-fp32-64x64"),
        (lambda raw: {**raw, "height": 0}, "'height' should be an integer above 0"),
        (lambda raw: {**raw, "figures": {}}, "'figures' should be those of the gate"),
        (lambda raw: {**raw, "thresholds": dict.fromkeys(GATE_FIGURES, 2)}, "should be a number in [0, 1], found 2"),
        (lambda raw: {**raw, "extra": 1}, "has the unknown key 'extra'"),
        (lambda raw: {k: v for k, v in raw.items() if k != "system"}, "lacks the key 'system'"),
    ],
)
def test_a_broken_record_is_announced_and_left_out(
    folder: Path, harm: Callable[[dict[str, Any]], Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_cpu_record(folder, record(folder))
    path = folder / CPU_RECORDS_FOLDER / "image-bf16-64x64.json"
    harmed = harm(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(harmed if isinstance(harmed, str) else json.dumps(harmed), encoding="utf-8")
    assert read_cpu_records(open_bundle(folder)) == ()
    assert message in caplog.text
    assert "tclkit build-engine --device cpu" in caplog.text


def test_a_record_with_wrong_values_is_never_made(folder: Path) -> None:
    with pytest.raises(BundleError, match="'flags_sha256' should be"):
        record(folder, flags_sha256="")


def test_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    core = openvino_core()
    here = cpu_identity(core)
    assert here == cpu_identity(core)
    assert str(here) == f"OpenVINO {openvino.get_version().split('-')[0]} on {here.processor}"
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags : fpu sse\n", encoding="utf-8")
    monkeypatch.setattr(cpu_records, "_CPUINFO", tmp_path / "cpuinfo")
    fewer = cpu_identity(core)
    assert fewer.flags_sha256 != here.flags_sha256
    monkeypatch.setattr(cpu_records, "_CPUINFO", tmp_path / "none")  # not Linux
    assert cpu_identity(core).flags_sha256 not in (fewer.flags_sha256, here.flags_sha256)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_for_processors_comes_first(
    precision: str, folder: Path, add_processor_graph: Callable[..., str]
) -> None:
    common = record(folder, precision)
    assert graph_file(open_bundle(folder), precision, (64, 64)) == "image.onnx"
    file = add_processor_graph(folder)
    bundle = open_bundle(folder)
    assert graph_file(bundle, precision, (64, 64)) == file
    assert graph_file(bundle, "int8", (64, 64)) is None
    assert graph_file(bundle, precision, (32, 32)) is None
    assert "judged with another image graph" in cpu_misfit(bundle, common, HERE)
    own = record(folder, precision, graph_sha256=bundle.manifest.files[file].sha256)
    assert cpu_misfit(bundle, own, HERE) == ""


def test_an_outdated_graph_is_not_run_and_named(folder: Path, add_processor_graph: Callable[..., str]) -> None:
    assert outdated_graphs(open_bundle(folder)) == {}
    file = add_processor_graph(folder, source_sha256="ab" * 32)
    bundle = open_bundle(folder)
    assert graph_file(bundle, "fp32", (64, 64)) == "image.onnx"
    why = outdated_graphs(bundle)[file]
    assert "image.cpu.onnx was made from another float32 graph than tiny has now, and is not run" in why
    assert "tclkit build-engine --device cpu" in why
