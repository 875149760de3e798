"""The simulated classes of TensorRT, each written once for all versions; `api.bound_class` fits them to one.

Messages follow TensorRT's in what they say, not to the letter: nothing may match them. Rules that TensorRT states only
in its documentation are enforced where the simulator can see them broken.
"""

# ruff: noqa: N802, RUF012 - the names are TensorRT's; `_stored` is read, never changed

import ctypes
import math
import re
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto

from .api import make
from .cuda_runtime import ALIGNMENT, DeviceFaultError, cudaError_t
from .engine_format import (
    CacheContents,
    EngineHeader,
    FormatError,
    cache_from_bytes,
    cache_to_bytes,
    engine_from_bytes,
    engine_to_bytes,
)
from .operators import Violation, find_violations

if TYPE_CHECKING:
    from .simulator import Simulator

_SCRATCH_BYTES = 1 << 16  # what an execution context takes for itself
_SMALLEST_WORKSPACE = 1 << 20
_JETSONS = {(7, 2), (8, 7), (11, 0)}
_PRECISION_FLAGS = ("FP16", "BF16", "INT8", "FP8", "INT4", "FP4")
_CONSTRAINT_FLAGS = ("OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")
# fmt: off
_DATA_TYPES = {
    TensorProto.FLOAT: "FLOAT", TensorProto.FLOAT16: "HALF", TensorProto.BFLOAT16: "BF16", TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64", TensorProto.BOOL: "BOOL", TensorProto.UINT8: "UINT8", TensorProto.INT8: "INT8",
}
_NUMPY_TYPES = {
    "FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_, "UINT8": np.uint8,
    "INT8": np.int8,
}
_LAYER_TYPES = {
    "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE", "Cast": "CAST", "Conv": "CONVOLUTION",
    "MatMul": "MATRIX_MULTIPLY", "Gemm": "MATRIX_MULTIPLY", "LayerNormalization": "NORMALIZATION",
    "Softmax": "SOFTMAX", "Resize": "RESIZE", "Gather": "GATHER", "Concat": "CONCATENATION", "Slice": "SLICE",
    "Reshape": "SHUFFLE", "Transpose": "SHUFFLE", "Sigmoid": "ACTIVATION", "Gelu": "ACTIVATION", "Shape": "SHAPE",
    "Einsum": "EINSUM", "Constant": "CONSTANT",
}
# fmt: on


def version_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def graph_tensors(model: onnx.ModelProto) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """Inputs that are no weights, and outputs."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights], list(model.graph.output)


def dimensions(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Sizes, -1 where dynamic."""
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim)


class ILogger:
    def _setup(self) -> None:
        pass

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError('Tried to call pure virtual function "ILogger::log"')


class Logger:
    def _setup(self, min_severity: Any = None) -> None:
        self._values["min_severity"] = self._trt.ILogger.Severity.WARNING if min_severity is None else min_severity

    _stored = {"min_severity": None}

    def log(self, severity: Any, msg: str) -> None:
        if int(severity) <= int(self.min_severity):
            self._sim.log.append((severity.name, msg))


class Dims:
    """A shape; compares equal to tuples and lists."""

    def _setup(self, shape: Any = ()) -> None:
        self._shape = tuple(int(size) for size in shape)

    def __getitem__(self, arg0: Any) -> Any:
        return self._shape[arg0]

    def __len__(self) -> int:
        return len(self._shape)

    def __iter__(self) -> Iterator[int]:
        return iter(self._shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple | list | self._trt.Dims) and tuple(other) == self._shape  # type: ignore[arg-type]

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self._shape)


class IHostMemory(bytes):
    """Memory with the buffer protocol. It stands on bytes, and hides all of bytes but that."""

    def _setup(self) -> None:
        pass

    @property
    def nbytes(self) -> int:
        return memoryview(self).nbytes

    @property
    def dtype(self) -> Any:
        return self._trt.DataType.INT8


class IProgressMonitor:
    def _setup(self) -> None:
        pass

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
        raise NotImplementedError('Tried to call pure virtual function "IProgressMonitor::phaseStart"')

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError('Tried to call pure virtual function "IProgressMonitor::phaseFinish"')

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError('Tried to call pure virtual function "IProgressMonitor::stepComplete"')


class ITensor:
    def _setup(self, value: onnx.ValueInfoProto, *, is_input: bool) -> None:
        self._value, self._is_input = value, is_input

    @property
    def name(self) -> str:
        return str(self._value.name)

    @property
    def dtype(self) -> Any:
        return getattr(self._trt.DataType, _DATA_TYPES[self._value.type.tensor_type.elem_type])

    @property
    def shape(self) -> Any:
        return self._trt.Dims(dimensions(self._value))

    @property
    def is_shape_tensor(self) -> bool:
        return False

    @property
    def is_execution_tensor(self) -> bool:
        return True

    @property
    def is_network_input(self) -> bool:
        return self._is_input

    @property
    def is_network_output(self) -> bool:
        return not self._is_input


class ILayer:
    def _setup(self, node: onnx.NodeProto) -> None:
        self._node = node

    @property
    def name(self) -> str:
        return str(self._node.name)

    @property
    def type(self) -> Any:
        return getattr(self._trt.LayerType, _LAYER_TYPES.get(self._node.op_type, "ELEMENTWISE"))

    @property
    def precision_is_set(self) -> bool:
        return False

    @property
    def num_inputs(self) -> int:
        return len(self._node.input)

    @property
    def num_outputs(self) -> int:
        return len(self._node.output)


class INetworkDefinition:
    _stored = {"name": "", "error_recorder": None}

    def _setup(self, builder: Any, flags: int) -> None:
        self._builder, self._flags = builder, flags
        self._model = onnx.ModelProto()
        self._onnx_bytes = b""
        self._parser: Any = None  # weak: the parser owns the weights, and the network does not keep it alive

    def get_flag(self, flag: Any) -> bool:
        always = self._sim.major >= 11 and flag.name == "STRONGLY_TYPED"
        return always or bool(self._flags & (1 << int(flag)))

    @property
    def flags(self) -> int:
        return self._flags

    @property
    def builder(self) -> Any:
        return self._builder

    @property
    def num_inputs(self) -> int:
        return len(graph_tensors(self._model)[0])

    @property
    def num_outputs(self) -> int:
        return len(self._model.graph.output)

    @property
    def num_layers(self) -> int:
        return len(self._model.graph.node)

    @property
    def has_implicit_batch_dimension(self) -> bool:
        return False

    def get_input(self, index: int) -> Any:
        values = graph_tensors(self._model)[0]
        return make(self._trt.ITensor, values[index], is_input=True) if 0 <= index < len(values) else None

    def get_output(self, index: int) -> Any:
        values = graph_tensors(self._model)[1]
        return make(self._trt.ITensor, values[index], is_input=False) if 0 <= index < len(values) else None

    def get_layer(self, index: int) -> Any:
        nodes = self._model.graph.node
        return make(self._trt.ILayer, nodes[index]) if 0 <= index < len(nodes) else None

    def __getitem__(self, arg0: int) -> Any:
        if not 0 <= arg0 < len(self._model.graph.node):
            raise IndexError(f"layer {arg0} is out of range")
        return make(self._trt.ILayer, self._model.graph.node[arg0])

    def __len__(self) -> int:
        return len(self._model.graph.node)


class ParserError:
    def _setup(self, violation: Violation) -> None:
        self._violation = violation

    def code(self) -> Any:
        return getattr(self._trt.ErrorCode, self._violation.code)

    def desc(self) -> str:
        return self._violation.text

    def file(self) -> str:
        return "ModelImporter.cpp"

    def func(self) -> str:
        return "parseNode"

    def line(self) -> int:
        return 0

    def node(self) -> int:
        return self._violation.node

    def node_name(self) -> str:
        return self._violation.name

    def node_operator(self) -> str:
        return self._violation.operator

    def __repr__(self) -> str:
        v = self._violation
        return f"In node {v.node} with name: {v.name} and operator: {v.operator} (parseNode): {v.code}: {v.text}"


class OnnxParser:
    def _setup(self, network: Any, logger: Any) -> None:
        self._network, self._logger = network, logger
        self._errors: list[Violation] = []
        self._flags = 0

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    @property
    def flags(self) -> int:
        return self._flags

    @flags.setter
    def flags(self, value: int) -> None:
        self._flags = value

    def get_error(self, index: int) -> Any:
        return make(self._trt.ParserError, self._errors[index])

    def clear_errors(self) -> None:
        self._errors = []

    def set_flag(self, flag: Any) -> None:
        self._flags |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags & (1 << int(flag)))

    def parse(self, model: Any, path: str | None = None) -> bool:
        data = bytes(memoryview(model))
        parsed = onnx.ModelProto()
        try:
            parsed.ParseFromString(data)
        except Exception:  # google.protobuf's DecodeError; its home differs between versions
            parsed.Clear()
        if not parsed.graph.node:
            self._errors.append(Violation(-1, "", "", "MODEL_DESERIALIZE_FAILED", "Failed to parse the ONNX model."))
        else:
            self._errors.extend(find_violations(parsed))
        for error in self._errors:
            self._sim.say(self._logger, "ERROR", f"ModelImporter.cpp: {make(self._trt.ParserError, error)!r}")
        if self._errors:
            return False
        self._network._model, self._network._onnx_bytes = parsed, data
        self._network._parser = weakref.ref(self)
        return True


class IOptimizationProfile:
    def _setup(self) -> None:
        self._shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        shapes = [tuple(int(size) for size in shape) for shape in (min, opt, max)]
        same_rank = len({len(shape) for shape in shapes}) == 1
        if not same_rank or any(not 0 <= a <= b <= c for a, b, c in zip(*shapes, strict=False)):
            raise ValueError(f"Shape provided for {input} is inconsistent: min {min}, opt {opt}, max {max}")
        self._shapes[input] = shapes

    def get_shape(self, input: str) -> Any:
        return [self._trt.Dims(shape) for shape in self._shapes.get(input, [])]

    def __bool__(self) -> bool:
        return True


class ITimingCache:
    def _setup(self, contents: CacheContents) -> None:
        self._contents = contents

    def serialize(self) -> Any:
        return self._sim.host_memory(cache_to_bytes(self._contents))

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        if not ignore_mismatch and not self._sim.owns_cache(input_cache._contents):
            return False
        self._contents.keys |= input_cache._contents.keys
        return True

    def reset(self) -> bool:
        self._contents.keys.clear()
        return True


class IBuilderConfig:
    # fmt: off
    _stored = {
        "progress_monitor": None, "hardware_compatibility_level": None, "profiling_verbosity": None,
        "builder_optimization_level": 3, "default_device_type": None, "avg_timing_iterations": 1,
        "max_aux_streams": -1, "engine_capability": None, "int8_calibrator": None, "algorithm_selector": None,
        "plugins_to_serialize": [], "tiling_optimization_level": None, "runtime_platform": None,
    }
    # fmt: on

    def _setup(self, logger: Any) -> None:
        trt = self._trt
        self._logger = logger
        self._flags = {trt.BuilderFlag.TF32}
        self._pools: dict[Any, int] = {}
        self._profiles: list[Any] = []
        self._cache: Any = None
        self._previews: dict[Any, bool] = {}
        self._dla_core = -1
        self._values |= {
            "hardware_compatibility_level": trt.HardwareCompatibilityLevel.NONE,
            "profiling_verbosity": trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
            "default_device_type": trt.DeviceType.GPU,
            "engine_capability": trt.EngineCapability.STANDARD,
        }

    @property
    def flags(self) -> int:
        return sum(1 << int(flag) for flag in self._flags)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def DLA_core(self) -> int:
        return self._dla_core

    @DLA_core.setter
    def DLA_core(self, value: int) -> None:
        if 0 <= value < self._sim.device.dla_cores:
            self._dla_core = value
        else:
            text = f"DLA core {value} asked for, the device has {self._sim.device.dla_cores} DLA cores"
            self._sim.say(self._logger, "ERROR", f"IBuilderConfig::setDLACore: {text}")

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self._flags

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool] = pool_size

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools.get(pool, self._sim.device.memory_bytes)

    def get_tactic_sources(self) -> int:
        return sum(1 << int(source) for source in self._trt.TacticSource.__members__.values())

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        self._previews[feature] = enable

    def get_preview_feature(self, feature: Any) -> bool:
        return self._previews.get(feature, False)

    def get_quantization_flag(self, flag: Any) -> bool:
        return False

    def add_optimization_profile(self, profile: Any) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        data = bytes(memoryview(serialized_timing_cache))
        if not data:
            return make(self._trt.ITimingCache, self._sim.own_cache())
        try:
            return make(self._trt.ITimingCache, cache_from_bytes(data))
        except FormatError as error:
            self._sim.say(self._logger, "ERROR", f"IBuilderConfig::createTimingCache: invalid timing cache ({error})")
            return None

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        if cache is not None and not ignore_mismatch and not self._sim.owns_cache(cache._contents):
            text = "the timing cache was made by another TensorRT version or on another device"
            self._sim.say(self._logger, "WARNING", f"IBuilderConfig::setTimingCache: {text}")
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache


class Builder:
    _stored = {"max_threads": 1, "error_recorder": None}

    def _setup(self, logger: Any) -> None:
        self._logger = logger

    @property
    def logger(self) -> Any:
        return self._logger

    @property
    def num_DLA_cores(self) -> int:
        return int(self._sim.device.dla_cores)

    @property
    def max_DLA_batch_size(self) -> int:
        return 4096 if self._sim.device.dla_cores else 0

    @property
    def platform_has_fast_fp16(self) -> bool:
        return True

    @property
    def platform_has_fast_int8(self) -> bool:
        return True

    @property
    def platform_has_tf32(self) -> bool:
        return bool(self._sim.device.compute_capability >= (8, 0))

    def create_network(self, flags: int = 0) -> Any:
        known = sum(1 << int(flag) for flag in self._trt.NetworkDefinitionCreationFlag.__members__.values())
        if flags & ~known:
            self._sim.say(self._logger, "ERROR", f"IBuilder::createNetworkV2: unknown flags in {flags:#b}")
            return None
        return make(self._trt.INetworkDefinition, self, flags)

    def create_builder_config(self) -> Any:
        return make(self._trt.IBuilderConfig, self._logger)

    def create_optimization_profile(self) -> Any:
        return make(self._trt.IOptimizationProfile)

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        sim: Simulator = self._sim
        problem = sim.planted_build_error or _build_problem(sim, network, config)
        if problem is not None:
            sim.say(
                self._logger, "ERROR", f"IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error ({problem})"
            )
            return None
        for warning in sim.planted_build_warnings:
            sim.say(self._logger, "WARNING", warning)
        if not _build_steps(sim, network, config):
            text = "Error Code 1: build was cancelled by the progress monitor"
            sim.say(self._logger, "ERROR", f"IBuilder::buildSerializedNetwork: {text}")
            return None
        flags = {flag.name for flag in config._flags}
        header = EngineHeader(
            version=sim.version,
            compute_capability=sim.device.compute_capability,
            device_name=sim.device.name,
            hardware_level=config.hardware_compatibility_level.name,
            version_compatible="VERSION_COMPATIBLE" in flags,
            strongly_typed=network.get_flag(self._trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
            tf32="TF32" in flags,
            dla=config.default_device_type.name == "DLA",
            workspace_bytes=config.get_memory_pool_limit(self._trt.MemoryPoolType.WORKSPACE),
            profile={name: [list(shape) for shape in shapes] for name, shapes in _profile_of(network, config).items()},
        )
        return sim.host_memory(engine_to_bytes(header, network._onnx_bytes))


def _profile_of(network: Any, config: Any) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of every input; static inputs need none."""
    shapes = {}
    for value in graph_tensors(network._model)[0]:
        given = config._profiles[0]._shapes.get(value.name) if config._profiles else None
        shapes[value.name] = given or [dimensions(value)] * 3
    return shapes


def _build_problem(sim: "Simulator", network: Any, config: Any) -> str | None:
    """Why this network cannot be built so, or None."""
    flags = {flag.name for flag in config._flags}
    strongly_typed = network.get_flag(sim.tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if not network.num_outputs:
        return "Network must have at least one output"
    if network._parser() is None:
        sim.faults.append("a network is built after its parser, which owns the weights, is gone")
        return sim.faults[-1]
    if strongly_typed and (refused := flags & {*_PRECISION_FLAGS, *_CONSTRAINT_FLAGS}):
        return f"a strongly typed network does not take the precision flags {', '.join(sorted(refused))}"
    if not strongly_typed and (problem := _weak_typing_problem(network, flags)):
        return problem
    if config.hardware_compatibility_level.name != "NONE" and sim.device.compute_capability in _JETSONS:
        return "hardware compatibility is not supported on JetPack and DRIVE OS"
    if config.hardware_compatibility_level.name != "NONE" and sim.device.compute_capability < (8, 0):
        return "hardware compatibility needs compute capability 8.0 or later"
    if config.default_device_type.name == "DLA" and config._dla_core < 0:
        return "the default device type is DLA, but no DLA core is set"
    if config.default_device_type.name == "DLA" and "GPU_FALLBACK" not in flags:
        return "a layer cannot run on DLA, and GPU_FALLBACK is not set"
    if config.get_memory_pool_limit(sim.tensorrt.MemoryPoolType.WORKSPACE) < _SMALLEST_WORKSPACE:
        return "could not find any implementation for a node within the workspace"
    return _profile_problem(network, config)


def _weak_typing_problem(network: Any, flags: set[str]) -> str | None:
    operators = {node.op_type for node in network._model.graph.node}
    if "QuantizeLinear" in operators and "INT8" not in flags:
        return "the network has Q/DQ layers, but INT8 is not set"
    weights = network._model.graph.initializer
    if "FP16" not in flags and any(tensor.data_type == TensorProto.FLOAT16 for tensor in weights):
        return "the network has half-precision weights, but FP16 is not set"
    return None


def _profile_problem(network: Any, config: Any) -> str | None:
    inputs = {value.name: dimensions(value) for value in graph_tensors(network._model)[0]}
    if not config._profiles and any(-1 in shape for shape in inputs.values()):
        return "Network has dynamic inputs, but no optimization profile has been defined"
    for profile in config._profiles:
        for name in profile._shapes:
            if name not in inputs:
                return f"the optimization profile names {name!r}, which is no input"
        for name, wanted in inputs.items():
            given = profile._shapes.get(name)
            if given is None:
                if -1 in wanted:
                    return (
                        f"Input {name} has dynamic dimensions {wanted}, but the optimization profile does not have it"
                    )
                continue
            for shape in given:
                fits = len(shape) == len(wanted) and all(a in (b, -1) for a, b in zip(wanted, shape, strict=True))
                if not fits:
                    return f"the optimization profile has {shape} for {name}, which is {wanted}"
    return None


def _build_steps(sim: "Simulator", network: Any, config: Any) -> bool:
    """Time every layer that the cache does not know, with progress; False when cancelled."""
    keys = [f"{node.op_type}:{','.join(node.input)}" for node in network._model.graph.node]
    known = config._cache._contents.keys if config._cache is not None else set()
    missing = [key for key in keys if key not in known]
    sim.builds.append({"layers": len(keys), "timed": len(missing)})
    monitor = config.progress_monitor
    phases = [
        ("Building Engine", None, 3),
        ("Building engine from subgraph", "Building Engine", 2),
        ("Computing profile costs", "Building engine from subgraph", len(missing)),
    ]
    alive = True

    def step(phase: str, index: int) -> bool:
        return monitor is None or bool(monitor.step_complete(phase, index))

    for name, parent, steps in phases:
        if monitor is not None:
            monitor.phase_start(name, parent, steps)
    for index, key in enumerate(missing):
        sim.before_step(index)
        alive = alive and step("Computing profile costs", index)
        if not alive:
            break
        known.add(key)
    for name, _, steps in reversed(phases):
        if name != "Computing profile costs" and alive:
            for index in range(steps):
                alive = alive and step(name, index)
        if monitor is not None:
            monitor.phase_finish(name)
    return alive


class Runtime:
    _stored = {
        "engine_host_code_allowed": False,
        "max_threads": 1,
        "error_recorder": None,
        "DLA_core": 0,
        "temporary_directory": "/tmp",
    }

    def _setup(self, logger: Any) -> None:
        self._logger = logger

    @property
    def logger(self) -> Any:
        return self._logger

    @property
    def num_DLA_cores(self) -> int:
        return int(self._sim.device.dla_cores)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        data = bytes(memoryview(serialized_engine))
        try:
            header, onnx_bytes = engine_from_bytes(data)
        except FormatError as error:
            text = f"Error Code 1: Serialization (Serialization assertion failed: {error})"
            self._sim.say(self._logger, "ERROR", f"IRuntime::deserializeCudaEngine: {text}")
            return None
        problem = self._sim.engine_problem(header, host_code_allowed=self.engine_host_code_allowed)
        if problem is not None:
            self._sim.say(self._logger, "ERROR", f"IRuntime::deserializeCudaEngine: {problem}")
            return None
        if header.hardware_level == "NONE" and header.device_name != self._sim.device.name:
            text = "Using an engine plan file across different models of devices is not recommended"
            self._sim.say(self._logger, "WARNING", text)
        return make(self._trt.ICudaEngine, self._logger, header, onnx_bytes)


class ICudaEngine:
    _stored = {"error_recorder": None}

    def _setup(self, logger: Any, header: EngineHeader, onnx_bytes: bytes) -> None:
        self._logger, self._header, self._onnx_bytes = logger, header, onnx_bytes
        self._model = onnx.load_from_string(onnx_bytes)
        inputs, outputs = graph_tensors(self._model)
        self._inputs = {value.name: value for value in inputs}
        self._outputs = {value.name: value for value in outputs}
        self._tensors = self._inputs | self._outputs
        self._session: Any = None
        self._device = self._sim.device.current  # the engine lies there

    def _complain(self, text: str) -> None:
        self._sim.say(self._logger, "ERROR", text)

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import onnxruntime

        with self._sim.device.lock:
            if self._session is None:
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = 1
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
                options.log_severity_level = 4
                self._session = onnxruntime.InferenceSession(
                    self._onnx_bytes, options, providers=["CPUExecutionProvider"]
                )
            return dict(zip(self._outputs, self._session.run(list(self._outputs), feeds), strict=True))

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_layers(self) -> int:
        return len(self._model.graph.node)

    @property
    def num_optimization_profiles(self) -> int:
        return 1

    @property
    def num_aux_streams(self) -> int:
        return 0

    @property
    def name(self) -> str:
        return str(self._model.graph.name)

    @property
    def refittable(self) -> bool:
        return False

    @property
    def device_memory_size(self) -> int:
        return _SCRATCH_BYTES

    @property
    def device_memory_size_v2(self) -> int:
        return _SCRATCH_BYTES

    @property
    def hardware_compatibility_level(self) -> Any:
        return getattr(self._trt.HardwareCompatibilityLevel, self._header.hardware_level)

    def __getitem__(self, arg0: int) -> str:
        return list(self._tensors)[arg0]

    def get_tensor_name(self, index: int) -> Any:
        names = list(self._tensors)
        if not 0 <= index < len(names):
            self._complain(f"ICudaEngine::getIOTensorName: index {index} is out of range")
            return None
        return names[index]

    def get_tensor_mode(self, name: str) -> Any:
        mode = "INPUT" if name in self._inputs else "OUTPUT" if name in self._outputs else "NONE"
        if mode == "NONE":
            self._complain(f"ICudaEngine::getTensorIOMode: no tensor {name!r}")
        return getattr(self._trt.TensorIOMode, mode)

    def get_tensor_dtype(self, name: str) -> Any:
        if name not in self._tensors:
            self._complain(f"ICudaEngine::getTensorDataType: no tensor {name!r}")
            return self._trt.DataType.FLOAT
        return getattr(self._trt.DataType, _DATA_TYPES[self._tensors[name].type.tensor_type.elem_type])

    def get_tensor_shape(self, name: str) -> Any:
        if name not in self._tensors:
            self._complain(f"ICudaEngine::getTensorShape: no tensor {name!r}")
            return self._trt.Dims()
        return self._trt.Dims(dimensions(self._tensors[name]))

    def get_tensor_location(self, name: str) -> Any:
        return self._trt.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
        if name not in self._inputs or profile_index != 0:
            self._complain(f"ICudaEngine::getProfileShape: no input {name!r} in profile {profile_index}")
            return []
        return [self._trt.Dims(shape) for shape in self._header.profile[name]]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return _SCRATCH_BYTES

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def serialize(self) -> Any:
        return self._sim.host_memory(engine_to_bytes(self._header, self._onnx_bytes))

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> Any:
        device = self._sim.device
        if device.current != self._device:
            device.faults.append(f"a context is made on device {device.current}, its engine lies on {self._device}")
        if strategy == self._trt.ExecutionContextAllocationStrategy.USER_MANAGED:
            context = make(self._trt.IExecutionContext, self, user_managed=True)
            self._sim.contexts.add(context)
            return context
        with device.lock:
            address = device.allocate("context", _SCRATCH_BYTES) if device.used_bytes() < device.memory_bytes else None
        if address is None:
            self._complain("ICudaEngine::createExecutionContext: out of memory")
            return None
        context = make(self._trt.IExecutionContext, self, user_managed=False)
        self._sim.contexts.add(context)
        weakref.finalize(context, device.release, "context", address)
        return context


class IExecutionContext:
    _stored = {"name": "", "error_recorder": None, "enqueue_emits_profile": True, "debug_sync": False}

    def _setup(self, engine: Any, *, user_managed: bool) -> None:
        self._engine, self._user_managed = engine, user_managed
        self._memory = 0  # of the caller's, for activations
        self._shapes = {name: dimensions(value) for name, value in engine._inputs.items()}
        self._addresses: dict[str, int] = {}
        self._enqueueing = threading.Lock()
        self._settled: dict[str, tuple[int, ...]] | None = None  # shapes of the last enqueue outside a capture
        self._pending: tuple[int, Any, int] | None = None  # stream handle, stream, ticket
        self._output_cache: dict[Any, dict[str, tuple[int, ...]]] = {}

    def _complain(self, text: str) -> None:
        self._engine._complain(f"IExecutionContext::{text}")

    @property
    def engine(self) -> Any:
        return self._engine

    @property
    def active_optimization_profile(self) -> int:
        return 0

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self._missing()

    def _missing(self) -> list[str]:
        return [name for name, shape in self._shapes.items() if -1 in shape]

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if profile_index != 0:
            self._complain(f"setOptimizationProfileAsync: no profile {profile_index}")
        return profile_index == 0

    def set_input_shape(self, name: str, shape: Any) -> bool:
        wanted = tuple(int(size) for size in shape)
        if name not in self._engine._inputs:
            self._complain(f"setInputShape: no input {name!r}")
            return False
        low, _, high = self._engine._header.profile[name]
        if len(wanted) != len(low):
            self._complain(f"setInputShape: {name} has {len(low)} dimensions, found {len(wanted)}")
            return False
        for index, (size, least, most) in enumerate(zip(wanted, low, high, strict=True)):
            if not least <= size <= most:
                text = f"{wanted} for {name} does not satisfy the profile: dimension {index} is in [{least}, {most}]"
                self._complain(f"setInputShape: {text}")
                return False
        self._shapes[name] = wanted
        return True

    def get_tensor_shape(self, name: str) -> Any:
        if name in self._shapes:
            return self._trt.Dims(self._shapes[name])
        if name not in self._engine._outputs:
            self._complain(f"getTensorShape: no tensor {name!r}")
            return self._trt.Dims()
        if self._missing():
            return self._trt.Dims(dimensions(self._engine._outputs[name]))
        return self._trt.Dims(self._output_shapes()[name])

    def get_tensor_strides(self, name: str) -> Any:
        shape = tuple(self.get_tensor_shape(name))
        return self._trt.Dims([math.prod(shape[index + 1 :]) for index in range(len(shape))])

    def get_max_output_size(self, name: str) -> int:
        high = {input_name: tuple(shapes[2]) for input_name, shapes in self._engine._header.profile.items()}
        kind = _NUMPY_TYPES[self._engine.get_tensor_dtype(name).name]
        return math.prod(self._shapes_for(high)[name]) * np.dtype(kind).itemsize

    def infer_shapes(self) -> list[str]:
        return self._missing()

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors:
            self._complain(f"setTensorAddress: no tensor {name!r}")
            return False
        if memory % ALIGNMENT:
            self._complain(f"setTensorAddress: {memory:#x} for {name} is not aligned to {ALIGNMENT} bytes")
            return False
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        if not self._user_managed:
            self._complain("setDeviceMemoryV2: this context has memory of its own")
        elif memory % ALIGNMENT:
            self._complain(f"setDeviceMemoryV2: {memory:#x} is not aligned to {ALIGNMENT} bytes")
        elif size < self._engine.device_memory_size_v2:
            self._complain(f"setDeviceMemoryV2: {size} bytes, but {self._engine.device_memory_size_v2} are needed")
        else:
            self._memory = memory

    def _has_memory(self) -> bool:
        room = self._engine._sim.device.room
        return not self._user_managed or room(self._memory, self._engine.device_memory_size_v2, "device")

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes_for(self._shapes)

    def _shapes_for(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        key = tuple(sorted(shapes.items()))
        if key not in self._output_cache:
            self._output_cache[key] = _output_shapes(self._engine, shapes)
        return self._output_cache[key]

    def _buffers(self) -> dict[str, tuple[int, tuple[int, ...], Any]] | None:
        """name -> (address, shape, dtype) of every tensor, or None (said in the log) when one does not fit."""
        device, engine = self._engine._sim.device, self._engine
        if missing := self._missing():
            self._complain(f"enqueueV3: the shape of {', '.join(missing)} is not set")
            return None
        shapes = self._shapes | self._output_shapes()
        buffers = {}
        for name in engine._tensors:
            address = self._addresses.get(name, 0)
            kind = np.dtype(_NUMPY_TYPES[engine.get_tensor_dtype(name).name])
            size = math.prod(shapes[name]) * kind.itemsize
            if not address:
                self._complain(f"enqueueV3: the address of {name} is not set")
                return None
            if not device.room(address, size, "device"):
                self._complain(f"enqueueV3: {name} takes {size} bytes, which {address:#x} has not")
                return None
            buffers[name] = (address, shapes[name], kind)
        return buffers

    def execute_async_v3(self, stream_handle: int) -> bool:
        device = self._engine._sim.device
        if not self._enqueueing.acquire(blocking=False):
            self._report("two threads enqueue one execution context at the same time")
            return False
        try:
            with device.lock:
                return self._enqueue(int(stream_handle))
        finally:
            self._enqueueing.release()

    def _memory_devices(self) -> set[int]:
        """Numbers of the devices on which the caller's memory lies."""
        device = self._engine._sim.device
        found = [device.find(address) for address in (self._memory, *self._addresses.values())]
        return {one.device for one in found if one is not None}

    def _report(self, text: str) -> None:
        """TensorRT leaves this undefined; the simulator refuses it and remembers it."""
        self._engine._sim.device.faults.append(text)
        self._complain(f"enqueueV3: {text}")

    def _enqueue(self, handle: int) -> bool:
        device = self._engine._sim.device
        stream = device.streams.get(handle)
        if stream is None:
            self._complain(f"enqueueV3: no stream {handle:#x}")
            return False
        places = {self._engine._device, stream.device, device.current, *self._memory_devices()}
        if len(places) > 1:
            self._report("engine, stream, memory and the thread's current device are not on one device")
            return False
        if self._pending is not None:
            before, other, ticket = self._pending
            if before != handle and other.done < ticket and before in device.streams:
                self._report("one execution context is enqueued on a second stream while it still runs on a first")
                return False
        buffers = self._buffers()
        if buffers is None:
            return False
        if not self._has_memory():
            self._complain("enqueueV3: the context has no memory for activations: setDeviceMemoryV2 was not called")
            return False
        if device.broken != cudaError_t.cudaSuccess:
            self._complain(f"enqueueV3: Cuda Runtime ({device.broken.name})")
            return False
        if stream.capture is None:
            self._settled = dict(self._shapes)
        elif self._settled != self._shapes:
            # TensorRT: "call enqueueV3() once after an input shape change to update internal state", then capture.
            stream.capture.valid = False
            self._complain("enqueueV3: captured before it ran once with these shapes (deferred update in a capture)")
            return False
        reference = weakref.ref(self)

        def work() -> None:
            context = reference()
            if context is None:
                raise DeviceFaultError("work of an execution context runs after the context is gone")
            context._execute(buffers)

        device.enqueue(stream, work)
        device.calls["enqueue"] += 1
        if stream.capture is None:
            self._pending = (handle, stream, stream.queued)
        return True

    def _execute(self, buffers: dict[str, tuple[int, tuple[int, ...], Any]]) -> None:
        engine, device = self._engine, self._engine._sim.device
        if not self._has_memory():
            raise DeviceFaultError("the engine works in activation memory that was freed")
        arrays = {}
        for name, (address, shape, kind) in buffers.items():
            size = math.prod(shape) * kind.itemsize
            if not device.room(address, size, "device"):
                raise DeviceFaultError(f"the engine touches the memory of {name}, which was freed")
            if size == 0:
                arrays[name] = np.empty(shape, kind)
                continue
            memory = (ctypes.c_ubyte * size).from_address(address)
            arrays[name] = np.frombuffer(memory, kind).reshape(shape)
        results = engine._run({name: arrays[name].copy() for name in engine._inputs})
        for name, result in results.items():
            arrays[name][...] = result


def _output_shapes(engine: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs, from the names of dynamic axes where these say it, else by running zeros."""
    sizes: dict[str, int] = {}
    for name, value in engine._inputs.items():
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[name], strict=True):
            if re.fullmatch(r"[A-Za-z_]\w*", dim.dim_param):
                sizes[dim.dim_param] = size
    found: dict[str, tuple[int, ...]] = {}
    for name, value in engine._outputs.items():
        dims = value.type.tensor_type.shape.dim
        known = [_evaluate(d.dim_param, sizes) if d.dim_param else d.dim_value for d in dims]
        if None in known or (dims and 0 in known):
            break
        found[name] = tuple(int(size) for size in known if size is not None)
    if len(found) < len(engine._outputs):
        kinds = {name: np.dtype(_NUMPY_TYPES[engine.get_tensor_dtype(name).name]) for name in engine._inputs}
        results = engine._run({name: np.zeros(shapes[name], kinds[name]) for name in engine._inputs})
        found = {name: result.shape for name, result in results.items()}
    return found


def _evaluate(expression: str, sizes: dict[str, int]) -> int | None:
    """The value of "4*h" and the like; None where a name is not known."""
    parts = [part.strip() for part in expression.split("*")]
    values = [int(part) if part.isdigit() else sizes.get(part) for part in parts]
    return None if None in values else math.prod(value for value in values if value is not None)


# fmt: off
CLASSES: tuple[type, ...] = (
    ILogger, Logger, Dims, IProgressMonitor, ITensor, ILayer, INetworkDefinition, ParserError, OnnxParser,
    IOptimizationProfile, ITimingCache, IBuilderConfig, Builder, Runtime, ICudaEngine, IExecutionContext,
)
# fmt: on
