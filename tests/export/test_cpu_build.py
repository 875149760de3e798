"""build-engine and verify on a processor: judged against float32, recorded beside the bundle, refused as a whole."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tclkit.export import cpu_build
from tclkit.export.build import BuildConfig, build_engine
from tclkit.export.gates import THRESHOLDS, GateThresholds
from tclkit.export.verify import verify_bundle
from tclkit.runtime.bundle import find_bundle, open_bundle
from tclkit.runtime.cpu_records import CPU_RECORDS_FOLDER, read_cpu_records, write_cpu_record
from tclkit.runtime.errors import BackendError, ConfigError, ParityError
from tclkit.runtime.files import cache_folder
from tclkit.runtime.openvino_backend import openvino_core
from tclkit.runtime.segmenter import Segmenter
from tclkit.tcl.world import WorldConfig, scenes

HAS_BF16 = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
LOWER = "bf16" if HAS_BF16 else "int8"  # what a processor may be asked for beside float32 without images or with


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of nine unseen scenes: six to calibrate on, three held back."""
    folder = tmp_path_factory.mktemp("scenes")
    for i, scene in enumerate(scenes(WorldConfig(size=128, seed=99), count=9)):
        cv2.imwrite(str(folder / f"{i:02d}.png"), scene.image[..., ::-1])
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find_bundle("tcl-shapes"), tmp_path / "shapes"))


def config(precision: str, images: str | None = None, **options: Any) -> BuildConfig:
    return BuildConfig(precision=precision, device="cpu", calibration=images, calibration_images=6, **options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def blobs() -> list[str]:
    return sorted(path.name for path in (cache_folder() / "openvino").glob("*.blob"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_what_passes_is_recorded_and_taken(precision: str, folder: Path, images: str) -> None:
    if precision == "bf16" and not HAS_BF16:
        with pytest.raises(BackendError, match="no bfloat16 instructions"):
            build_engine(folder, config(precision, images))
        return
    result = build_engine(folder, config(precision, images))
    verdict = result.verdicts[-1]
    assert verdict.artefact == f"image-{precision}-128x128 in OpenVINO"
    assert verdict.passed
    assert verdict.against == "the float32 graph"
    assert verdict.thresholds == THRESHOLDS[precision]
    assert result.missing is None
    assert result.engines == []
    (record,) = read_cpu_records(open_bundle(folder))
    assert [record] == list(result.records)
    assert record.figures["label_agreement"] == verdict.figures.label_agreement
    assert open_bundle(folder).manifest.precisions == (("fp32", "int8") if precision == "int8" else ("fp32",))
    assert len(blobs()) == 2  # the image and the masks graph
    assert not [name for name in contents(folder) if name.endswith(".blob")]
    segmenter = Segmenter.open(folder, backend="openvino", cache=False)
    assert segmenter.backend.precision == precision
    exact = Segmenter.open(folder, backend="openvino", precision="fp32", cache=False)
    assert exact.backend.precision == "fp32"
    image = next(iter(scenes(WorldConfig(size=128, seed=3), count=1))).image
    prompts = ["red circle", "blue star", "green heart"]
    assert np.mean(segmenter(image, prompts).label_map == exact(image, prompts).label_map) > 0.97


def test_several_precisions_stand_beside_each_other(folder: Path, images: str) -> None:
    build_engine(folder, config("fp32"))
    build_engine(folder, config("int8", images))
    assert [one.precision for one in read_cpu_records(open_bundle(folder))] == ["fp32", "int8"]
    assert Segmenter.open(folder, backend="openvino", cache=False).backend.precision == "int8"


@pytest.mark.parametrize("precision", [LOWER, "int8"])
def test_what_fails_leaves_nothing(precision: str, folder: Path, images: str, tmp_path: Path) -> None:
    before = contents(folder)
    strict = GateThresholds(label_agreement=1, mask_iou=1, features_cosine=1)
    with pytest.raises(ParityError, match=r"differs too much from the float32 graph .*\(needs 1\)"):
        build_engine(folder, config(precision, images, thresholds=strict))
    assert contents(folder) == before
    assert blobs() == []
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


@pytest.mark.skipif(not HAS_BF16, reason="the processor has no bfloat16; its refusal is tested without it")
def test_bfloat16_is_refused_with_its_remedy(folder: Path) -> None:
    strict = GateThresholds(label_agreement=1, mask_iou=0, features_cosine=0)
    with pytest.raises(ParityError, match=r"image-bf16-128x128 in OpenVINO .*label_agreement 0\.\d+ .*take --fp32"):
        build_engine(folder, config("bf16", thresholds=strict))


def test_a_graph_prepared_elsewhere_is_judged_against_float32(
    folder: Path, images: str, caplog: pytest.LogCaptureFixture
) -> None:
    mild = GateThresholds(label_agreement=0.9, mask_iou=0.5, features_cosine=0.9)
    build_engine(folder, config("int8", images, thresholds=mild, prepare_only=True))
    assert read_cpu_records(open_bundle(folder)) == ()
    result = build_engine(folder, config("int8"))
    assert "image.int8.onnx is taken as the bundle holds it" in caplog.text
    (verdict,) = result.verdicts
    assert verdict.against == "the float32 graph"
    assert verdict.thresholds == mild  # what it was built with


def test_a_new_graph_outdates_its_record(folder: Path, images: str) -> None:
    build_engine(folder, config("int8", images))
    build_engine(folder, config("fp32"))
    build_engine(folder, config("int8", images, range_method="minmax", prepare_only=True))
    assert [one.precision for one in read_cpu_records(open_bundle(folder))] == ["fp32"]
    assert not (folder / CPU_RECORDS_FOLDER / "image-int8-128x128.json").exists()


@pytest.mark.usefixtures("without_openvino")
def test_without_openvino_int8_is_prepared_and_the_rest_is_missing(folder: Path, images: str) -> None:
    before = contents(folder)
    result = build_engine(folder, config("bf16"))
    assert result.missing == 'OpenVINO is not installed here (pip install "tclkit[openvino]")'
    assert contents(folder) == before
    result = build_engine(folder, config("int8", images))
    assert result.missing is not None
    assert result.records == []
    assert open_bundle(folder).manifest.precisions == ("fp32", "int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16"}, "on the gpu there is fp32, fp16, int8, but not bf16"),
        ({"precision": "fp16", "device": "cpu"}, "on the cpu there is fp32, bf16, int8, but not fp16"),
        ({"precision": "bf16", "device": "cpu", "prepare_only": True}, "nothing to prepare"),
        ({"precision": "bf16", "device": "cpu", "tier": "auto"}, "auto chooses layers for INT8"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildConfig(**options)


def test_verify_judges_openvino(folder: Path, images: str) -> None:
    mild = GateThresholds(label_agreement=0.9, mask_iou=0.5, features_cosine=0.9)
    build_engine(folder, config("int8", images, thresholds=mild))
    found = verify_bundle(folder)
    assert found.passed, found.report()
    by_name = {verdict.artefact: verdict for verdict in found.verdicts}
    assert set(by_name) == {"image.int8.onnx", "image-fp32-128x128 in OpenVINO", "image-int8-128x128 in OpenVINO"}
    assert by_name["image-int8-128x128 in OpenVINO"].thresholds == mild
    assert by_name["image-fp32-128x128 in OpenVINO"].figures.label_agreement > 0.999
    assert found.machine["processor"].startswith("OpenVINO ")
    assert "openvino 20" in found.machine["packages"]


def test_verify_names_what_was_built_elsewhere(folder: Path) -> None:
    build_engine(folder, config("fp32"))
    (record,) = read_cpu_records(open_bundle(folder))
    write_cpu_record(folder, dataclasses.replace(record, processor="Xeon"))
    found = verify_bundle(folder)
    assert "judged with OpenVINO" in found.not_for_here["image-fp32-128x128 in OpenVINO"]
    assert found.passed


def test_verify_tells_of_what_openvino_cannot_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise BackendError(f"{folder} cannot be compiled")

    monkeypatch.setattr("tclkit.export.verify.cpu_backend", fails)
    found = verify_bundle(folder)
    assert not found.passed
    assert found.problems["fp32 in OpenVINO 128x128"] == "tcl-shapes cannot be compiled"


@pytest.mark.usefixtures("without_openvino")
def test_verify_without_openvino(folder: Path) -> None:
    assert "processor" not in verify_bundle(folder).not_for_here
    raw = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    record = {
        "schema_version": 1,
        "precision": "fp32",
        "height": 128,
        "width": 128,
        "graph_sha256": raw["files"]["image.onnx"]["sha256"],
        "openvino_version": "2026.4.1-1",
        "processor": "Xeon",
        "flags_sha256": "a" * 64,
        "system": "Linux x86_64",
        **{
            key: dict.fromkeys(("label_agreement", "mask_iou", "features_cosine"), 1)
            for key in ("figures", "thresholds")
        },
        "created": "2026-01-01T00:00:00+00:00",
        "tclkit_version": "0.1.0",
    }
    (folder / CPU_RECORDS_FOLDER).mkdir(parents=True)
    (folder / CPU_RECORDS_FOLDER / "image-fp32-128x128.json").write_text(json.dumps(record), encoding="utf-8")
    assert "OpenVINO is not installed here" in verify_bundle(folder).not_for_here["processor"]


def test_a_broken_openvino_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise BackendError("openvino cannot be imported (no TBB)")

    monkeypatch.setattr(cpu_build, "openvino_core", fails)
    assert cpu_build.missing_for_cpu() == "openvino cannot be imported (no TBB)"
