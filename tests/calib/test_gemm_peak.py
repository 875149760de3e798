import importlib.util

import numpy as np
import onnx
import onnxruntime
import pytest

from tclkit.calib.gemm_peak import DATA_TYPES, GemmMeter, GemmPeak, best_peaks, matmul_model, open_gemm_meters
from tclkit.runtime.errors import BackendError

SIDE = 48
HERE = [
    pytest.param(backend, data_type, id=f"{backend}-{data_type}")
    for backend, data_types in DATA_TYPES.items()
    for data_type in data_types
    if importlib.util.find_spec(backend) is not None and data_type != "bf16"
]


def constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    return np.asarray(next(onnx.numpy_helper.to_array(w) for w in model.graph.initializer if w.name == name))


@pytest.mark.parametrize("quantized", [False, True])
def test_the_hand_made_model_is_valid_onnx(quantized: bool) -> None:
    model = onnx.load_from_string(matmul_model(SIDE, quantized=quantized))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node].count("MatMul") == 1
    assert constant(model, "right").shape == (SIDE, SIDE)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_hand_made_model_multiplies(quantized: bool) -> None:
    data = matmul_model(SIDE, quantized=quantized)
    left = np.random.default_rng(2).standard_normal((SIDE, SIDE), np.float32)
    found = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"left": left})[0]
    right = constant(onnx.load_from_string(data), "right").astype(np.float32)
    if quantized:
        scale = constant(onnx.load_from_string(data), "scale")
        left, right = np.clip(np.round(left / scale), -128, 127) * scale, right * scale
    np.testing.assert_allclose(found, left @ right, rtol=1e-3, atol=1e-3)


def test_onnx_runtime_multiplies_integers(tmp_path: object) -> None:
    """Not floats behind a conversion: a peak of that would flatter every INT8 graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = f"{tmp_path}/optimised.onnx"
    options.log_severity_level = 4
    onnxruntime.InferenceSession(matmul_model(SIDE, quantized=True), options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(f"{tmp_path}/optimised.onnx").graph.node][-1] == "MatMulIntegerToFloat"


@pytest.mark.parametrize(("backend", "data_type"), HERE)
def test_a_meter_keeps_the_best(backend: str, data_type: str) -> None:
    meter = GemmMeter(backend, data_type, threads=1, side=SIDE)
    meter.sample()
    first = meter.peak()
    meter.sample(20)
    assert meter.peak().gflops >= first.gflops > 0
    assert (first.data_type, first.side) == (data_type, SIDE)
    assert first.library.startswith(f"{backend} ")


def test_meters_of_what_is_asked_for() -> None:
    meters, missing = open_gemm_meters(["onnxruntime", "tensorrt"], threads=1, side=SIDE)
    assert [(meter.data_type, meter.library.split()[0]) for meter in meters] == [
        ("fp32", "onnxruntime"),
        ("int8", "onnxruntime"),
    ]
    assert missing == []


def test_what_a_library_cannot_do_is_named() -> None:
    with pytest.raises(BackendError, match=r"onnxruntime cannot multiply two -1 x -1 matrices in fp32 .* pip install"):
        GemmMeter("onnxruntime", "fp32", side=-1)


def test_the_fastest_library_is_the_peak() -> None:
    def peak(data_type: str, library: str, gflops: float) -> GemmPeak:
        return GemmPeak(data_type=data_type, library=library, side=2, gflops=gflops)

    fast, slow, other = peak("fp32", "b", 20.0), peak("fp32", "a", 10.0), peak("int8", "a", 5.0)
    assert best_peaks([slow, fast, other]) == {"fp32": fast, "int8": other}
    assert best_peaks([]) == {}
