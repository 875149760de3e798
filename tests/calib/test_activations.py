import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tclkit.calib import absolute_maxima, activation_ranges, activations, float_tensor_maxima, select_images
from tclkit.runtime.errors import BackendError, InputError

ROOT = Path(__file__).resolve().parents[2]
TCL_SHAPES = ROOT / "runtime" / "models" / "tcl-shapes" / "image.onnx"
SAMPLES = ROOT / "runtime" / "samples"
HASH = "0" * 64


def graph(
    nodes: Sequence[onnx.NodeProto],
    *,
    weights: dict[str, NDArray[Any]] | None = None,
    shape: Sequence[str | int] = ("batch", 4, 8),
    kind: int = TensorProto.FLOAT,
    opset: int = 20,
) -> onnx.ModelProto:
    """A graph from the input "x" to the last node's first output."""
    made = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", kind, list(shape))],
        [onnx.ValueInfoProto(name=nodes[-1].output[0])],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def small_graph(**options: Any) -> onnx.ModelProto:
    """x -> scaled = 2 x -> rectified -> squared."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["scaled"]),
        helper.make_node("Relu", ["scaled"], ["rectified"]),
        helper.make_node("Mul", ["rectified", "rectified"], ["squared"]),
    ]
    return graph(nodes, weights={"two": np.float32([2])}, **options)


def batches_of(values: NDArray[np.floating[Any]], size: int = 2) -> list[NDArray[np.float32]]:
    return [values[start : start + size].astype(np.float32) for start in range(0, len(values), size)]


@pytest.fixture
def values() -> NDArray[np.float64]:
    return np.random.default_rng(0).standard_normal((10, 4, 8))


class CountingBatches:
    """Counts how often it is iterated."""

    def __init__(self, batches: Sequence[NDArray[Any]]) -> None:
        self._batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[NDArray[Any]]:
        self.passes += 1
        return iter(self._batches)


def test_maxima_of_whole_tensors(values: NDArray[np.float64]) -> None:
    values[3, 1, 2] = -9
    found = absolute_maxima(small_graph(), ["squared", "scaled", "x", "rectified"], batches_of(values, 3))
    assert list(found) == ["squared", "scaled", "x", "rectified"]
    largest = values.astype(np.float32).max()
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {"squared": (2 * largest) ** 2, "scaled": 18, "x": 9, "rectified": 2 * largest}, rel=1e-6
    )
    assert all(value.dtype == np.float32 and value.shape == () for value in found.values())


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
@pytest.mark.parametrize("axis", [1, 2, -1, 0])
def test_maxima_by_channel(axis: int, opset: int, values: NDArray[np.float64]) -> None:
    model = small_graph(opset=opset)
    found = absolute_maxima(model, ["scaled", "squared"], batches_of(values), channel_axis={"scaled": axis})
    images = values.astype(np.float32)
    others = tuple(other for other in range(3) if other != axis % 3)
    # Images run one by one, so the batch axis is the largest over all of them.
    expected = np.abs(2 * images).max() if axis == 0 else np.abs(2 * images).max(axis=others)
    np.testing.assert_allclose(found["scaled"], np.reshape(expected, found["scaled"].shape), rtol=1e-6)
    assert found["squared"].shape == ()


def test_every_float_tensor_is_measured(values: NDArray[np.float64]) -> None:
    nodes = [
        helper.make_node("Constant", [], ["empty"], value=numpy_helper.from_array(np.zeros(0, np.float32))),
        helper.make_node("Constant", [], ["seventy"], value=numpy_helper.from_array(np.float32([70_000.0]))),
        helper.make_node("Mul", ["x", "seventy"], ["huge"]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["double"], to=TensorProto.DOUBLE),
        helper.make_node("Greater", ["x", "seventy"], ["larger"]),
        helper.make_node("Dropout", ["huge"], ["out", ""]),
    ]
    found = float_tensor_maxima(graph(nodes), batches_of(values))
    largest = float(np.abs(values.astype(np.float32)).max())
    assert list(found) == ["seventy", "huge", "half", "double", "out"]
    assert found["huge"] == pytest.approx(70_000 * largest, rel=1e-6)
    assert found["half"] == found["double"] == float(np.float16(largest))


def test_what_is_not_finite_shows(values: NDArray[np.float64]) -> None:
    values[2, 0, 5], values[7, 3, 7] = np.nan, np.inf
    found = absolute_maxima(small_graph(), ["scaled"], batches_of(values), channel_axis={"scaled": 1})["scaled"]
    assert np.isnan(found[0])
    assert np.isinf(found[3])
    assert np.isfinite(found[1:3]).all()
    with pytest.raises(InputError, match="tensor 'scaled' reaches nan on the calibration images"):
        activation_ranges(small_graph(), ["scaled"], batches_of(values))


def test_the_model_is_not_changed(values: NDArray[np.float64]) -> None:
    model = small_graph()
    before = model.SerializeToString()
    activation_ranges(model, ["scaled"], batches_of(values))
    assert model.SerializeToString() == before


def test_minmax_takes_the_largest_in_one_pass(values: NDArray[np.float64]) -> None:
    values[3, 1, 2] = -90
    batches = CountingBatches(batches_of(values))
    found = activation_ranges(small_graph(), ["scaled", "rectified"], batches, method="minmax")
    assert found["scaled"] == 180
    assert found["rectified"] == pytest.approx(2 * values.astype(np.float32).max())
    assert batches.passes == 1


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9])
def test_percentile_is_numpys(percentile: float) -> None:
    values = np.random.default_rng(0).laplace(size=(40, 16, 64)).astype(np.float32)
    model = small_graph(shape=("batch", 16, 64))
    found = activation_ranges(model, ["scaled"], batches_of(values), method="percentile", percentile=percentile)
    assert found["scaled"] == pytest.approx(float(np.percentile(np.abs(2 * values), percentile)), rel=2e-3)
    whole = activation_ranges(model, ["scaled"], batches_of(values), method="percentile", percentile=100)
    assert whole["scaled"] == float(np.abs(2 * values).max())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_entropy_clips_outliers_and_keeps_the_rest(scale: float) -> None:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((20, 16, 256)) * scale
    normal[[3, 11], 5, 7] = (-50 * scale, 60 * scale)
    uniform = rng.uniform(-scale, scale, normal.shape)
    model = small_graph(shape=("batch", 16, 256))
    clipped = activation_ranges(model, ["scaled"], batches_of(normal), method="entropy")
    kept = activation_ranges(model, ["scaled"], batches_of(uniform), method="entropy")
    assert 6 * scale < clipped["scaled"] < 20 * scale  # twice as large as x
    assert kept["scaled"] == pytest.approx(2 * scale, rel=0.02)


def test_images_do_not_count_twice_however_they_are_batched(values: NDArray[np.float64]) -> None:
    results = [activation_ranges(small_graph(), ["scaled", "squared"], batches_of(values, n)) for n in (1, 3, 10)]
    assert results[0] == results[1] == results[2]


def test_many_activations_are_fetched_in_groups(values: NDArray[np.float64], monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["scaled", "rectified", "squared"]
    whole = activation_ranges(small_graph(), names, batches_of(values))
    monkeypatch.setattr(activations, "_MAX_FETCHED_BYTES", 2 * 2 * 4 * 8)  # two tensors' int16 copies
    batches = CountingBatches(batches_of(values))
    assert activation_ranges(small_graph(), names, batches) == whole
    assert batches.passes == 1 + 2


def test_tensors_of_zeros_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    values = -np.ones((3, 4, 8))
    with caplog.at_level(logging.WARNING):
        found = activation_ranges(small_graph(), ["rectified", "scaled"], batches_of(values), method="percentile")
    assert found["rectified"] == 1.0
    assert found["scaled"] == pytest.approx(2.0, rel=1e-4)
    assert "1 tensor(s) are 0 on all calibration images and get the range 1: rectified" in caplog.text
    only = activation_ranges(small_graph(), ["rectified"], batches_of(values))
    assert only == {"rectified": 1.0}


def test_half_precision_graphs(values: NDArray[np.float64]) -> None:
    nodes = [helper.make_node("Mul", ["x", "three"], ["out"])]
    model = graph(nodes, weights={"three": np.float16([3])}, kind=TensorProto.FLOAT16)
    batches = [values.astype(np.float16)]
    found = activation_ranges(model, ["out", "x"], batches, method="minmax")
    assert found["out"] == pytest.approx(3 * np.abs(values).max(), rel=2e-3)
    assert activation_ranges(model, ["out"], batches, method="percentile", percentile=100)["out"] == found["out"]


def test_a_graph_of_a_fixed_batch(values: NDArray[np.float64]) -> None:
    model = small_graph(shape=(5, 4, 8))
    found = absolute_maxima(model, ["scaled"], batches_of(values, 5))
    assert float(found["scaled"]) == pytest.approx(2 * np.abs(values).max(), rel=1e-6)
    with pytest.raises(InputError, match=r"could not run the graph on x float32 \(3, 4, 8\)"):
        absolute_maxima(model, ["scaled"], batches_of(values, 3))


def test_several_inputs_take_mappings() -> None:
    model = graph([helper.make_node("Add", ["x", "y"], ["sum"])])
    model.graph.input.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 8]))
    ones = np.ones((1, 4, 8), np.float32)
    assert float_tensor_maxima(model, [{"x": ones, "y": 2 * ones}, {"x": ones, "y": -9 * ones}]) == {"sum": 8.0}
    with pytest.raises(InputError, match="the graph has the inputs x, y; give every batch as a mapping"):
        float_tensor_maxima(model, [ones])


def test_what_a_branch_reads_is_kept(values: NDArray[np.float64]) -> None:
    def branch(operator: str) -> onnx.GraphProto:
        node = helper.make_node(operator, ["scaled"], [operator])
        return helper.make_graph([node], operator, [], [helper.make_tensor_value_info(operator, 1, None)])

    nodes = [
        helper.make_node("Mul", ["x", "two"], ["scaled"]),
        helper.make_node("If", ["yes"], ["chosen"], then_branch=branch("Neg"), else_branch=branch("Exp")),
        helper.make_node("Mul", ["chosen", "two"], ["out"]),
    ]
    model = graph(nodes, weights={"two": np.float32([2]), "yes": np.array(True)})
    found = absolute_maxima(model, ["out"], batches_of(values))
    assert float(found["out"]) == pytest.approx(4 * np.abs(values).max(), rel=1e-6)


def test_tensors_are_only_computed_as_far_as_asked(values: NDArray[np.float64]) -> None:
    """What stands behind the last tensor need not run: here it could not."""
    nodes = [helper.make_node("Relu", ["x"], ["first"]), helper.make_node("Reshape", ["first", "shape"], ["second"])]
    model = graph(nodes, weights={"shape": np.array([3, 5])})
    with pytest.raises(InputError, match="could not run the graph"):
        absolute_maxima(model, ["second"], batches_of(values))
    assert float(absolute_maxima(model, ["first"], batches_of(values))["first"]) > 0


def test_progress(values: NDArray[np.float64]) -> None:
    seen: list[tuple[str, int, int]] = []
    activation_ranges(small_graph(), ["x"], batches_of(values, 5), progress=lambda *state: seen.append(state))
    stages = ("largest activations", "activation histograms")
    assert seen == [(stage, done, 10) for stage in stages for done in range(1, 11)]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"tensors": ["scald"]}, r"no input or activation 'scald'\. Did you mean 'scaled'\?"),
        ({"tensors": ["two"]}, "no input or activation 'two'"),
        ({"tensors": []}, "no tensors are named to measure"),
        ({"method": "median"}, "unknown range method 'median': it is one of mse, entropy, minmax, percentile"),
        ({"percentile": 0}, r"percentile should be in \(0, 100\], found 0"),
        ({"bins": 100}, "bins should be 128 to 32766, found 100"),
        ({"batches": iter([np.zeros((1, 4, 8), np.float32)])}, "give a list of batches, not an iterator"),
        ({"batches": []}, "there are no calibration images"),
        ({"batches": [np.zeros((1, 4, 8), np.uint8)]}, r"could not run the graph on x uint8 \(1, 4, 8\)"),
    ],
)
def test_arguments_that_cannot_be_used(changed: dict[str, Any], text: str, values: NDArray[np.float64]) -> None:
    arguments = {"tensors": ["scaled"], "batches": batches_of(values), **changed}
    with pytest.raises(InputError, match=text):
        activation_ranges(small_graph(), **arguments)


def test_axes_that_do_not_exist(values: NDArray[np.float64]) -> None:
    with pytest.raises(InputError, match="tensor 'scaled' has 3 dimensions; there is no axis 3"):
        absolute_maxima(small_graph(), ["scaled"], batches_of(values), channel_axis={"scaled": 3})
    with pytest.raises(InputError, match="channel_axis names 'x', which is not among the tensors to measure"):
        absolute_maxima(small_graph(), ["scaled"], batches_of(values), channel_axis={"x": 1})


def test_graphs_that_cannot_be_measured(values: NDArray[np.float64]) -> None:
    whole = graph([helper.make_node("Shape", ["x"], ["shape"])])
    with pytest.raises(InputError, match="tensor 'shape' holds INT64; only floats have a range"):
        absolute_maxima(whole, ["shape"], batches_of(values))
    unknown = graph([helper.make_node("Unheard", ["x"], ["out"])])
    with pytest.raises((InputError, BackendError), match="Unheard"):
        absolute_maxima(unknown, ["out"], batches_of(values))


def test_batches_that_change_between_passes(values: NDArray[np.float64]) -> None:
    class Growing(CountingBatches):
        def __iter__(self) -> Iterator[NDArray[Any]]:
            return (batch * -(10.0**self.passes) for batch in super().__iter__())

    batches = Growing([np.ones((1, 4, 8), np.float32)])
    with pytest.raises(InputError, match="tensor 'scaled' differs between two passes over the images"):
        activation_ranges(small_graph(), ["scaled"], batches)


def test_a_second_build_skips_the_passes(values: NDArray[np.float64]) -> None:
    model, batches = small_graph(), CountingBatches(batches_of(values))
    names = ["scaled", "squared"]
    axes = {"scaled": -1}

    def build() -> tuple[Any, ...]:
        by_channel = absolute_maxima(model, names, batches, channel_axis=axes, content_hash=HASH)
        return (
            by_channel["scaled"].tobytes(),
            by_channel["squared"].tobytes(),
            activation_ranges(model, names, batches, content_hash=HASH),
            float_tensor_maxima(model, batches, content_hash=HASH),
        )

    first = build()
    assert batches.passes == 1 + 2 + 1
    assert build() == first
    assert batches.passes == 4


@pytest.mark.parametrize(
    "changed",
    [
        {"content_hash": "1" * 64},
        {"content_hash": None},
        {"tensors": ["scaled", "squared"]},
        {"method": "minmax"},
        {"bins": 1024},
        {"model": small_graph(opset=19)},
    ],
)
def test_whatever_matters_is_measured_again(changed: dict[str, Any], values: NDArray[np.float64]) -> None:
    batches = CountingBatches(batches_of(values))
    arguments: dict[str, Any] = {"model": small_graph(), "tensors": ["scaled"], "content_hash": HASH}
    arguments["method"] = "entropy"  # the one with bins
    activation_ranges(batches=batches, **arguments)
    before = batches.passes
    activation_ranges(batches=batches, **{**arguments, **changed})
    assert batches.passes > before


def test_a_percentile_of_no_use_to_the_method_does_not_matter(values: NDArray[np.float64]) -> None:
    batches = CountingBatches(batches_of(values))
    activation_ranges(small_graph(), ["scaled"], batches, percentile=99, content_hash=HASH)
    activation_ranges(small_graph(), ["scaled"], batches, percentile=98, content_hash=HASH)
    assert batches.passes == 2


def test_the_shipped_model_on_the_sample_scenes() -> None:
    """Ranges of the real graph agree with what numpy says about activations fetched whole."""
    model = onnx.load(TCL_SHAPES)
    weights = {weight.name for weight in model.graph.initializer}
    names = [node.input[0] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    chosen = select_images(SAMPLES, size=(128, 128))
    every = float_tensor_maxima(model, chosen.calibration)
    found = {
        method: activation_ranges(model, names, chosen.calibration, method=method, percentile=99.0)  # type: ignore[arg-type]
        for method in ("minmax", "percentile", "entropy")
    }
    fetched: onnx.ModelProto = onnx.ModelProto()
    fetched.CopyFrom(model)
    fetched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names))
    session = onnxruntime.InferenceSession(fetched.SerializeToString(), providers=["CPUExecutionProvider"])
    (images,) = chosen.calibration
    for name, activation in zip(
        dict.fromkeys(names), session.run(list(dict.fromkeys(names)), {"image": images}), strict=True
    ):
        magnitudes = np.abs(activation)
        assert found["minmax"][name] == every[name] == pytest.approx(float(magnitudes.max()), rel=1e-4)
        assert found["percentile"][name] == pytest.approx(float(np.percentile(magnitudes, 99.0)), rel=5e-3)
        assert 0.05 * every[name] < found["entropy"][name] <= every[name] * (1 + 1e-6)
    assert len(every) > 100


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    """Peak of a fresh process on the first block: 128 images take no more than 16. Kept, 112 more would be 400 MB."""
    code = """
import json, resource, sys
import numpy as np, onnx
from tclkit.calib import activation_ranges

class Images:
    def __init__(self, count): self.count = count
    def __iter__(self):
        return (np.random.default_rng(i).integers(0, 256, (1, 128, 128, 3), np.uint8) for i in range(self.count))

model = onnx.load(sys.argv[1])
names = [name for node in model.graph.node for name in node.output if node.op_type in ("MatMul", "Gelu", "Softmax")]
peaks = []
for count in (16, 128):
    activation_ranges(model, names[:7], Images(count))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(json.dumps(peaks))
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(TCL_SHAPES)], capture_output=True, text=True, check=True, timeout=120
    )
    few_kb, many_kb = json.loads(run.stdout)
    assert many_kb - few_kb < 8 * 1024


def test_measured_tensors_are_freed_early() -> None:
    """The order of the measuring nodes lets ONNX Runtime reuse memory: 64 layers of 4 MB need not live together."""
    code = """
import json, resource
import numpy as np, onnx
from onnx import TensorProto, helper
from tclkit.calib import float_tensor_maxima

nodes = [helper.make_node("Exp" if i % 2 else "Neg", [f"t{i}" if i else "x"], [f"t{i + 1}"]) for i in range(64)]
info = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "rows", "columns"])
graph = helper.make_graph(nodes, "chain", [info], [helper.make_tensor_value_info("t64", TensorProto.FLOAT, None)])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
image = np.zeros((1, 1024, 1024), np.float32)
float_tensor_maxima(model, [image[:, :8, :8]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(float_tensor_maxima(model, [image])) == 64
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(run.stdout) < 64 * 1024


def test_damaged_cache_entries_are_measured_again(
    values: NDArray[np.float64], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TCLKIT_HOME", str(tmp_path))
    batches = CountingBatches(batches_of(values))

    def build() -> dict[str, float]:
        return activation_ranges(small_graph(), ["scaled"], batches, method="minmax", content_hash=HASH)

    first = build()
    (entry,) = (tmp_path / "cache" / "calibration").iterdir()
    entry.write_text("{", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert build() == first
    assert batches.passes == 2
    assert "is damaged" in caplog.text
    assert build() == first
    assert batches.passes == 2


def picture_source(photos: Callable[..., Path]) -> Path:
    return photos(20, height=128, width=128)


def test_a_set_of_photos_end_to_end(photos: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(TCL_SHAPES)
    results = []
    for _ in range(2):
        chosen = select_images(picture_source(photos), size=(128, 128), count=8, held_back=2)
        found = activation_ranges(model, ["layer_norm"], chosen.calibration, content_hash=chosen.content_hash)
        results.append(found)
        monkeypatch.setattr(activations, "_extremes", None)  # the second time nothing may be measured
    assert results[0] == results[1]
    assert results[0]["layer_norm"] > 0
