"""build-engine and verify as a whole: graphs, engines on the simulator, the gate, and bundles that stay whole."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tclkit.export import build as build_module
from tclkit.export import bundle_folder, graph_rules, precision
from tclkit.export import verify as verify_module
from tclkit.export.build import BuildConfig, build_engine
from tclkit.export.engine_builder import EngineOptions
from tclkit.export.gates import GateThresholds
from tclkit.export.layers import quantizable_layers
from tclkit.export.verify import verify_bundle
from tclkit.runtime.bundle import Bundle, open_bundle, write_manifest
from tclkit.runtime.errors import BundleError, ConfigError, ExportError, InputError, ParityError
from tclkit.runtime.files import models_folder
from tclkit.runtime.segmenter import Segmenter
from tclkit.tcl.world import WorldConfig, scenes

from .precision_models import decomposed_norms, sample_images, shipped_bundle, shipped_graph, with_weights

VERSIONS = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of nine unseen scenes: six to calibrate on, three held back."""
    folder = tmp_path_factory.mktemp("scenes")
    for i, scene in enumerate(scenes(WorldConfig(size=128, seed=99), count=9)):
        cv2.imwrite(str(folder / f"{i:02d}.png"), scene.image[..., ::-1])
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped bundle."""
    return bundle_with(tmp_path / "shapes", None)


def bundle_with(folder: Path, graph: onnx.ModelProto | None) -> Path:
    """The shipped bundle, with another float32 image graph if one is given."""
    shutil.copytree(shipped_bundle().folder, folder)
    if graph is not None:
        (folder / "image.onnx").write_bytes(graph.SerializeToString())
        write_manifest(folder, json.loads((folder / "bundle.json").read_text(encoding="utf-8")))
    return folder


def config(precision: str, images: str | None, **options: Any) -> BuildConfig:
    defaults = {"calibration_images": 6, "prepare_only": True}
    return BuildConfig(precision=precision, calibration=images, **{**defaults, **options})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_a_graph_is_prepared_judged_and_noted(kind: str, folder: Path, images: str) -> None:
    result = build_engine(folder, config(kind, images))
    assert result.missing is None
    assert result.engines == []
    (verdict,) = result.verdicts
    assert verdict.passed
    assert verdict.artefact == f"image.{kind}.onnx"
    bundle = open_bundle(folder)
    assert bundle.manifest.precisions == ("fp32", kind)
    note = bundle.manifest.checks[kind][f"image.{kind}.onnx"]
    assert note["label_agreement"] == verdict.figures.label_agreement
    assert note["made"]["images"]["content_hash"]
    assert note["made"]["images"]["source"]["name"] == Path(images).name
    assert str(Path(images).parent) not in (folder / "bundle.json").read_text(encoding="utf-8")
    graph_rules.check_graph(onnx.load(folder / f"image.{kind}.onnx"), where="the test")
    segmenter = Segmenter.open(folder, backend="onnxruntime", precision=kind, cache=False)
    exact = Segmenter.open(folder, backend="onnxruntime", precision="fp32", cache=False)
    prompts = ["red circle", "blue star", "green heart"]
    (image,) = sample_images(1)
    assert np.mean(segmenter(image, prompts).label_map == exact(image, prompts).label_map) > 0.98


def test_a_second_build_measures_nothing_anew(folder: Path, images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_engine(folder, config("int8", images))
    phases: list[str] = []
    again = build_engine(folder, config("int8", images), progress=lambda what, done, total: phases.append(what))
    assert [v.figures for v in again.verdicts] == [v.figures for v in first.verdicts]
    assert not any("activations" in phase for phase in phases)
    assert any("reference" in phase for phase in phases)


def test_tiers(folder: Path, images: str) -> None:
    shares = {}
    for tier in ("all", "decoder-only", "auto"):
        (graph,) = build_engine(folder, config("int8", images, tier=tier)).graphs
        shares[tier] = graph.int8_share
        assert bool(graph.sensitivities) == (tier == "auto")
        assert (list(graph.smoothed), graph.smoothed_share) == (graph.layers, 1)
        if tier == "decoder-only":
            assert all(name.startswith("grounder.decoder.") for name in graph.layers)
    assert shares["all"] == 1
    assert 0.8 < shares["decoder-only"] < 0.9  # the decoder is that much of this model's work
    assert shares["auto"] > shares["decoder-only"]


def test_int8_without_images_is_refused(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(InputError, match=r"INT8 needs images to calibrate on.*--calibration"):
        build_engine(folder, config("int8", None))
    assert contents(folder) == before


def test_fp16_without_images_looks_at_the_samples_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = build_engine(folder, config("fp16", None))
    assert result.verdicts[0].figures.images == 12
    assert "sample scenes of tclkit only" in caplog.text


def planted_overflow() -> onnx.ModelProto:
    """A norm's output 3e4 times larger and the next weight as much smaller: equal in float32, too large for half."""
    graph = shipped_graph()
    weights = {w.name: numpy_helper.to_array(w) for w in graph.graph.initializer}
    layer = next(one for one in quantizable_layers(graph) if one.name == "trunk.1.mlp.up")
    maker = next(node for node in graph.graph.node if layer.activation in node.output)
    changed = {name: weights[name] * 3e4 for name in maker.input[1:3]}
    return with_weights(graph, changed | {layer.weight: weights[layer.weight] / 3e4})


@pytest.mark.parametrize("fault", ["norms taken to pieces", "values too large for half", "ranges of one block wrong"])
def test_planted_faults_are_refused_with_their_figures(
    fault: str, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, graph = "fp16", None
    monkeypatch.setattr(precision, "wide_tensors", lambda *arguments: [])  # as if calibration had not seen it
    if fault == "norms taken to pieces":
        graph = decomposed_norms(shipped_graph(), gain=300.0)
        monkeypatch.setattr(graph_rules, "OPERATORS", graph_rules.OPERATORS | {"Sqrt"})
    elif fault == "values too large for half":
        graph = planted_overflow()
    else:
        kind, real = "int8", precision.activation_ranges
        block = {one.activation for one in quantizable_layers(shipped_graph()) if one.block == "trunk.1"}

        def wrong(*arguments: Any, **options: Any) -> dict[str, float]:
            return {name: r / 40 if name in block else r for name, r in real(*arguments, **options).items()}

        monkeypatch.setattr(precision, "activation_ranges", wrong)
    folder = bundle_with(tmp_path / "faulty", graph)
    before = contents(folder)
    with pytest.raises(ParityError, match=rf"image\.{kind}\.onnx differs too much .* \(needs 0\.\d+\)") as caught:
        build_engine(folder, config(kind, images))
    assert caught.value.values["figures"].images > 0
    assert contents(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faulty"]


def test_values_too_large_for_half_are_found_and_their_nodes_kept(images: str, tmp_path: Path) -> None:
    folder = bundle_with(tmp_path / "large", planted_overflow())
    result = build_engine(folder, config("fp16", images))
    assert any(one.largest > 65504 for one in result.graphs[0].wide)
    assert result.verdicts[0].passed
    kept = open_bundle(folder).manifest.checks["fp16"]["image.fp16.onnx"]["made"]["kept_in_float32"]
    assert [one["tensor"] for one in kept] == [one.tensor for one in result.graphs[0].wide]


def test_thresholds_can_be_raised(folder: Path, images: str) -> None:
    strict = GateThresholds(label_agreement=1, mask_iou=1, features_cosine=1)
    with pytest.raises(ParityError, match=r"label_agreement 0\.\d+ \(needs 1\)"):
        build_engine(folder, config("int8", images, thresholds=strict))


def test_the_shipped_bundle_is_copied_not_changed(images: str, caplog: pytest.LogCaptureFixture) -> None:
    before = contents(shipped_bundle().folder)
    result = build_engine("tcl-shapes", config("fp16", images))
    assert result.bundle == models_folder() / "tcl-shapes"
    assert "is in a copy of it" in caplog.text
    assert contents(shipped_bundle().folder) == before
    assert open_bundle("tcl-shapes").folder == result.bundle
    assert "fp16" in open_bundle("tcl-shapes").manifest.precisions


def test_a_folder_with_other_things_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(Exception, match="holds other files"):
        build_engine(folder, config("fp16", None), output=tmp_path / "mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision is 'fp8'; choose fp32, fp16, bf16, int8"),
        ({"precision": "fp16", "tier": "auto"}, "auto chooses layers for INT8"),
        ({"precision": "fp32", "prepare_only": True}, "nothing to prepare"),
        ({"precision": "int8", "smoothing": 1.5}, "smoothing is 1.5"),
    ],
)
def test_configurations_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildConfig(**options)


def test_a_size_the_bundle_does_not_have(folder: Path) -> None:
    with pytest.raises(InputError, match="has image graphs for 128x128, not for 448x448"):
        build_engine(folder, config("fp16", None, sizes=((448, 448),)))


def test_no_tensorrt_is_said_and_the_graphs_are_there(folder: Path) -> None:
    result = build_engine(folder, config("fp16", None, prepare_only=False))
    assert result.missing == "TensorRT is not installed here"
    assert "fp16" in open_bundle(folder).manifest.precisions
    assert build_engine(folder, config("fp32", None, prepare_only=False)).missing == result.missing


def test_a_kill_leaves_the_bundle_as_it_was(folder: Path, images: str) -> None:
    before = contents(folder)
    code = (
        "import os, sys\n"
        "from tclkit.export import build\n"
        "build._note = lambda *a: os.kill(os.getpid(), 9)\n"
        "build.build_engine(sys.argv[1], build.BuildConfig(precision='fp16', prepare_only=True))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env=os.environ, capture_output=True, check=False)
    assert done.returncode == -9
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir() if p.name.endswith(".tmp")]  # what was left
    build_engine(folder, config("fp16", None))
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # is cleared away
    assert open_bundle(folder).manifest.precisions == ("fp32", "fp16")


@pytest.mark.parametrize("version", VERSIONS)
def test_engines_are_built_judged_and_found(
    version: str, folder: Path, images: str, tensorrt_simulator: Callable[..., Any]
) -> None:
    simulator = tensorrt_simulator(version)
    result = build_engine(folder, config("fp16", images, prepare_only=False))
    assert result.missing is None
    assert [build.record.graph for build in result.engines] == ["image", "masks"]
    assert [verdict.passed for verdict in result.verdicts] == [True, True]
    assert result.verdicts[1].artefact == result.engines[0].file
    segmenter = Segmenter.open(folder, cache=False)
    assert (segmenter.backend.name, segmenter.backend.precision) == ("tensorrt", "fp16")
    (image,) = sample_images(1)
    for prompts in (["red circle"], ["blue star", "green ring", "white moon"]):
        assert segmenter(image, prompts).label_map.shape == (128, 128)
    segmenter.backend.close()
    assert simulator.leaks() == []


def test_int8_prepared_elsewhere_is_compiled_without_images(
    folder: Path, images: str, tensorrt_simulator: Callable[..., Any]
) -> None:
    build_engine(folder, config("int8", images))
    graph = (folder / "image.int8.onnx").read_bytes()
    tensorrt_simulator("10.3.0")
    result = build_engine(folder, config("int8", None, prepare_only=False))
    assert result.graphs == []
    assert (folder / "image.int8.onnx").read_bytes() == graph
    assert len(result.engines) == 2
    (verdict,) = result.verdicts
    assert verdict.passed
    assert verdict.against == "its own graph"
    assert verdict.figures.features_cosine > 0.999  # the engine gives what the graph gives, whatever that costs


def test_a_graph_of_another_tier_is_not_passed_off_as_the_one_asked_for(folder: Path, images: str) -> None:
    build_engine(folder, config("int8", images))
    with pytest.raises(
        InputError, match=r"image\.int8\.onnx of tcl-shapes quantises all, not decoder-only.*--calibration"
    ):
        build_engine(folder, config("int8", None, tier="decoder-only"))
    taken = build_engine(folder, config("int8", None))
    assert (taken.verdicts, taken.graphs) == ([], [])


def test_two_builds_of_one_bundle_at_once(folder: Path) -> None:
    with bundle_folder.new_folder(folder) as staged:
        bundle_folder.carry_over(open_bundle(folder), staged, replaces=folder)
        with pytest.raises(ExportError, match="is being written by another tclkit just now"):
            build_engine(folder, config("fp16", None))
    assert build_engine(folder, config("fp16", None)).verdicts[0].passed


def test_a_bundle_made_of_another_shares_no_file_with_it(folder: Path, tmp_path: Path) -> None:
    """Who changes a file in place changes one bundle, not two; in its own folder nothing is copied."""
    build_engine(folder, config("fp16", None), output=tmp_path / "new")
    assert (tmp_path / "new" / "image.onnx").read_bytes() == (folder / "image.onnx").read_bytes()
    assert not (tmp_path / "new" / "image.onnx").samefile(folder / "image.onnx")
    before = (folder / "image.onnx").stat().st_ino
    build_engine(folder, config("fp16", None))
    assert (folder / "image.onnx").stat().st_ino == before


def test_only_what_the_bundle_lists_goes_into_the_new_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("not of the bundle")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "draft.txt").write_text("nor this")
    build_engine(folder, config("fp16", None), output=tmp_path / "new")
    names = {path.name for path in (tmp_path / "new").rglob("*")}
    assert "image.fp16.onnx" in names
    assert not names & {"notes.txt", "draft.txt", "secret.txt"}
    assert "secret" not in (tmp_path / "new" / "bundle.json").read_text(encoding="utf-8")


def test_what_else_lies_in_the_folder_stays(
    folder: Path, tmp_path: Path, tensorrt_simulator: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    tensorrt_simulator("10.3.0")
    options = EngineOptions(version_compatible=True)
    build_engine(folder, config("fp32", None, prepare_only=False, engine=options))
    (models_folder().parent / "engines-built-here.txt").unlink()  # as if somebody else had built them
    (folder / "LICENSE.txt").write_text("weights: CC-BY")
    (folder / "notes" / "empty").mkdir(parents=True)
    (folder / "notes" / "day 1.md").write_text("rain")
    (folder / "engines" / "read me.txt").write_text("mine")
    (folder / "engines" / "damaged.json").write_text("{")
    (folder / "link").symlink_to("notes")
    (folder / ".bundle.json.12-0123abcd.tmp").write_text("half")
    before = contents(folder)
    build_engine(folder, config("fp16", None))
    after = contents(folder)
    assert set(before) - set(after) == {".bundle.json.12-0123abcd.tmp"}
    assert set(after) - set(before) == {"image.fp16.onnx"}
    assert {name for name in before if before[name] != after.get(name)} == {
        "bundle.json",
        ".bundle.json.12-0123abcd.tmp",
    }
    assert len([name for name in after if name.endswith(".engine")]) == 2
    assert (folder / "notes" / "empty").is_dir()
    assert (folder / "link").is_symlink()
    assert not {"LICENSE.txt", "notes/day 1.md", "link"} & set(open_bundle(folder).manifest.files)
    assert "removed" not in caplog.text


def test_a_file_whose_name_a_graph_takes_is_announced(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "image.fp16.onnx").write_text("mine")
    build_engine(folder, config("fp16", None))
    assert f"removed: image.fp16.onnx of {folder}, which bundle.json did not list" in caplog.text
    assert (folder / "image.fp16.onnx").stat().st_size > 1000


def test_an_older_bundle_that_is_replaced_leaves_its_other_files(folder: Path, tmp_path: Path) -> None:
    other = bundle_with(tmp_path / "other", None)
    (other / "LICENSE.txt").write_text("weights: CC-BY")
    build_engine(folder, config("fp16", None), output=other)
    assert (other / "LICENSE.txt").read_text() == "weights: CC-BY"
    assert "LICENSE.txt" not in open_bundle(other).manifest.files


def test_a_search_that_finds_nothing_is_an_error(folder: Path, images: str) -> None:
    impossible = GateThresholds(label_agreement=0, mask_iou=0, features_cosine=1)
    before = contents(folder)
    with pytest.raises(ExportError, match=r"no block can be INT8 .* --fp16"):
        build_engine(folder, config("int8", images, tier="auto", thresholds=impossible))
    assert contents(folder) == before


def test_a_new_graph_takes_the_place_of_its_engines_too(
    folder: Path, images: str, tensorrt_simulator: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    tensorrt_simulator("10.3.0")
    build_engine(folder, config("int8", images, prepare_only=False))
    engines = {path.name for path in (folder / "engines").glob("image-*.engine")}
    build_engine(folder, config("int8", images, tier="decoder-only"))
    assert len(engines) == 1
    assert f"removed: {next(iter(engines))} was built from another image graph" in caplog.text
    assert not list((folder / "engines").glob("image-*"))
    assert list((folder / "engines").glob("masks-*.engine"))


def test_a_timing_cache_of_the_device_is_kept(folder: Path, tensorrt_simulator: Callable[..., Any]) -> None:
    tensorrt_simulator("10.3.0", device_name="Orin")
    build_engine(folder, config("fp32", None, prepare_only=False))
    (cache,) = (models_folder().parent / "cache" / "timing").iterdir()
    assert cache.name == "Orin-sm8.7-trt10.3.0.cache"


@pytest.mark.usefixtures("without_openvino")
def test_verify_judges_graphs_and_engines_and_reports(
    folder: Path, images: str, tensorrt_simulator: Callable[..., Any]
) -> None:
    tensorrt_simulator("11.4.0.106")
    build_engine(folder, config("fp16", images, prepare_only=False))
    found = verify_bundle(folder)
    assert found.passed
    assert {verdict.artefact for verdict in found.verdicts} >= {"image.fp16.onnx"}
    assert len(found.verdicts) == 2
    assert list(found.not_for_here) == ["fp32 engine 128x128"]
    report = found.report()
    assert "tclkit verify: tcl-shapes: passed" in report
    assert json.loads(report.partition("```json")[2].partition("```")[0])["passed"]
    assert str(folder.parent) not in report


@pytest.mark.usefixtures("without_openvino")
def test_verify_sees_an_engine_that_gives_something_else(
    folder: Path, images: str, tensorrt_simulator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt_simulator("10.3.0")
    build_engine(folder, config("fp16", images, prepare_only=False))
    from tclkit.runtime.tensorrt_backend import TensorRTBackend

    real = TensorRTBackend.masks
    monkeypatch.setattr(TensorRTBackend, "masks", lambda self, *a: np.ascontiguousarray(real(self, *a)[:, ::-1]))
    found = verify_bundle(folder)
    assert not found.passed
    assert [verdict.passed for verdict in found.verdicts] == [True, False]
    assert "FAILED" in found.report()


def test_an_engine_below_the_gate_is_not_installed(
    folder: Path, images: str, tensorrt_simulator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt_simulator("10.3.0")
    from tclkit.runtime.tensorrt_backend import TensorRTBackend

    real = TensorRTBackend.masks
    monkeypatch.setattr(TensorRTBackend, "masks", lambda self, *a: np.ascontiguousarray(real(self, *a)[:, ::-1]))
    before = contents(folder)
    with pytest.raises(ParityError, match=r"image-fp16-.*\.engine differs too much"):
        build_engine(folder, config("fp16", images, prepare_only=False))
    assert contents(folder) == before


def test_verify_of_values_that_are_no_numbers(folder: Path, tensorrt_simulator: Callable[..., Any]) -> None:
    """An overflow in an engine: figures are not finite, the verdict is failed, and JSON holds null."""
    tensorrt_simulator("10.3.0")
    build_engine(folder, config("fp32", None, prepare_only=False))
    from tclkit.runtime.tensorrt_backend import DeviceFeatures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceFeatures, "grounded", property(lambda self: np.full((1, 128, 64, 64), np.nan, np.float32)))
        found = verify_bundle(folder)
    assert not found.passed
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["verdicts"][0]["figures"]["features_cosine"] is None
    assert "FAILED" in found.report()


@pytest.mark.usefixtures("without_openvino")
def test_verify_with_nothing_to_judge_does_not_say_passed(folder: Path) -> None:
    assert "nothing to judge here" in verify_bundle(folder).report()


@pytest.mark.parametrize("kept", [{"label_agreement": 2, "mask_iou": 0, "features_cosine": 0}, {"surprise": 1}])
def test_verify_of_thresholds_that_are_none(folder: Path, kept: dict[str, float]) -> None:
    build_engine(folder, config("fp16", None))
    raw = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    raw["checks"]["fp16"]["image.fp16.onnx"]["thresholds"] = kept
    write_manifest(folder, raw)
    with pytest.raises(BundleError, match=r"no usable thresholds for image\.fp16\.onnx"):
        verify_bundle(folder)


def test_verify_of_a_damaged_bundle(folder: Path) -> None:
    data = bytearray((folder / "image.onnx").read_bytes())
    data[1000] ^= 1
    (folder / "image.onnx").write_bytes(data)
    with pytest.raises(BundleError, match="is damaged"):
        verify_bundle(folder)


def test_options_of_the_builder_reach_the_side_car(folder: Path, tensorrt_simulator: Callable[..., Any]) -> None:
    tensorrt_simulator("10.13.3.9")
    options = EngineOptions(max_batch=2, max_prompts=32, version_compatible=True)
    result = build_engine(folder, config("fp32", None, prepare_only=False, engine=options))
    for build in result.engines:
        assert (build.record.max_batch, build.record.max_prompts) == (2, 32)
        assert build.record.flags == ("version-compatible",)


def test_the_gate_asks_no_more_prompts_than_the_engine_takes(
    folder: Path, tensorrt_simulator: Callable[..., Any]
) -> None:
    tensorrt_simulator("10.3.0")
    few = EngineOptions(max_prompts=4)
    result = build_engine(folder, config("fp32", None, prepare_only=False, engine=few))
    assert result.verdicts[0].figures.prompts == 4
    with pytest.raises(InputError, match=r"5 prompts to judge with, but the engines take 4.*--max-prompts"):
        build_engine(folder, config("fp32", None, prepare_only=False, engine=few, prompts=tuple("abcde")))


@pytest.mark.usefixtures("without_openvino")
def test_engines_of_another_machine_do_not_limit_verify(
    folder: Path, tensorrt_simulator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt_simulator("10.3.0")
    build_engine(folder, config("fp32", None, prepare_only=False, engine=EngineOptions(max_prompts=1)))
    asked: list[int | None] = []
    real = verify_module.embedded_prompts

    def embedded(bundle: Bundle, prompts: Any, *, most: int | None) -> Any:
        asked.append(most)
        return real(bundle, prompts, most=most)

    monkeypatch.setattr(verify_module, "embedded_prompts", embedded)
    verify_bundle(folder)
    tensorrt_simulator("10.13.3.9")  # another TensorRT
    verify_bundle(folder, prompts=["red circle", "blue star"])
    monkeypatch.setattr(verify_module, "missing_for_engines", lambda: "TensorRT is not installed here")
    verify_bundle(folder, prompts=["red circle", "blue star"])
    assert asked == [1, None, None]


def test_building_needs_no_torch() -> None:
    code = (
        "import sys, tclkit.export.build, tclkit.export.verify\n"
        "print([name for name in ('torch', 'open_clip', 'tensorrt', 'polygraphy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_config_says_what_it_is() -> None:
    fields = {field.name for field in dataclasses.fields(BuildConfig)}
    described = build_module.BuildConfig.__doc__ or ""
    assert all(name in described for name in fields)
