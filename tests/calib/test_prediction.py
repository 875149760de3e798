"""One image through a Segmenter: the benchmark's own prompts, and counts that stand for its label map."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

from tclkit.calib.benchmarks import Benchmark, benchmark_named
from tclkit.calib.datasets import Example, FolderDataset
from tclkit.calib.metrics import count_pixels
from tclkit.calib.prediction import (
    Predictor,
    Scoring,
    count_example,
    counts_from_cells,
    prompts_for,
    scoring_for,
)
from tclkit.runtime import Segmenter, Tokenizer, open_bundle
from tclkit.runtime.embedding import ensemble
from tclkit.runtime.errors import InputError

PLAIN = Scoring(threshold=0.5, kp_w=0.0, pamr=False, fit="whole")


@pytest.fixture
def segmenter(class_bundle_folder: Path) -> Segmenter:
    return Segmenter.open(class_bundle_folder, threads=1, cache=False)


def _without_padding(token_ids_ML: NDArray[np.int64]) -> list[list[int]]:
    return [np.trim_zeros(row, "b").tolist() for row in token_ids_ML]


def test_names_go_into_the_benchmarks_templates_to_the_letter(segmenter: Segmenter) -> None:
    """Not into the bundle's, and no rule for phrases: "a dog" would lose the article of "a photo of a {}."."""
    benchmark = replace(benchmark_named("voc"), names=("car ", "a person", "two cars"))
    seen: list[NDArray[np.int64]] = []
    run = segmenter.backend.encode_text

    def noting(token_ids_ML: NDArray[np.int64]) -> NDArray[np.float32]:
        seen.append(token_ids_ML)
        return run(token_ids_ML)

    segmenter.backend.encode_text = noting  # type: ignore[method-assign]
    prompts = prompts_for(segmenter, benchmark)
    texts = [template.replace("{}", name) for name in benchmark.names for template in benchmark.templates]
    expected = Tokenizer.from_bundle(segmenter.bundle).encode(texts)
    found = [row for run_ML in seen for row in _without_padding(run_ML)]
    assert sorted(found) == sorted(_without_padding(expected))  # they run by length
    assert prompts.names == benchmark.names
    np.testing.assert_allclose(prompts.embeddings[1], ensemble(run(expected[9:18])), atol=1e-6)


def test_without_templates_of_its_own_it_takes_the_models(segmenter: Segmenter) -> None:
    benchmark = replace(benchmark_named("voc"), templates=(), names=("car", "sky"))
    expected = segmenter.prompts(["car", "sky"])
    np.testing.assert_array_equal(prompts_for(segmenter, benchmark).embeddings, expected.embeddings)


def dataset(benchmark: Benchmark, views: tuple[str, ...]) -> FolderDataset:
    made = FolderDataset(benchmark=benchmark, samples=(), fit="whole")
    object.__setattr__(made, "views", views)
    return made


@pytest.fixture
def example(mini: ModuleType) -> Example:
    image, index = mini.scene((64, 64), ("car", "sky"), 0)
    prompts = {"all": None, "some": (1,), "none": ()}
    return Example(image_hwc=image, truth=(index + 1).astype(np.uint8), prompts=prompts)


def test_views_ask_for_all_some_or_no_prompts(segmenter: Segmenter, example: Example) -> None:
    benchmark = replace(benchmark_named("voc"), templates=(), names=("car", "sky"))
    predictor = Predictor(segmenter, dataset(benchmark, ("all", "some", "none")), PLAIN)
    found = predictor.predict(example)
    inputs = segmenter.stats.windows
    assert inputs == 1  # the image graph ran once for all views
    everything, some, none = (found[view][0] for view in ("all", "some", "none"))
    assert (everything == example.truth).mean() > 0.98
    np.testing.assert_array_equal(some == 2, everything == 2)  # sky keeps its class number
    assert set(np.unique(some)) == {0, 2}
    assert not none.any()
    alone = Predictor(segmenter, dataset(benchmark, ("some",)), PLAIN).predict(example)
    np.testing.assert_array_equal(alone["some"][0], some)
    assert all(elapsed_ms > 0 for _, elapsed_ms in found.values())


def test_without_a_background_the_first_class_is_0(segmenter: Segmenter, example: Example) -> None:
    benchmark = replace(benchmark_named("voc20"), templates=(), names=("car", "sky"))
    predictor = Predictor(segmenter, dataset(benchmark, ("all",)), replace(PLAIN, threshold=None))
    labels = predictor.predict(example)["all"][0]
    known = example.truth > 0
    assert (labels[known] == example.truth[known] - 1).mean() > 0.98
    assert set(np.unique(labels)) == {0, 1}


def test_counts_survive_the_journal(example: Example) -> None:
    benchmark = replace(benchmark_named("voc"), names=("car", "sky"))
    labels = np.random.default_rng(0).integers(0, 3, example.truth.shape)
    other = np.where(labels == 2, 1, labels)
    counted = count_example({"fp32": {"all": (labels, 1.23456)}, "fp16": {"all": (other, 2.0)}}, example, benchmark)
    view = counted["fp32"]["all"]
    np.testing.assert_array_equal(counts_from_cells(view["cells"], 3), count_pixels(labels, example.truth, 3))
    assert (view["ms"], view["same"], view["pixels"]) == (1.235, 64 * 64, 64 * 64)
    assert counted["fp16"]["all"]["same"] == (labels != 2).sum()


@pytest.mark.parametrize(
    ("key", "pamr", "given", "has_kp", "expected"),
    [
        ("voc", False, (None, None), True, (0.5, 0.3)),
        ("voc", True, (None, None), True, (0.4, 0.3)),
        ("voc", True, (0.0, 0.0), True, (0.0, 0.0)),
        ("voc", False, (None, None), False, (0.5, 0.0)),
        ("ade20k", True, (None, 1.0), True, (None, 1.0)),
    ],
)
def test_scoring_is_what_is_given_or_what_the_protocol_has(
    tiny_bundle_folder: Path,
    key: str,
    pamr: bool,
    given: tuple[float | None, float | None],
    has_kp: bool,
    expected: tuple[float | None, float],
) -> None:
    manifest = open_bundle(tiny_bundle_folder).manifest
    manifest = manifest if has_kp else replace(manifest, kp_w=0.0)
    found = scoring_for(benchmark_named(key), manifest, fit="slide", pamr=pamr, threshold=given[0], kp_w=given[1])
    assert (found.threshold, found.kp_w, found.pamr, found.fit) == (*expected, pamr, "slide")


def test_the_models_thresholds_where_a_benchmark_has_none(tiny_bundle_folder: Path) -> None:
    manifest = open_bundle(tiny_bundle_folder).manifest
    benchmark = replace(benchmark_named("voc"), threshold=None, threshold_pamr=None, kp_w=None)
    for pamr, threshold in ((False, 0.5), (True, 0.4)):
        found = scoring_for(benchmark, manifest, fit="whole", pamr=pamr, threshold=None, kp_w=None)
        assert (found.threshold, found.kp_w) == (threshold, manifest.kp_w)
    with pytest.raises(InputError, match="has no background"):
        scoring_for(benchmark_named("ade20k"), manifest, fit="slide", pamr=False, threshold=0.5, kp_w=None)


def test_contrast_prompts_take_pixels_for_the_background(segmenter: Segmenter, example: Example) -> None:
    benchmark = replace(benchmark_named("voc"), templates=(), names=("car",))
    scoring = scoring_for(
        benchmark,
        segmenter.bundle.manifest,
        fit="whole",
        pamr=False,
        threshold=0.0,
        kp_w=0.0,
        contrast=("sky", "tree"),
    )
    labels = Predictor(segmenter, dataset(benchmark, ("all",)), scoring).predict(example)["all"][0]
    assert (labels[example.truth == 1] == 1).mean() > 0.98
    assert (labels[example.truth == 2] == 0).mean() > 0.98
    alone = Predictor(segmenter, dataset(benchmark, ("all",)), replace(scoring, contrast=())).predict(example)["all"][0]
    assert (alone[example.truth == 2] == 1).all()  # nothing else to give them to
    with pytest.raises(InputError, match="has no background, which contrast prompts would stand for"):
        scoring_for(
            benchmark_named("voc20"),
            segmenter.bundle.manifest,
            fit="slide",
            pamr=False,
            threshold=None,
            kp_w=None,
            contrast=("sky",),
        )
