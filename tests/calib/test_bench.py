"""Counted, not timed: what is run how often, in which order, and what becomes of it."""

import collections
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tclkit.calib import BenchResult, BenchSettings, Contender, bench, run_bench
from tclkit.calib.bench import draw_rounds
from tclkit.calib.bench_results import GRAPHS, STAGES
from tclkit.runtime.backends import Backend, choose_backend
from tclkit.runtime.bundle import Bundle
from tclkit.runtime.errors import BackendError, BundleError, InputError

ROUNDS = 4
CALLS: list[tuple[str, int]] = []  # (who, images) of every run of an image graph


class Counted:
    """ONNX Runtime whose runs of the image graph are noted; it fails at the `fails_at`-th."""

    def __init__(self, bundle: Bundle, name: str, fails_at: int | None) -> None:
        self._inner: Any = choose_backend("onnxruntime", bundle, precision="fp32", threads=1)
        self._name, self._fails_at = name, fails_at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def image_features(self, images_BHWC: np.ndarray) -> Any:
        CALLS.append((self._name, len(images_BHWC)))
        if self._fails_at is not None and CALLS.count((self._name, len(images_BHWC))) >= self._fails_at:
            raise BackendError(f"{self._name} broke down")
        return self._inner.image_features(images_BHWC)


def counted(name: str, fails_at: int | None = None) -> Contender:
    def opener(bundle: Bundle, threads: int | None = None) -> Backend:
        return Counted(bundle, name, fails_at)

    return Contender(name=name, identity=name, open=opener)


def settings(folder: Path, **changes: Any) -> BenchSettings:
    fields: dict[str, Any] = {
        "model": str(folder),
        "backends": ("onnxruntime",),
        "precisions": ("fp32",),
        "prompts": (2,),
        "rounds": ROUNDS,
        "warm_up": 1,
        "threads": 1,
        "memory": False,
        "gemm_side": 0,
        "image": folder.parent / "small.png",
    }
    return BenchSettings(**(fields | changes))


@pytest.fixture(autouse=True)
def _no_calls() -> Iterator[None]:
    CALLS.clear()
    yield
    CALLS.clear()


@pytest.fixture(scope="module")
def folder(write_tiny_bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sizes, and words of its own, so that every prompt is one the model knows; beside it a small picture."""
    path = tmp_path_factory.mktemp("models") / "two-sizes"
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(path.parent / "small.png")
    words = ("red", "green", "blue", "yellow", "circle", "square")
    return Path(write_tiny_bundle(path, more_sizes=[(32, 64)], vocabulary=words))


@pytest.fixture(scope="module")
def swept(folder: Path) -> BenchResult:
    return run_bench(settings(folder, prompts=(2, 1, 30), batches=(1, 3), gemm_side=32, backends=("onnxruntime",)))


def works(result: BenchResult) -> list[tuple[int, int, int, int]]:
    return [(row.height, row.width, row.batch, row.prompts) for row in result.rows]


def test_one_thing_is_varied_at_a_time(swept: BenchResult) -> None:
    base = (64, 64, 1, 2)
    assert works(swept) == [base, (64, 64, 1, 1), (64, 64, 1, 30), (64, 64, 3, 2), (32, 64, 1, 2)]


def test_every_row_is_whole(swept: BenchResult) -> None:
    for row in swept.rows:
        assert tuple(row.stages) == (STAGES if row.batch == 1 else GRAPHS)
        for spread in (*row.stages.values(), row.total, row.graphs):
            assert len(spread.samples_ms) == ROUNDS
            assert all(sample > 0 for sample in spread.samples_ms)
        assert (row.new_prompts is not None) == (row.batch == 1)


def test_the_parts_add_up(swept: BenchResult) -> None:
    for row in swept.rows:
        for number in range(ROUNDS):
            parts = [spread.samples_ms[number] for spread in row.stages.values()]
            assert row.total.samples_ms[number] == pytest.approx(sum(parts))
            both = [row.stages[stage].samples_ms[number] for stage in GRAPHS]
            assert row.graphs.samples_ms[number] == pytest.approx(sum(both))


def test_the_fraction_of_the_peak(swept: BenchResult) -> None:
    peak = {peak.data_type: peak.gflops for peak in swept.peaks}
    assert set(peak) == {"fp32", "int8"}
    first, *_, batch, small = swept.rows
    for row in swept.rows:
        assert row.gflop is not None
        assert row.peak_fraction == pytest.approx(row.gflop / (row.graphs.median_ms / 1000) / peak["fp32"])
    assert first.gflop is not None
    assert batch.gflop == pytest.approx(3 * first.gflop)
    assert small.gflop == pytest.approx(first.gflop / 2)


def test_text_is_embedded_anew_and_from_the_cache(swept: BenchResult) -> None:
    (contender,) = swept.contenders
    assert (swept.text_prompts, swept.text_templates) == (20, 3)
    assert contender.text_cold is not None
    assert contender.text_cached is not None
    assert len(contender.text_cold.samples_ms) == 3
    assert len(contender.text_cached.samples_ms) == 12


def test_cold_text_runs_the_encoder_and_cached_text_does_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def opener(bundle: Bundle, threads: int | None = None) -> Backend:
        backend: Any = choose_backend("onnxruntime", bundle, precision="fp32", threads=1)
        encode = backend.encode_text
        monkeypatch.setattr(backend, "encode_text", lambda ids: runs.append(len(ids)) or encode(ids))
        return backend  # type: ignore[no-any-return]

    other = Contender(name="other", identity="1", open=opener)
    run_bench(settings(folder, backends=("tensorrt",), contenders=(other,), sizes=((64, 64),)))
    # Once for the prompts of the frames, once for either embedder to warm up, three times cold; never cached.
    assert len(runs) == 6


@pytest.mark.parametrize(("quick_ms", "runs"), [(0.0, 1), (1e9, 2)], ids=["slow", "quick"])
def test_rounds_are_interleaved_in_changing_order(
    folder: Path, quick_ms: float, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is quick runs twice a round: once before the clock counts, for its caches were lost to the others."""
    monkeypatch.setattr(bench, "_QUICK_MS", quick_ms)
    names = ("first", "second", "third")
    contenders = tuple(counted(name) for name in names)
    run_bench(settings(folder, rounds=6, contenders=contenders, batches=(1, 2), sizes=((64, 64),)))
    order = [name for name, images in CALLS if images == 2]
    assert order[:3] == list(names)  # warming up
    visits = order[3::runs]
    assert order[3:] == [name for name in visits for _ in range(runs)]
    rounds = [tuple(visits[number : number + 3]) for number in range(0, len(visits), 3)]
    assert len(rounds) == 6
    assert all(set(one) == set(names) for one in rounds)
    assert len(set(rounds)) > 1


@pytest.mark.parametrize("seed", [0, 1])
def test_orders_are_permutations_of_a_seed(seed: int) -> None:
    items = list("abcde")
    orders = list(draw_rounds(items, 20, seed))
    assert all(collections.Counter(order) == collections.Counter(items) for order in orders)
    assert len({tuple(order) for order in orders}) > 15
    assert orders == list(draw_rounds(items, 20, seed))
    assert orders != list(draw_rounds(items, 20, seed + 1))


def test_who_cannot_run_says_why(folder: Path) -> None:
    result = run_bench(settings(folder, backends=("tensorrt", "onnxruntime"), precisions=("fp32", "int8")))
    problems = {contender.name: contender.problem for contender in result.contenders}
    assert list(problems) == ["tensorrt fp32", "tensorrt int8", "onnxruntime fp32", "onnxruntime int8"]
    assert "tensorrt cannot be used" in problems["tensorrt fp32"]
    assert "no image graph in int8" in problems["onnxruntime int8"]
    assert problems["onnxruntime fp32"] == ""
    assert {row.contender for row in result.rows} == {"onnxruntime fp32"}


@pytest.mark.parametrize("fails_at", [1, 3, 6], ids=["at once", "warming up", "in the rounds"])
def test_who_breaks_down_is_taken_out(folder: Path, fails_at: int) -> None:
    result = run_bench(settings(folder, contenders=(counted("weak", fails_at),), sizes=((64, 64), (32, 64))))
    assert [contender.problem for contender in result.contenders] == ["", "weak broke down"]
    assert works(result) == [(64, 64, 1, 2), (32, 64, 1, 2)]
    assert CALLS.count(("weak", 1)) == fails_at


def test_none_runs(folder: Path) -> None:
    result = run_bench(settings(folder, backends=("tensorrt",)))
    assert result.rows == ()
    assert result.base_rows == ()
    assert all(contender.problem for contender in result.contenders)


def test_memory_of_a_process_of_its_own(folder: Path) -> None:
    result = run_bench(settings(folder, backends=("tensorrt", "onnxruntime"), memory=True, rounds=1, sizes=((64, 64),)))
    missing, measured = (contender.peak_memory_bytes for contender in result.contenders)
    assert missing is None
    assert measured is not None
    assert 30_000_000 < measured < 500_000_000


def open_in_the_parent_alone(bundle: Bundle, threads: int | None = None) -> Backend:
    if multiprocessing.parent_process() is not None:
        os._exit(9)
    return choose_backend("onnxruntime", bundle, precision="fp32", threads=1)


def test_a_process_that_ends_early_costs_no_figure(folder: Path) -> None:
    other = Contender(name="mortal", identity="1", open=open_in_the_parent_alone)
    result = run_bench(
        settings(folder, backends=("tensorrt",), contenders=(other,), memory=True, rounds=1, sizes=((64, 64),))
    )
    assert len(result.rows) == 1
    (note,) = (note for note in result.notes if "mortal fp32" in note)
    assert "could not be measured: its process ended with exit code" in note


def test_progress_comes_to_its_end(folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    run_bench(settings(folder, sizes=((32, 64),)), progress=lambda *step: seen.append(step))
    assert ("measuring: 32x64, round", ROUNDS, ROUNDS) in seen
    assert all(0 <= done <= total for _, done, total in seen)


def test_the_document_is_json(swept: BenchResult) -> None:
    document = json.loads(json.dumps(swept.to_dict(), allow_nan=False))
    assert document["settings"]["sizes"] == [[64, 64], [32, 64]]
    assert document["settings"]["rounds"] == ROUNDS
    assert len(document["rows"]) == len(swept.rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backends": ("onnxrutnime",)}, "unknown backend 'onnxrutnime'. Choose some of tensorrt, openvino"),
        ({"precisions": ("fp8",)}, "unknown precision 'fp8'. Choose some of fp32"),
        ({"prompts": ()}, "prompts should be numbers from 1 to 10000, got none"),
        ({"prompts": (1, 0)}, "prompts should be numbers from 1 to 10000, got 0"),
        ({"prompts": (10_001,)}, "prompts should be numbers from 1 to 10000, got 10001"),
        ({"prompts": (1, 20, 1)}, "prompts should be different ones, got 1, 20, 1"),
        ({"batches": (0,)}, "batches should be numbers from 1 to 256, got 0"),
        ({"batches": ()}, "batches should be numbers from 1 to 256, got none"),
        ({"backends": ("openvino", "openvino")}, "backends should be different ones"),
        ({"rounds": 0}, "rounds should be 1 or more, got 0"),
        ({"warm_up": 0}, "warm_up should be 1 or more, got 0"),
        ({"threads": 0}, "threads should be 1 or more, got 0"),
        ({"seed": -1}, "seed should be 0 or more, got -1"),
        ({"gemm_side": -1}, "gemm_side should be 0 or more, got -1"),
    ],
    ids=str,
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        BenchSettings(model="tcl-shapes", **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"sizes": ((64, 48),)}, InputError, "no image graph for 64x48, only for 64x64, 32x64"),
        ({"sizes": ((-64, 64),)}, InputError, "no image graph for -64x64"),
        ({"image": Path("missing.jpg")}, InputError, "missing.jpg does not exist"),
        ({"prompts": (157,)}, InputError, "157 different prompts were asked for"),
        ({"model": "tcl-shaeps"}, BundleError, "tcl-shaeps"),
    ],
    ids=["size", "negative", "image", "prompts", "model"],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    folder: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        run_bench(settings(folder, contenders=(counted("weak"),), **changes))
    assert message in str(caught.value)
    assert CALLS == []
