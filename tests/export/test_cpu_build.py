"""build-engine and verify on a processor: judged against float32, recorded beside the bundle, refused as a whole."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tclkit.export import build, cpu_build
from tclkit.export.build import BuildConfig, BuildResult, build_engine
from tclkit.export.decoder import DecoderForm
from tclkit.export.decoder_graph import rewrite_decoder
from tclkit.export.gates import THRESHOLDS, GateThresholds
from tclkit.export.verify import verify_bundle
from tclkit.runtime.bundle import find_bundle, open_bundle, write_manifest
from tclkit.runtime.cpu_records import CPU_RECORDS_FOLDER, read_cpu_records, write_cpu_record
from tclkit.runtime.errors import BackendError, BundleError, ConfigError, ExportError, InputError, ParityError
from tclkit.runtime.extras import install_command
from tclkit.runtime.files import cache_folder
from tclkit.runtime.openvino_backend import openvino_core
from tclkit.runtime.segmenter import Segmenter
from tclkit.tcl.world import WorldConfig, scenes

from .precision_models import with_weights

HAS_BF16 = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
MILD = GateThresholds(label_agreement=0.9, mask_iou=0.5, features_cosine=0.9)
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


@pytest.fixture(scope="module")
def int8_build(images: str, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """The shipped bundle built in INT8 for this processor, for reading only; copy its folder before changing it."""
    folder = Path(shutil.copytree(find_bundle("tcl-shapes"), tmp_path_factory.mktemp("built") / "shapes"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCLKIT_HOME", str(tmp_path_factory.mktemp("home")))
        return build_engine(folder, config("int8", images, thresholds=MILD))


@pytest.fixture
def built(int8_build: BuildResult, tmp_path: Path) -> Path:
    """A copy of that bundle."""
    return Path(shutil.copytree(int8_build.bundle, tmp_path / "built"))


def processor_files(folder: Path) -> dict[str, tuple[str, str]]:
    """Precision -> file and form of the decoder of what only processors run."""
    (image,) = open_bundle(folder).manifest.images
    return {precision: (graph.file, graph.decoder) for precision, graph in image.processor.items()}


def labels_equal(folder: Path, precision: str) -> float:
    """Share of the pixels of a scene that OpenVINO labels as ONNX Runtime does in float32."""
    exact = Segmenter.open(folder, backend="onnxruntime", precision="fp32", cache=False)
    segmenter = Segmenter.open(folder, backend="openvino", precision=precision, cache=False)
    assert segmenter.backend.precision == precision
    image = next(iter(scenes(WorldConfig(size=128, seed=3), count=1))).image
    prompts = ["red circle", "blue star", "green heart"]
    return float(np.mean(segmenter(image, prompts).label_map == exact(image, prompts).label_map))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_passes_is_recorded_and_taken(precision: str, folder: Path, images: str) -> None:
    if precision == "bf16" and not HAS_BF16:
        with pytest.raises(BackendError, match="no bfloat16 instructions"):
            build_engine(folder, config(precision, images))
        return
    result = build_engine(folder, config(precision, images))
    rewritten, verdict = result.verdicts
    assert (rewritten.artefact, rewritten.precision, rewritten.passed) == ("image.cpu.onnx", "fp32", True)
    assert rewritten.thresholds == THRESHOLDS["fp32"]
    assert verdict.artefact == f"image-{precision}-128x128 in OpenVINO"
    assert verdict.passed
    assert {rewritten.against, verdict.against} == {"the float32 graph"}
    assert verdict.thresholds == THRESHOLDS[precision]
    assert result.missing is None
    assert result.engines == []
    bundle = open_bundle(folder)
    (record,) = read_cpu_records(bundle)
    assert [record] == list(result.records)
    assert record.figures["label_agreement"] == verdict.figures.label_agreement
    assert record.graph_sha256 == bundle.manifest.files["image.cpu.onnx"].sha256
    assert processor_files(folder) == {"fp32": ("image.cpu.onnx", "winograd4")}
    note = bundle.manifest.checks["fp32"]["image.cpu.onnx"]
    assert note["made"]["decoder"] == "winograd4"
    assert note["label_agreement"] == rewritten.figures.label_agreement
    assert bundle.manifest.precisions == ("fp32",)
    assert len(blobs()) == 2  # the image and the masks graph
    assert not [name for name in contents(folder) if name.endswith(".blob")]
    assert Segmenter.open(folder, backend="openvino", cache=False).backend.precision == precision
    assert labels_equal(folder, precision) > 0.99


def test_int8_for_a_processor(int8_build: BuildResult) -> None:
    folder = int8_build.bundle
    assert [verdict.artefact for verdict in int8_build.verdicts] == [
        "image.onnx in winograd4",
        "image.cpu.int8.onnx",
        "image-int8-128x128 in OpenVINO",
    ]
    assert [verdict.thresholds for verdict in int8_build.verdicts] == [THRESHOLDS["fp32"], MILD, MILD]
    assert processor_files(folder) == {"int8": ("image.cpu.int8.onnx", "winograd4")}
    assert sorted(path.name for path in folder.glob("image*.onnx")) == ["image.cpu.int8.onnx", "image.onnx"]
    bundle = open_bundle(folder)
    (record,) = read_cpu_records(bundle)
    assert record.graph_sha256 == bundle.manifest.files["image.cpu.int8.onnx"].sha256
    made = bundle.manifest.checks["int8"]["image.cpu.int8.onnx"]["made"]
    assert (made["decoder"], made["int8_share"]) == ("winograd4", 1)
    assert len([name for name in made["int8_layers"] if name.startswith("grounder.decoder.")]) > 100  # products
    assert made["smoothing"] == 0.5  # as asked for, but what makes the products' input takes no factors
    assert not [name for name in made["smoothed_layers"] if name.startswith("grounder.decoder.")]
    assert set(made["smoothed_layers"]) < set(made["int8_layers"])
    assert 0 < made["smoothed_share"] < 0.5
    assert labels_equal(folder, "int8") > 0.97
    with pytest.raises(BackendError, match="has no image graph in int8, only in fp32"):
        Segmenter.open(folder, backend="onnxruntime", precision="int8")


def test_several_precisions_stand_beside_each_other(built: Path, images: str, caplog: pytest.LogCaptureFixture) -> None:
    build_engine(built, config("fp32"))
    assert [one.precision for one in read_cpu_records(open_bundle(built))] == ["fp32", "int8"]
    assert Segmenter.open(built, backend="openvino", cache=False).backend.precision == "int8"
    before = (built / "image.cpu.onnx").stat().st_ino
    result = build_engine(built, config("fp32", images))  # a float32 graph needs no images: it is not made again
    assert "image.cpu.onnx, with its decoder in the form winograd4, is taken as the bundle holds it" in caplog.text
    assert [verdict.artefact for verdict in result.verdicts] == ["image-fp32-128x128 in OpenVINO"]
    assert (built / "image.cpu.onnx").stat().st_ino == before


def test_int8_for_gpus_and_for_processors_in_one_bundle(
    built: Path, images: str, caplog: pytest.LogCaptureFixture
) -> None:
    gpus = BuildConfig(precision="int8", calibration=images, calibration_images=6, prepare_only=True, thresholds=MILD)
    build_engine(built, gpus)
    bundle = open_bundle(built)
    assert bundle.manifest.precisions == ("fp32", "int8")
    assert set(bundle.manifest.checks["int8"]) == {"image.int8.onnx", "image.cpu.int8.onnx"}
    assert Segmenter.open(built, backend="openvino", cache=False).backend.precision == "int8"  # its record fits still
    assert Segmenter.open(built, backend="onnxruntime", precision="int8", cache=False).backend.precision == "int8"
    result = build_engine(built, config("int8", decoder="direct"))
    assert "image.cpu.int8.onnx is removed: processors take the graph of every device" in caplog.text
    assert "image.int8.onnx is taken as the bundle holds it (INT8: all)" in caplog.text
    assert [verdict.artefact for verdict in result.verdicts] == ["image-int8-128x128 in OpenVINO"]
    bundle = open_bundle(built)
    assert result.records[0].graph_sha256 == bundle.manifest.files["image.int8.onnx"].sha256
    assert set(bundle.manifest.checks["int8"]) == {"image.int8.onnx"}
    assert processor_files(built) == {}
    assert not (built / "image.cpu.int8.onnx").exists()
    before = contents(built)
    with pytest.raises(InputError, match=r"needs images .*image\.int8\.onnx is for every device, .*--decoder direct"):
        build_engine(built, config("int8"))
    assert contents(built) == before


def test_direct_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = contents(folder)
    build_engine(folder, config("fp32"))
    build_engine(folder, config(LOWER if LOWER == "bf16" else "fp32", decoder="direct"))
    assert "image.cpu.onnx is removed" in caplog.text
    assert "float32 and bfloat16 share it" in caplog.text
    assert processor_files(folder) == {}
    assert [one.precision for one in read_cpu_records(open_bundle(folder))] == [LOWER if HAS_BF16 else "fp32"]
    after = contents(folder)
    assert set(after) - set(before) == {f"{CPU_RECORDS_FOLDER}/image-{LOWER if HAS_BF16 else 'fp32'}-128x128.json"}
    assert json.loads(after["bundle.json"])["checks"] == json.loads(before["bundle.json"])["checks"]


def test_a_form_that_is_named_is_made(folder: Path) -> None:
    build_engine(folder, config("fp32", decoder="phases"))
    assert processor_files(folder) == {"fp32": ("image.cpu.onnx", "phases")}
    assert build_engine(folder, config("fp32")).graphs == []  # what is there is taken where none is named
    assert processor_files(folder) == {"fp32": ("image.cpu.onnx", "phases")}
    build_engine(folder, config("fp32", decoder="winograd4", prepare_only=True))
    assert processor_files(folder) == {"fp32": ("image.cpu.onnx", "winograd4")}
    assert read_cpu_records(open_bundle(folder)) == ()  # of the graph before


def test_int8_of_another_form_needs_images(built: Path) -> None:
    with pytest.raises(InputError, match=r"image\.cpu\.int8\.onnx has its decoder in the form winograd4: leave"):
        build_engine(built, config("int8", decoder="phases"))
    with pytest.raises(InputError, match=r"quantises all, not decoder-only.*--calibration"):
        build_engine(built, config("int8", tier="decoder-only"))


def exported_in_winograd4(folder: Path) -> Path:
    """The bundle as `tclkit export --decoder winograd4` would have written it."""
    raw = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    model = rewrite_decoder(onnx.load(folder / "image.onnx"), "winograd4")
    (folder / "image.onnx").write_bytes(model.SerializeToString())
    raw["provenance"]["decoder"] = "winograd4"
    write_manifest(folder, raw)
    return folder


@pytest.mark.parametrize("named", [None, "winograd4"])
def test_a_bundle_that_was_exported_for_processors_is_taken_as_it_is(named: str | None, folder: Path) -> None:
    result = build_engine(exported_in_winograd4(folder), config("fp32", decoder=named))
    assert [verdict.artefact for verdict in result.verdicts] == ["image-fp32-128x128 in OpenVINO"]
    assert processor_files(folder) == {}


@pytest.mark.parametrize("named", ["direct", "phases"])
def test_another_form_cannot_be_made_of_it(named: str, folder: Path) -> None:
    with pytest.raises(InputError, match=r"exported with --decoder winograd4, and only .* Leave --decoder out"):
        build_engine(exported_in_winograd4(folder), config("fp32", decoder=named))


@pytest.mark.parametrize("named", [None, "winograd4"])
def test_a_graph_without_such_a_decoder(
    named: str | None, write_tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_tiny_bundle(tmp_path / "tiny")
    before = contents(folder)
    with pytest.raises(ExportError, match=r"image\.onnx of tiny: the graph has no decoder .*: --decoder direct"):
        build_engine(folder, config("fp32", decoder=named, prompts=("red", "blue")))
    assert contents(folder) == before
    build_engine(folder, config("fp32", decoder="direct", prompts=("red", "blue")))
    assert [one.precision for one in read_cpu_records(open_bundle(folder))] == ["fp32"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_rewrite_that_computes_something_else_is_refused(
    precision: str, folder: Path, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(model: onnx.ModelProto, form: DecoderForm) -> onnx.ModelProto:
        made = rewrite_decoder(model, form)
        weight = next(one for one in made.graph.initializer if "products.12" in one.name)
        return with_weights(made, {weight.name: numpy_helper.to_array(weight) * 1.5})

    monkeypatch.setattr(build, "rewrite_decoder", faulty)
    before = contents(folder)
    name = r"image\.cpu\.onnx" if precision == "fp32" else r"image\.onnx in winograd4"
    with pytest.raises(ParityError, match=rf"{name} differs too much .*take --decoder differences, .* direct"):
        build_engine(folder, config(precision, images if precision == "int8" else None))
    assert contents(folder) == before


def test_a_float32_graph_that_has_changed_outdates_it(
    folder: Path, images: str, caplog: pytest.LogCaptureFixture
) -> None:
    build_engine(folder, config("fp32"))
    graph = onnx.load(folder / "image.onnx")
    graph.graph.name = "another"
    (folder / "image.onnx").write_bytes(graph.SerializeToString())
    write_manifest(folder, json.loads((folder / "bundle.json").read_text(encoding="utf-8")))
    assert open_bundle(folder).manifest.outdated_files == ("image.cpu.onnx",)
    Segmenter.open(folder, backend="openvino", cache=False)
    assert "image.cpu.onnx was made from another float32 graph than tcl-shapes has now, and is not run" in caplog.text
    found = verify_bundle(folder)
    assert found.passed
    assert "another float32 graph" in found.not_for_here["image.cpu.onnx"]
    assert "image.cpu.onnx" not in {verdict.artefact for verdict in found.verdicts}
    result = build_engine(folder, config("fp32", prepare_only=True))
    assert "removed: image.cpu.onnx was made from another" in caplog.text
    assert [verdict.artefact for verdict in result.verdicts] == ["image.cpu.onnx"]  # it is made anew
    assert open_bundle(folder).manifest.outdated_files == ()
    assert set(processor_files(folder)) == {"fp32"}


def test_every_size_has_its_own(golden_bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(golden_bundle, tmp_path / "golden"))

    def files() -> list[list[str]]:
        return [[g.file for g in image.processor.values()] for image in open_bundle(folder).manifest.images]

    build_engine(folder, config("fp32", sizes=((96, 80),)))
    assert files() == [[], ["image-96x80.cpu.onnx"]]
    build_engine(folder, config("fp32"))
    assert files() == [["image.cpu.onnx"], ["image-96x80.cpu.onnx"]]
    build_engine(folder, config("fp32", sizes=((64, 64),), decoder="direct"))
    assert files() == [[], ["image-96x80.cpu.onnx"]]
    assert [one.size for one in read_cpu_records(open_bundle(folder))] == [(64, 64), (96, 80)]


def test_a_damaged_graph_is_not_built_on(built: Path) -> None:
    data = bytearray((built / "image.cpu.int8.onnx").read_bytes())
    data[1000] ^= 1
    (built / "image.cpu.int8.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"image\.cpu\.int8\.onnx is damaged"):
        build_engine(built, config("int8"))


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


def test_a_graph_prepared_elsewhere_is_judged_against_float32(built: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.rmtree(built / CPU_RECORDS_FOLDER)
    result = build_engine(built, config("int8"))
    assert "image.cpu.int8.onnx is taken as the bundle holds it (INT8: all)" in caplog.text
    (verdict,) = result.verdicts
    assert verdict.against == "the float32 graph"
    assert verdict.thresholds == MILD  # what it was built with
    assert [one.precision for one in read_cpu_records(open_bundle(built))] == ["int8"]


def test_a_new_graph_outdates_its_record(built: Path, images: str) -> None:
    build_engine(built, config("fp32"))
    other = config("int8", images, range_method="mse", prepare_only=True, thresholds=MILD)
    build_engine(built, other)
    assert [one.precision for one in read_cpu_records(open_bundle(built))] == ["fp32"]
    assert not (built / CPU_RECORDS_FOLDER / "image-int8-128x128.json").exists()


@pytest.mark.usefixtures("without_openvino")
@pytest.mark.parametrize(("precision", "decoder"), [("bf16", None), ("bf16", "direct"), ("int8", "direct")])
def test_without_openvino_what_can_be_is_prepared(
    precision: str, decoder: str | None, folder: Path, images: str
) -> None:
    before = contents(folder)
    result = build_engine(folder, config(precision, images, decoder=decoder, thresholds=MILD))
    assert result.missing == f"OpenVINO is not installed here ({install_command('openvino')})"
    assert list(result.records) == []
    assert (
        set(contents(folder)) - set(before)
        == {
            ("bf16", None): {"image.cpu.onnx"},
            ("bf16", "direct"): set(),
            ("int8", "direct"): {"image.int8.onnx"},
        }[precision, decoder]
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_float32_graph_may_be_prepared_for_processors(precision: str, folder: Path) -> None:
    result = build_engine(folder, config(precision, prepare_only=True))
    assert [graph.config.decoder for graph in result.graphs] == ["winograd4"]
    assert [verdict.artefact for verdict in result.verdicts] == ["image.cpu.onnx"]
    assert (result.missing, list(result.records)) == (None, [])
    assert processor_files(folder) == {"fp32": ("image.cpu.onnx", "winograd4")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16"}, "on the gpu there is fp32, fp16, int8, but not bf16"),
        ({"precision": "fp16", "device": "cpu"}, "on the cpu there is fp32, bf16, int8, but not fp16"),
        ({"precision": "bf16", "device": "cpu", "decoder": "direct", "prepare_only": True}, "nothing to prepare"),
        ({"precision": "fp32", "device": "cpu", "decoder": "winograd8"}, "unknown form of the decoder 'winograd8'"),
        ({"precision": "int8", "decoder": "winograd4"}, "for processors: add --device cpu.* none was timed"),
        ({"precision": "fp16", "decoder": "direct"}, "for processors: add --device cpu"),
        ({"precision": "bf16", "device": "cpu", "tier": "auto"}, "auto chooses layers for INT8"),
    ],
)
def test_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildConfig(**options)


def test_verify_judges_openvino(built: Path) -> None:
    build_engine(built, config("fp32", prepare_only=True))
    found = verify_bundle(built)
    assert found.passed, found.report()
    by_name = {verdict.artefact: verdict for verdict in found.verdicts}
    assert set(by_name) == {
        "image.cpu.onnx",
        "image.cpu.int8.onnx",
        "image-fp32-128x128 in OpenVINO",
        "image-int8-128x128 in OpenVINO",
    }
    assert by_name["image.cpu.int8.onnx"].thresholds == MILD
    assert by_name["image-int8-128x128 in OpenVINO"].thresholds == MILD
    for name in ("image.cpu.onnx", "image-fp32-128x128 in OpenVINO"):
        assert by_name[name].thresholds == THRESHOLDS["fp32"]
        assert by_name[name].figures.label_agreement > 0.999
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
