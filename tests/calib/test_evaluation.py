"""Evaluation: right figures, whatever interrupts it and however many processes share it."""

import functools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tclkit.calib.evaluation as module
from tclkit.calib.benchmarks import published_benchmarks
from tclkit.calib.datasets import FolderDataset, open_benchmark, open_own_data
from tclkit.calib.evaluation import Contender, Evaluation, EvaluationSettings, Share, evaluate
from tclkit.calib.journal import journal_files
from tclkit.calib.prediction import Predictor
from tclkit.calib.prepare import prepare_labels
from tclkit.runtime.backends import Backend, choose_backend
from tclkit.runtime.bundle import Bundle
from tclkit.runtime.errors import BackendError, InputError, TclkitError


@pytest.fixture
def data(mini: ModuleType, tmp_path: Path) -> Path:
    mini.write_all(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def settings(class_bundle_folder: Path) -> EvaluationSettings:
    return EvaluationSettings(model=str(class_bundle_folder), threads=1, kp_w=0.0)


@pytest.fixture
def many(mini: ModuleType, tmp_path: Path) -> FolderDataset:
    """Twelve pictures of a user's own, with mistakes in the truth so that figures differ from 100 %."""
    folder = tmp_path / "own"
    mini.write_own(folder)
    rng = np.random.default_rng(0)
    for number in range(12):
        image, index = mini.scene(mini.SIZES[number % 3], ("car", "sky"), number)
        index[rng.random(index.shape) < 0.03 * number] = 1
        Image.fromarray(image).save(folder / f"images/shot-{number}.png")
        Image.fromarray((index + 1).astype(np.uint8)).save(folder / f"labels/shot-{number}.png")
    return open_own_data(folder)


def figures(evaluation: Evaluation) -> Any:
    """All that must not depend on how it was computed: everything but the times."""
    document = evaluation.to_dict()
    for views in document["results"].values():
        for view in views.values():
            del view["latency_ms"]
    images = {
        (precision, view): result.images
        for precision, views in evaluation.results.items()
        for view, result in views.items()
    }
    return json.loads(json.dumps(document)), images


@pytest.mark.parametrize("key", sorted(published_benchmarks()))
def test_classes_of_every_benchmark_are_found(
    data: Path, settings: EvaluationSettings, mini: ModuleType, tmp_path: Path, key: str
) -> None:
    prepare_labels(key, data)
    dataset = open_benchmark(key, data)
    found = evaluate(dataset, settings, folder=tmp_path / "out")
    result = found.results["fp32"]["all"]
    assert (found.counted, found.left_out, found.pending, found.unknown_pixels) == (len(dataset), (), 0, 0)
    known = [
        iou
        for name, iou in zip(found.classes, result.scores.iou, strict=True)
        if name in mini.CLASS_COLOURS and not np.isnan(iou)
    ]
    assert len(known) >= 3
    assert min(known) > 0.6  # windows and JPEG smear the blocks' borders; another class would give 0
    assert found.published == dataset.benchmark.published_miou
    assert found.notes[0].startswith("windows are not 448x448")
    assert result.latency_ms > 0
    assert result.agreement == 1


def test_the_protocols_threshold_and_share_are_used(data: Path, class_bundle_folder: Path, tmp_path: Path) -> None:
    settings = EvaluationSettings(model=str(class_bundle_folder), threads=1)
    found = evaluate(open_benchmark("voc", data), settings, folder=tmp_path)
    assert (found.scoring.threshold, found.scoring.kp_w, found.scoring.fit) == (0.5, 0.3, "slide")
    assert len(found.notes) == 1
    found = evaluate(open_benchmark("voc", data), replace(settings, pamr=True), folder=tmp_path)
    assert (found.scoring.threshold, found.published) == (0.4, 55.0)
    assert evaluate(open_benchmark("voc20", data), settings, folder=tmp_path).scoring.threshold is None
    given = evaluate(open_benchmark("voc", data), replace(settings, threshold=0.7, kp_w=0.0, limit=2), folder=tmp_path)
    assert given.notes[1:] == (
        "background threshold 0.7, the protocol has 0.5",
        "KP share 0, the protocol has 0.3",
        "the first 2 of 3 images",
    )
    with pytest.raises(InputError, match="has no background, so the threshold"):
        evaluate(open_benchmark("voc20", data), replace(settings, threshold=0.7), folder=tmp_path)


def test_own_data_take_the_models_values(many: FolderDataset, class_bundle_folder: Path, tmp_path: Path) -> None:
    found = evaluate(many, EvaluationSettings(model=str(class_bundle_folder), threads=1), folder=tmp_path)
    assert (found.scoring.threshold, found.scoring.kp_w) == (0.5, 0.3)
    assert (found.published, found.notes) == (None, ())
    assert found.results["fp32"]["all"].scores.iou.shape == (3,)


def test_broken_files_are_named_counted_and_left_out(data: Path, settings: EvaluationSettings, tmp_path: Path) -> None:
    voc = data / "VOCdevkit/VOC2012"
    whole = evaluate(open_benchmark("voc", data), settings, folder=tmp_path / "whole")
    image, label = voc / "JPEGImages/2007_000033.jpg", voc / "SegmentationClass/2007_000061.png"
    good_image, good_label = image.read_bytes(), label.read_bytes()
    image.write_bytes(good_image[:-30])
    Image.new("RGB", (65, 130)).save(label)
    found = evaluate(open_benchmark("voc", data), settings, folder=tmp_path / "out")
    assert (found.counted, found.total, found.pending) == (1, 3, 0)
    assert [name for name, _ in found.left_out] == ["2007_000033", "2007_000061"]
    assert "truncated" in found.left_out[0][1]
    assert "holds RGB pixels" in found.left_out[1][1]
    image.write_bytes(good_image)
    label.write_bytes(good_label)
    repaired = evaluate(open_benchmark("voc", data), settings, folder=tmp_path / "out")
    assert figures(repaired) == figures(whole)


def test_an_image_that_no_window_can_cover_is_left_out(
    mini: ModuleType, settings: EvaluationSettings, tmp_path: Path
) -> None:
    mini.write_own(tmp_path / "own")
    Image.new("RGB", (4000, 10)).save(tmp_path / "own/images/shot-1.png")
    Image.new("L", (4000, 10)).save(tmp_path / "own/labels/shot-1.png")
    found = evaluate(open_own_data(tmp_path / "own"), settings, folder=tmp_path / "out")
    ((name, reason),) = found.left_out
    assert name == "shot-1"
    assert "thinner than one patch" in reason


def test_a_run_that_ends_in_the_middle_goes_on_to_the_same_figures(
    many: FolderDataset, settings: EvaluationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(many, settings, folder=tmp_path / "whole")
    assert 20 < whole.results["fp32"]["all"].scores.miou_percent < 99
    original, asked = Predictor.predict, []

    def counting(self: Predictor, example: Any) -> Any:
        asked.append(example)
        if len(asked) == 6:  # the first asks twice: once to warm up
            raise KeyboardInterrupt
        return original(self, example)

    monkeypatch.setattr(Predictor, "predict", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(many, settings, folder=tmp_path / "out")
    seen: list[tuple[int, int]] = []
    resumed = evaluate(many, settings, folder=tmp_path / "out", progress=lambda *at: seen.append(at))
    assert figures(resumed) == figures(whole)
    assert seen == [(done, 8) for done in range(9)]  # four were kept
    again = evaluate(many, settings, folder=tmp_path / "out", progress=lambda *at: seen.append(at))
    assert seen[-1] == (0, 0)
    assert figures(again) == figures(whole)


@pytest.mark.parametrize("part", ["labels", "images"])
def test_changed_data_are_counted_anew(
    many: FolderDataset, settings: EvaluationSettings, tmp_path: Path, part: str
) -> None:
    """The same names with repaired label maps, or other images, are another data set."""
    first = evaluate(many, settings, folder=tmp_path / "out")
    assert (first.from_journal, evaluate(many, settings, folder=tmp_path / "out").from_journal) == (0, 12)
    path = tmp_path / f"own/{part}/shot-11.png"
    with Image.open(path) as image:
        changed = Image.fromarray(np.roll(np.asarray(image), 24, axis=1))
    changed.save(path, compress_level=0)
    found = evaluate(many, settings, folder=tmp_path / "out")
    assert found.from_journal == 0
    assert figures(found) == figures(evaluate(many, settings, folder=tmp_path / "fresh"))
    assert figures(found) != figures(first)


def test_another_version_counts_anew(
    many: FolderDataset, settings: EvaluationSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(settings, limit=2)
    evaluate(many, settings, folder=tmp_path)
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "9.9")
    assert evaluate(many, settings, folder=tmp_path).from_journal == 0


def test_a_limit_can_be_raised(many: FolderDataset, settings: EvaluationSettings, tmp_path: Path) -> None:
    few = evaluate(many, replace(settings, limit=5), folder=tmp_path / "out")
    assert (few.total, few.counted) == (5, 5)
    assert [index for index, _ in few.results["fp32"]["all"].images] == list(range(5))
    seen: list[tuple[int, int]] = []
    evaluate(many, settings, folder=tmp_path / "out", progress=lambda *at: seen.append(at))
    assert seen[0] == (0, 7)
    again = evaluate(many, replace(settings, limit=5), folder=tmp_path / "out")
    assert figures(again) == figures(few)


def test_two_workers_and_two_ranks_give_the_figures_of_one(
    many: FolderDataset, settings: EvaluationSettings, tmp_path: Path
) -> None:
    one = evaluate(many, settings, folder=tmp_path / "one")
    seen: list[tuple[int, int]] = []
    two = evaluate(
        many, settings, folder=tmp_path / "two", share=Share(workers=2), progress=lambda *at: seen.append(at)
    )
    assert figures(two) == figures(one)
    assert seen[0] == (0, 12)
    assert len(list((tmp_path / "two/journal").iterdir())) == 2
    first = evaluate(many, settings, folder=tmp_path / "ranks", share=Share(rank=0, world_size=2))
    assert (first.counted, first.pending) == (6, 6)
    last = evaluate(many, settings, folder=tmp_path / "ranks", share=Share(rank=1, world_size=2))
    assert last.pending == 0
    assert figures(last) == figures(one)


def test_journals_of_two_machines_can_be_copied_together(
    many: FolderDataset, settings: EvaluationSettings, tmp_path: Path
) -> None:
    one = evaluate(many, settings, folder=tmp_path / "one")
    for rank in range(2):
        evaluate(many, settings, folder=tmp_path / f"machine-{rank}", share=Share(rank=rank, world_size=2))
    shutil.copytree(tmp_path / "machine-1/journal", tmp_path / "machine-0/journal", dirs_exist_ok=True)
    assert figures(evaluate(many, settings, folder=tmp_path / "machine-0")) == figures(one)


def test_other_settings_are_another_run(many: FolderDataset, settings: EvaluationSettings, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"pamr": True}, {"threshold": 0.6}, {"kp_w": 0.3}, {"flip": True}]
    for count, change in enumerate(changes, start=1):
        evaluate(many, replace(settings, limit=1, **change), folder=tmp_path)
        assert len(list((tmp_path / "journal").iterdir())) == count
    evaluate(many, replace(settings, limit=1, windows_per_run=3, threads=2), folder=tmp_path)
    assert len(list((tmp_path / "journal").iterdir())) == len(changes)


@pytest.fixture
def with_half(class_bundle_folder: Path, tiny: ModuleType, tmp_path: Path) -> Path:
    """The bundle with an image graph under fp16 that sees blue where there is none: half of all values are rounded."""
    import onnx
    from onnx import numpy_helper

    folder = Path(shutil.copytree(class_bundle_folder, tmp_path / "half"))
    graph = onnx.load(folder / "image.onnx")
    for constant in graph.graph.initializer:
        if constant.name == "weight":
            values = numpy_helper.to_array(constant).astype(np.float16).astype(np.float32)
            values[1] *= np.float32(0.5)  # the second colour is lost
            constant.CopyFrom(numpy_helper.from_array(values, "weight"))
    onnx.save(graph, folder / "image.fp16.onnx")
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["images"][0]["files"]["fp16"] = "image.fp16.onnx"
    tiny.write_manifest(folder, manifest)
    return folder


def test_precisions_side_by_side(
    many: FolderDataset, settings: EvaluationSettings, with_half: Path, tmp_path: Path
) -> None:
    both = evaluate(
        many, replace(settings, model=str(with_half), precisions=("fp32", "fp16")), folder=tmp_path / "both"
    )
    full, half = (both.results[precision]["all"] for precision in ("fp32", "fp16"))
    assert full.agreement == 1
    assert 0.1 < half.agreement < 0.99
    assert half.scores.miou < full.scores.miou
    assert half.latency_ms > 0
    alone = evaluate(many, settings, folder=tmp_path / "alone").results["fp32"]["all"]
    np.testing.assert_array_equal(alone.counts, full.counts)
    with pytest.raises(BackendError, match="no image graph in int8"):
        evaluate(many, replace(settings, precisions=("fp32", "int8")), folder=tmp_path)


# A contender's opener. Worker processes unpickle it, and they cannot import test files: it is made of tclkit's own.
HALF_BACKEND = functools.partial(choose_backend, "onnxruntime", precision="fp16")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_contender_beside_the_graphs(
    many: FolderDataset, settings: EvaluationSettings, with_half: Path, tmp_path: Path, workers: int
) -> None:
    """A row of its own, in the same run: here the half graph by another way."""
    contender = Contender(name="other", identity="1", open=HALF_BACKEND)
    settings = replace(settings, model=str(with_half), precisions=("fp32", "fp16"), contenders=(contender,))
    found = evaluate(many, settings, folder=tmp_path, share=Share(workers=workers))
    assert list(found.results) == ["fp32", "fp16", "other"]
    half, other = (found.results[name]["all"] for name in ("fp16", "other"))
    np.testing.assert_array_equal(other.counts, half.counts)
    assert other.agreement == half.agreement
    assert other.latency_ms > 0
    journals = len(list((tmp_path / "journal").iterdir()))
    evaluate(many, replace(settings, limit=1), folder=tmp_path)
    assert len(list((tmp_path / "journal").iterdir())) == journals == workers
    changed = replace(settings, limit=1, contenders=(replace(contender, identity="2"),))
    evaluate(many, changed, folder=tmp_path)  # another identity is another run
    assert len(list((tmp_path / "journal").iterdir())) == journals + 1


def test_a_contenders_texts_are_its_own(many: FolderDataset, settings: EvaluationSettings, tmp_path: Path) -> None:
    """It neither reads embeddings that the bundle's text graph made from the cache, nor writes there."""
    asked: list[int] = []

    def opened(bundle: Bundle, threads: int | None) -> Backend:
        backend = choose_backend("onnxruntime", bundle, threads=threads)
        encode = backend.encode_text

        def noting(token_ids_ML: np.ndarray) -> np.ndarray:
            asked.append(len(token_ids_ML))
            return encode(token_ids_ML)

        backend.encode_text = noting  # type: ignore[method-assign]
        return backend

    evaluate(many, replace(settings, limit=1), folder=tmp_path / "first")  # fills the cache
    contender = Contender(name="other", identity="", open=opened)
    evaluate(many, replace(settings, limit=1, contenders=(contender,)), folder=tmp_path / "second")
    assert sum(asked) > 0


@pytest.mark.parametrize("names", [["fp32"], ["a", "a"]])
def test_contenders_have_names_of_their_own(names: list[str]) -> None:
    contenders = tuple(Contender(name=name, identity="", open=HALF_BACKEND) for name in names)
    with pytest.raises(InputError, match="contenders should have different names, and none of a precision"):
        EvaluationSettings(model="m", contenders=contenders)


def test_who_begins_changes_from_image_to_image() -> None:
    class Noting:
        def __init__(self, name: str) -> None:
            self.name = name

        def predict(self, example: object) -> dict[str, object]:
            order.append(self.name)
            return {"all": self.name}

    order: list[str] = []
    predictors: Any = {name: Noting(name) for name in ("fp32", "fp16", "int8")}
    for turn in range(3):
        assert list(module._predicted(predictors, None, turn)) == ["fp32", "fp16", "int8"]  # type: ignore[arg-type]
    assert order == ["fp32", "fp16", "int8", "fp16", "int8", "fp32", "int8", "fp32", "fp16"]


def test_a_worker_that_fails_says_why(
    many: FolderDataset, settings: EvaluationSettings, class_bundle_folder: Path, tmp_path: Path
) -> None:
    scoring = evaluate(many, replace(settings, limit=1), folder=tmp_path).scoring
    job = module._Job(
        dataset=many,
        settings=replace(settings, model=str(tmp_path / "no-model")),
        scoring=scoring,
        folder=tmp_path,
        key="ab" * 32,
        indices=(0, 1),
        loaders=1,
    )
    with pytest.raises(TclkitError, match=r"worker 0 of 1: model .* is not installed"):
        module._run_workers(job, 1, lambda done, total: None)
    assert journal_files(tmp_path, "ab" * 32) == []


def test_a_worker_that_is_killed_is_told() -> None:
    with pytest.raises(TclkitError, match=r"worker 1 of 2 ended with signal 9; what was counted is kept"):
        module._check_end("worker 1 of 2", -9, None)
    with pytest.raises(TclkitError, match="ended with exit code 3"):
        module._check_end("worker 1 of 2", 3, None)
    module._check_end("worker 1 of 2", 0, None)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"precisions": ()}, "one or more different"),
        ({"precisions": ("fp32", "fp32")}, "one or more different"),
        ({"limit": 0}, "limit should be 1 or more"),
        ({"windows_per_run": 0}, "windows_per_run should be 1 or more"),
    ],
)
def test_bad_settings(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        EvaluationSettings(model="m", **change)


@pytest.mark.parametrize(
    "options", [{"rank": 2, "world_size": 2}, {"rank": -1}, {"workers": 0}, {"loaders": 0}], ids=str
)
def test_bad_shares(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"ranks of \d are 0 to \d|should be 1 or more"):
        Share(**options)


def test_no_image_can_be_used(many: FolderDataset, settings: EvaluationSettings, tmp_path: Path) -> None:
    for sample in many.samples:
        os.truncate(sample.image, 0)
    found = evaluate(many, settings, folder=tmp_path)
    assert (found.counted, len(found.left_out)) == (0, 12)
    document = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(document)["results"]["fp32"]["all"]["miou_percent"] is None
