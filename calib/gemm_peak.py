"""The machine's matrix-multiplication peak by data type, measured with the libraries that run the models.

A model can at best run at this speed: what it reaches of it says what is left to gain. The matrices are those a library
is best at, so that no model's own shapes flatter it.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tclkit.runtime.backends import available_backends
from tclkit.runtime.errors import BackendError
from tclkit.runtime.openvino_backend import import_openvino, openvino_core
from tclkit.runtime.processor import usable_cpus

DATA_TYPES = {"onnxruntime": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8")}
_FLOAT, _INT8 = 1, 3  # TensorProto.DataType
_IR_VERSION, _OPSET = 8, 17
_SCALE = 0.01

_Multiply = Callable[[NDArray[Any]], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmPeak:
    """The best of several multiplications of two square matrices.

    data_type: of the factors, "fp32", "bf16" or "int8"; the result is fp32.
    library: what multiplied, with its version.
    side: rows and columns of each matrix.
    gflops: billions of operations a second, a multiplication and an addition counted as two; of int8 too.
    """

    data_type: str
    library: str
    side: int
    gflops: float


class GemmMeter:
    """One multiplication by a constant, set up once and timed again and again; the best counts.

    The second factor is a constant, as a model's weights are: libraries lay it out for themselves beforehand.

    Args:
        backend: "onnxruntime" or "openvino".
        data_type: one of `DATA_TYPES[backend]`.
        threads: CPU threads; None takes every CPU this process may use.
        side: of the square matrices.

    Raises:
        BackendError: the library cannot be loaded, or cannot multiply in this data type here.
    """

    def __init__(self, backend: str, data_type: str, *, threads: int | None = None, side: int = 2048) -> None:
        self.data_type, self.side = data_type, side
        opener = _open_onnxruntime if backend == "onnxruntime" else _open_openvino
        try:
            self.library, self._run = opener(
                matmul_model(side, quantized=data_type == "int8"), data_type, threads or usable_cpus()
            )
            self._left = np.random.default_rng(1).standard_normal((side, side), np.float32)
            self._run(self._left)  # the first run lays out memory
        except BackendError:
            raise
        except Exception as error:  # the libraries' own exceptions share no base but this
            raise BackendError(
                f"{backend} cannot multiply two {side} x {side} matrices in {data_type} ({error}). Install it again: "
                f"pip install --force-reinstall {backend}",
                backend=backend,
            ) from error
        self._best_s = float("inf")

    def sample(self, repeats: int = 2) -> None:
        """Multiply so many times more."""
        for _ in range(repeats):
            start = time.perf_counter()
            self._run(self._left)
            self._best_s = min(self._best_s, time.perf_counter() - start)

    def peak(self) -> GemmPeak:
        """The best so far; `sample` comes first."""
        gflops = 2 * self.side**3 / self._best_s / 1e9
        return GemmPeak(data_type=self.data_type, library=self.library, side=self.side, gflops=gflops)


def open_gemm_meters(
    backends: Collection[str], *, threads: int | None = None, side: int = 2048
) -> tuple[list[GemmMeter], list[str]]:
    """Meters of every data type that these libraries multiply in on the CPU, and why others are missing.

    Args:
        backends: names; those that are not installed, or do not run on the CPU, have no meters.
        threads, side: see `GemmMeter`.
    """
    installed = {status.name for status in available_backends() if status.version is not None}
    meters, missing = [], []
    for backend in DATA_TYPES:
        if backend in backends and backend in installed:
            for data_type in DATA_TYPES[backend]:
                try:
                    meters.append(GemmMeter(backend, data_type, threads=threads, side=side))
                except BackendError as error:  # noqa: PERF203
                    missing.append(error.message)
    return meters, missing


def best_peaks(peaks: Sequence[GemmPeak]) -> dict[str, GemmPeak]:
    """The fastest library's peak of each data type: what this machine is known to reach."""
    best: dict[str, GemmPeak] = {}
    for peak in peaks:
        if peak.data_type not in best or peak.gflops > best[peak.data_type].gflops:
            best[peak.data_type] = peak
    return best


def _open_onnxruntime(model: bytes, data_type: str, threads: int) -> tuple[str, _Multiply]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised, and told once
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return f"onnxruntime {onnxruntime.__version__}", lambda left: session.run(None, {"left": left})


def _open_openvino(model: bytes, data_type: str, threads: int) -> tuple[str, _Multiply]:
    openvino, core = import_openvino(), openvino_core()
    version = openvino.get_version().partition("-")[0]
    if data_type == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise BackendError(f"this processor does not multiply in bf16 (openvino {version})", backend="openvino")
    compiled = core.compile_model(
        core.read_model(model),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "bf16" if data_type == "bf16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        },
    )
    request = compiled.create_infer_request()
    return f"openvino {version}", lambda left: request.infer([left], share_inputs=True, share_outputs=True)


def matmul_model(side: int, *, quantized: bool) -> bytes:
    """An ONNX model of one multiplication by a constant, made without the onnx package, which the device lacks.

    Args:
        side: rows and columns of both factors.
        quantized: both factors behind QuantizeLinear and DequantizeLinear, as in a bundle's INT8 graph; the left one is
            quantised in the run, the right one is stored as int8.

    Returns:
        The model: input "left" and output "product", (side, side) float32.

    Source: onnx.proto of ONNX, IR version 8; the wire format of Protocol Buffers.
    """
    random = np.random.default_rng(0)
    if quantized:
        steps = ["scale", "zero"]
        tensors = [
            _tensor("right", random.integers(-127, 128, (side, side), np.int8), _INT8),
            _tensor("scale", np.array(_SCALE, np.float32), _FLOAT),
            _tensor("zero", np.array(0, np.int8), _INT8),
        ]
        nodes = [
            _node("QuantizeLinear", ["left", *steps], "left_steps"),
            _node("DequantizeLinear", ["left_steps", *steps], "left_float"),
            _node("DequantizeLinear", ["right", *steps], "right_float"),
            _node("MatMul", ["left_float", "right_float"], "product"),
        ]
    else:
        tensors = [_tensor("right", random.standard_normal((side, side), np.float32), _FLOAT)]
        nodes = [_node("MatMul", ["left", "right"], "product")]
    graph = b"".join(
        [
            *(_field(1, node) for node in nodes),
            _field(2, b"gemm"),
            *(_field(5, tensor) for tensor in tensors),
            _field(11, _value_info("left", side)),
            _field(12, _value_info("product", side)),
        ]
    )
    return _number(1, _IR_VERSION) + _field(7, graph) + _field(8, _number(2, _OPSET))


def _node(operator: str, inputs: Sequence[str], output: str) -> bytes:
    names = b"".join(_field(1, name.encode()) for name in inputs)
    return names + _field(2, output.encode()) + _field(3, output.encode()) + _field(4, operator.encode())


def _tensor(name: str, values: NDArray[Any], kind: int) -> bytes:
    dims = b"".join(_number(1, dim) for dim in values.shape)
    return dims + _number(2, kind) + _field(8, name.encode()) + _field(9, values.tobytes())


def _value_info(name: str, side: int) -> bytes:
    dim = _field(1, _number(1, side))
    return _field(1, name.encode()) + _field(2, _field(1, _number(1, _FLOAT) + _field(2, dim + dim)))


def _field(number: int, value: bytes) -> bytes:
    """A length-delimited field: a text, bytes or a message."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
