"""The rules that the simulator enforces: each is broken here once, and the simulator tells."""

import ctypes
import hashlib
import math
import threading
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

VERSIONS = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")
ORIN = {"compute_capability": (8, 7), "device_name": "Orin"}
THOR = {"compute_capability": (11, 0), "device_name": "Thor"}
H100 = {"compute_capability": (9, 0), "device_name": "NVIDIA H100"}
A100 = {"compute_capability": (8, 0), "device_name": "NVIDIA A100"}
Install = Callable[..., Any]
Profile = dict[str, tuple[Any, Any, Any]]


def graph(*nodes: Any, inputs: dict[str, Any], outputs: dict[str, Any], weights: dict[str, Any] | None = None) -> bytes:
    """A serialised model; inputs and outputs are name -> (type, shape)."""
    values = [
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in group.items()]
        for group in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()]
    made = helper.make_graph(list(nodes), "g", *values, tensors)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return bytes(model.SerializeToString())


REAL = (TensorProto.FLOAT, ["batch", 4])
DOUBLED = graph(
    helper.make_node("Mul", ["x", "two"], ["y"], name="doubling"),
    inputs={"x": REAL},
    outputs={"y": REAL},
    weights={"two": np.float32(2)},
)
X: Profile = {"x": ((1, 4), (2, 4), (8, 4))}


def builder_of(simulator: Any) -> Any:
    trt = simulator.tensorrt
    return trt.Builder(trt.Logger(trt.Logger.VERBOSE))


def parsed(simulator: Any, onnx_bytes: bytes, *, strongly_typed: bool = True) -> tuple[Any, Any, Any]:
    """builder, network, parser"""
    trt, builder = simulator.tensorrt, builder_of(simulator)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if strongly_typed else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, builder.logger)
    parser.parse(onnx_bytes)
    return builder, network, parser


def plan_of(
    simulator: Any,
    onnx_bytes: bytes = DOUBLED,
    profile: Profile = X,
    *,
    strongly_typed: bool = True,
    configure: Callable[[Any, Any], None] = lambda trt, config: None,
) -> bytes | None:
    builder, network, parser = parsed(simulator, onnx_bytes, strongly_typed=strongly_typed)
    assert not parser.num_errors, parser.get_error(0)
    config = builder.create_builder_config()
    configure(simulator.tensorrt, config)
    if profile:
        shapes = builder.create_optimization_profile()
        for name, (low, usual, high) in profile.items():
            shapes.set_shape(name, low, usual, high)
        config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(plan)


def loaded(simulator: Any, plan: bytes | None, *, host_code: bool = False) -> Any:
    assert plan is not None, simulator.log
    runtime = simulator.tensorrt.Runtime(simulator.tensorrt.Logger())
    runtime.engine_host_code_allowed = host_code
    return runtime.deserialize_cuda_engine(plan)


def ready(simulator: Any, shape: tuple[int, ...] = (2, 4)) -> SimpleNamespace:
    """A context of DOUBLED with its shape and addresses set, a stream, and pinned memory to copy from and to."""
    cudart = simulator.cudart
    context = loaded(simulator, plan_of(simulator)).create_execution_context()
    size = math.prod(shape) * 4
    stream = cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking)[1]
    device = {name: cudart.cudaMalloc(size)[1] for name in ("x", "y")}
    pinned = {name: cudart.cudaHostAlloc(size, 0)[1] for name in ("x", "y")}
    arrays = {name: np.frombuffer(_bytes_at(pinned[name], size), np.float32).reshape(shape) for name in pinned}
    arrays["x"][...] = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    assert context.set_input_shape("x", shape)
    for name, address in device.items():
        assert context.set_tensor_address(name, address)
    kinds = cudart.cudaMemcpyKind
    return SimpleNamespace(
        context=context,
        cudart=cudart,
        stream=stream,
        device=device,
        pinned=pinned,
        arrays=arrays,
        size=size,
        upload=lambda: cudart.cudaMemcpyAsync(device["x"], pinned["x"], size, kinds.cudaMemcpyHostToDevice, stream)[0],
        download=lambda: cudart.cudaMemcpyAsync(pinned["y"], device["y"], size, kinds.cudaMemcpyDeviceToHost, stream)[
            0
        ],
        enqueue=lambda: context.execute_async_v3(int(stream)),
        synchronize=lambda: cudart.cudaStreamSynchronize(stream)[0],
    )


def _bytes_at(address: int, size: int) -> Any:
    return (ctypes.c_ubyte * size).from_address(address)


# building


@pytest.mark.parametrize("version", VERSIONS)
def test_a_dynamic_input_needs_a_profile(tensorrt_simulator: Install, version: str) -> None:
    simulator = tensorrt_simulator(version)
    assert plan_of(simulator, profile={}) is None
    assert "no optimization profile has been defined" in simulator.errors()[-1]


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"z": ((1, 4), (1, 4), (1, 4))}, "names 'z', which is no input"),
        ({"x": ((1, 5), (1, 5), (1, 5))}, r"has (1, 5) for x, which is (-1, 4)"),
        ({"x": ((1,), (1,), (1,))}, "has (1,) for x"),
    ],
)
def test_profiles_that_do_not_fit_the_network(tensorrt_simulator: Install, profile: Profile, message: str) -> None:
    simulator = tensorrt_simulator()
    assert plan_of(simulator, profile=profile) is None
    assert message in simulator.errors()[-1]


def test_the_parser_outlives_the_build(tensorrt_simulator: Install) -> None:
    """It owns the weights: TensorRT would read memory that is gone."""
    simulator = tensorrt_simulator()
    builder, network, parser = parsed(simulator, DOUBLED)
    del parser
    assert builder.build_serialized_network(network, builder.create_builder_config()) is None
    assert simulator.faults == ["a network is built after its parser, which owns the weights, is gone"]
    simulator.faults.clear()


def test_shapes_of_a_profile_grow(tensorrt_simulator: Install) -> None:
    profile = builder_of(tensorrt_simulator()).create_optimization_profile()
    with pytest.raises(ValueError, match="inconsistent"):
        profile.set_shape("x", (2, 4), (1, 4), (8, 4))


@pytest.mark.parametrize("version", VERSIONS[:3])
@pytest.mark.parametrize("flag", ["FP16", "BF16", "INT8", "PREFER_PRECISION_CONSTRAINTS"])
def test_strongly_typed_networks_refuse_precision_flags(tensorrt_simulator: Install, version: str, flag: str) -> None:
    simulator = tensorrt_simulator(version)
    plan = plan_of(simulator, configure=lambda trt, config: config.set_flag(getattr(trt.BuilderFlag, flag)))
    assert plan is None
    assert f"does not take the precision flags {flag}" in simulator.errors()[-1]
    weakly = plan_of(
        simulator,
        strongly_typed=False,
        configure=lambda trt, config: config.set_flag(getattr(trt.BuilderFlag, flag)),
    )
    assert weakly is not None


HALF = (TensorProto.FLOAT16, ["batch", 4])
HALVES = graph(
    helper.make_node("Mul", ["x", "two"], ["y"]),
    inputs={"x": HALF},
    outputs={"y": HALF},
    weights={"two": np.float16(2)},
)


def test_weakly_typed_networks_need_them(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator("10.3.0")
    assert plan_of(simulator, HALVES, strongly_typed=False) is None
    assert "FP16 is not set" in simulator.errors()[-1]
    assert plan_of(simulator, HALVES) is not None
    assert plan_of(tensorrt_simulator("11.4.0.106"), HALVES, strongly_typed=False) is not None  # typed all the same


@pytest.mark.parametrize(
    ("machine", "problem"), [(ORIN, "not supported on JetPack"), (THOR, "not supported on JetPack"), (H100, "")]
)
def test_hardware_compatibility_is_for_servers(
    tensorrt_simulator: Install, machine: dict[str, Any], problem: str
) -> None:
    simulator = tensorrt_simulator("10.13.3.9", **machine)
    plan = plan_of(simulator, configure=_hardware_compatible)
    assert (plan is None) == bool(problem)
    assert not problem or problem in simulator.errors()[-1]


def _hardware_compatible(trt: Any, config: Any) -> None:
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _version_compatible(trt: Any, config: Any) -> None:
    config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)


def test_a_tiny_workspace_fails(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator()
    limit = 1 << 10
    assert (
        plan_of(
            simulator,
            configure=lambda trt, config: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit),
        )
        is None
    )
    assert "could not find any implementation" in simulator.errors()[-1]


def test_a_dla_core_that_is_not_there_is_not_set(tensorrt_simulator: Install) -> None:
    for machine, cores in ((ORIN, 2), (THOR, 0)):
        simulator = tensorrt_simulator(**machine)
        config = builder_of(simulator).create_builder_config()
        assert builder_of(simulator).num_DLA_cores == cores
        config.DLA_core = 0
        assert config.DLA_core == (0 if cores else -1)


# reading graphs


MIXED = graph(
    helper.make_node("Mul", ["x", "two"], ["y"], name="mixing"),
    inputs={"x": REAL},
    outputs={"y": REAL},
    weights={"two": np.float16(2)},
)


@pytest.mark.parametrize("version", VERSIONS)
def test_mixed_types_are_refused(tensorrt_simulator: Install, version: str) -> None:
    simulator = tensorrt_simulator(version)
    _, network, parser = parsed(simulator, MIXED)
    assert parser.num_errors == 1
    assert "mixing" in str(parser.get_error(0)) or "inference fails" in str(parser.get_error(0))
    assert network.num_outputs == 0
    assert simulator.errors()


def test_a_parser_error_says_where(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator()
    onnx_bytes = graph(
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("Det", ["h"], ["y"], name="determinant"),
        inputs={"x": REAL},
        outputs={"y": REAL},
    )
    _, _, parser = parsed(simulator, onnx_bytes)
    error = parser.get_error(0)
    assert (error.node(), error.node_name(), error.node_operator()) == (1, "determinant", "Det")
    assert parser.num_errors == 1
    assert error.code() == simulator.tensorrt.ErrorCode.UNSUPPORTED_NODE
    assert "In node 1 with name: determinant and operator: Det" in str(error)


def test_a_network_shows_inputs_outputs_and_layers(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator()
    trt = simulator.tensorrt
    _, network, _ = parsed(simulator, DOUBLED)
    tensor = network.get_input(0)
    assert (tensor.name, tensor.dtype, tensor.shape) == ("x", trt.DataType.FLOAT, (-1, 4))
    assert (network.num_inputs, network.num_outputs, network.get_input(1)) == (1, 1, None)
    assert [layer.name for layer in network] == ["doubling"]


# engines


@pytest.mark.parametrize("built", VERSIONS)
@pytest.mark.parametrize("run", VERSIONS)
@pytest.mark.parametrize("compatible", [False, True])
def test_an_engine_runs_on_its_version_or_if_compatible_on_later_ones(
    tensorrt_simulator: Install, built: str, run: str, compatible: bool
) -> None:
    configure = _version_compatible if compatible else (lambda trt, config: None)
    plan = plan_of(tensorrt_simulator(built), configure=configure)
    there = tensorrt_simulator(run)
    later = VERSIONS.index(run) >= VERSIONS.index(built)
    fits = later if compatible else run == built
    assert (loaded(there, plan, host_code=compatible) is not None) == fits
    assert fits or "Version tag does not match" in there.errors()[-1]


def test_a_version_compatible_engine_needs_host_code(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator()
    plan = plan_of(simulator, configure=_version_compatible)
    assert loaded(simulator, plan) is None
    assert "engine_host_code_allowed" in simulator.errors()[-1]
    assert loaded(simulator, plan, host_code=True) is not None


@pytest.mark.parametrize(
    ("built", "run", "compatible", "fits"),
    [
        (ORIN, THOR, False, False),
        (H100, A100, False, False),
        (H100, A100, True, True),
        (A100, H100, True, True),
        (A100, {"compute_capability": (7, 5), "device_name": "NVIDIA T4"}, True, False),
    ],
)
def test_an_engine_fits_one_compute_capability(
    tensorrt_simulator: Install, built: dict[str, Any], run: dict[str, Any], compatible: bool, fits: bool
) -> None:
    configure = _hardware_compatible if compatible else (lambda trt, config: None)
    plan = plan_of(tensorrt_simulator("11.4.0.106", **built), configure=configure)
    there = tensorrt_simulator("11.4.0.106", **run)
    assert (loaded(there, plan) is not None) == fits
    assert fits or "incompatible device, expecting compute" in there.errors()[-1]


def test_another_device_of_the_same_kind_is_warned_of(tensorrt_simulator: Install) -> None:
    plan = plan_of(tensorrt_simulator(**A100))
    there = tensorrt_simulator(compute_capability=(8, 0), device_name="NVIDIA A30")
    assert loaded(there, plan) is not None
    assert [message for severity, message in there.log if severity == "WARNING"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_damaged_engines_are_refused(tensorrt_simulator: Install, damage: str) -> None:
    simulator = tensorrt_simulator()
    plan = plan_of(simulator)
    assert plan is not None
    flipped = bytearray(plan)
    flipped[len(plan) // 2] ^= 1
    damaged = {"cut": plan[:-7], "flipped": bytes(flipped), "empty": b"", "other": b"no engine"}[damage]
    assert loaded(simulator, damaged) is None
    assert "Serialization" in simulator.errors()[-1]


def test_an_engine_shows_its_tensors(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator()
    trt, engine = simulator.tensorrt, loaded(simulator, plan_of(simulator))
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    assert names == ["x", "y"]
    assert [engine.get_tensor_mode(name) for name in names] == [trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT]
    assert engine.get_tensor_mode("z") == trt.TensorIOMode.NONE
    assert engine.get_tensor_dtype("x") == trt.DataType.FLOAT
    assert tuple(engine.get_tensor_shape("y")) == (-1, 4)
    assert [tuple(shape) for shape in engine.get_tensor_profile_shape("x", 0)] == [(1, 4), (2, 4), (8, 4)]
    assert engine.get_tensor_profile_shape("y", 0) == []
    again = loaded(simulator, bytes(engine.serialize()))
    assert again.num_io_tensors == 2


# running


@pytest.mark.parametrize("version", VERSIONS)
def test_work_is_done_when_it_is_waited_for(tensorrt_simulator: Install, version: str) -> None:
    run = ready(tensorrt_simulator(version))
    assert run.upload() == 0
    assert run.enqueue()
    assert run.download() == 0
    assert not np.array_equal(run.arrays["y"], 2 * run.arrays["x"])  # nothing ran yet: a missing synchronise shows
    assert run.synchronize() == 0
    np.testing.assert_array_equal(run.arrays["y"], 2 * run.arrays["x"])


def test_shapes_outside_the_profile(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator()
    context = ready(simulator).context
    assert context.set_input_shape("x", (8, 4))
    for wrong in ((9, 4), (0, 4), (2, 5), (2,), (2, 4, 1)):
        assert not context.set_input_shape("x", wrong)
    assert not context.set_input_shape("z", (2, 4))
    assert tuple(context.get_tensor_shape("x")) == (8, 4)
    assert tuple(context.get_tensor_shape("y")) == (8, 4)


def test_everything_is_set_before_enqueueing(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator()
    cudart = simulator.cudart
    context = loaded(simulator, plan_of(simulator)).create_execution_context()
    assert context.infer_shapes() == ["x"]
    assert not context.all_binding_shapes_specified
    assert not context.execute_async_v3(0)
    assert "shape of x is not set" in simulator.errors()[-1]
    context.set_input_shape("x", (2, 4))
    assert context.infer_shapes() == []
    _, small = cudart.cudaMalloc(16)
    _, large = cudart.cudaMalloc(32)
    context.set_tensor_address("x", large)
    assert not context.execute_async_v3(0)
    assert "address of y is not set" in simulator.errors()[-1]
    context.set_tensor_address("y", small)
    assert not context.execute_async_v3(0)
    assert "y takes 32 bytes" in simulator.errors()[-1]
    assert not context.set_tensor_address("y", large + 4)
    assert "not aligned" in simulator.errors()[-1]
    assert not context.set_tensor_address("z", large)
    _, pinned = cudart.cudaHostAlloc(64, 0)
    context.set_tensor_address("y", pinned)
    assert not context.execute_async_v3(0)
    context.set_tensor_address("y", large)
    assert context.execute_async_v3(0)
    assert not context.execute_async_v3(12345)
    assert "no stream" in simulator.errors()[-1]


def test_freed_memory_is_refused(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator()
    run = ready(simulator)
    run.cudart.cudaFree(run.device["y"])
    assert not run.enqueue()
    assert run.cudart.cudaFree(run.device["y"]) == (1,)
    assert run.download() == run.cudart.cudaError_t.cudaErrorInvalidValue


def test_a_context_without_memory_of_its_own_needs_some(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator()
    run = ready(simulator)
    engine, handle = run.context.engine, int(run.stream)
    managed = engine.create_execution_context(simulator.tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED)
    managed.set_input_shape("x", (2, 4))
    for name in ("x", "y"):
        managed.set_tensor_address(name, run.context.get_tensor_address(name))
    size = engine.device_memory_size_v2
    _, scratch = run.cudart.cudaMalloc(size + 256)
    for memory, offered, message in (
        (0, size, "has no memory for activations"),
        (scratch + 8, size, "has no memory for activations"),  # not aligned: not taken
        (scratch, size - 1, "has no memory for activations"),  # too small: not taken
    ):
        managed.set_device_memory(memory, offered)
        assert not managed.execute_async_v3(handle)
        assert message in simulator.errors()[-1]
    managed.set_device_memory(scratch, size)
    assert managed.execute_async_v3(handle)
    run.cudart.cudaStreamSynchronize(run.stream)
    run.cudart.cudaFree(scratch)
    assert not managed.execute_async_v3(handle)
    run.context.set_device_memory(scratch, size)
    assert "has memory of its own" in simulator.errors()[-1]


def test_one_context_on_two_streams_at_once(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator()
    run = ready(simulator)
    _, other = run.cudart.cudaStreamCreate()
    assert run.enqueue()
    assert not run.context.execute_async_v3(int(other))
    assert simulator.faults == ["one execution context is enqueued on a second stream while it still runs on a first"]
    simulator.faults.clear()
    run.synchronize()
    assert run.context.execute_async_v3(int(other))


def test_one_context_in_two_threads_at_once(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator()
    run = ready(simulator)
    results: list[bool] = []
    with simulator.device.lock:  # both threads are inside at once
        threads = [threading.Thread(target=lambda: results.append(run.enqueue())) for _ in range(2)]
        for thread in threads:
            thread.start()
        while not results:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert sorted(results) == [False, True]
    assert simulator.faults == ["two threads enqueue one execution context at the same time"]
    simulator.faults.clear()


# the CUDA runtime


def test_copies_of_pageable_memory_do_as_cuda_says(tensorrt_simulator: Install) -> None:
    cudart = tensorrt_simulator().cudart
    kinds, source, target = cudart.cudaMemcpyKind, np.arange(8, dtype=np.uint8), np.zeros(8, np.uint8)
    _, device = cudart.cudaMalloc(8)
    assert cudart.cudaMemcpyAsync(device, source, 8, kinds.cudaMemcpyHostToDevice, 0) == (0,)
    source[:] = 99  # read at once, so this does not count
    assert cudart.cudaMemcpyAsync(target.ctypes.data, device, 8, kinds.cudaMemcpyDefault, 0) == (0,)
    assert target.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("target", "source", "size", "kind"),
    [
        ("device", "host", 9, "HostToDevice"),
        ("device", "host", 8, "DeviceToHost"),
        ("device", "host", 8, "DeviceToDevice"),
        ("host", "device", 8, "HostToDevice"),
        ("null", "host", 8, "HostToDevice"),
    ],
)
def test_copies_that_cannot_be(tensorrt_simulator: Install, target: str, source: str, size: int, kind: str) -> None:
    cudart = tensorrt_simulator().cudart
    places = {"device": cudart.cudaMalloc(8)[1], "host": cudart.cudaHostAlloc(16, 0)[1], "null": 0}
    chosen = getattr(cudart.cudaMemcpyKind, f"cudaMemcpy{kind}")
    assert cudart.cudaMemcpyAsync(places[target], places[source], size, chosen, 0) == (1,)
    with pytest.raises(TypeError):
        cudart.cudaMemcpyAsync(places["device"], places["host"], 8, 1, 0)


def test_memory_runs_out_and_leaks_are_told(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator(memory_bytes=1000)
    cudart = simulator.cudart
    _, first = cudart.cudaMalloc(600)
    assert cudart.cudaMalloc(600) == (cudart.cudaError_t.cudaErrorMemoryAllocation, None)
    assert cudart.cudaMemGetInfo() == (0, 400, 1000)
    _, stream = cudart.cudaStreamCreate()
    assert simulator.leaks() == [f"device memory, 600 bytes at {first:#x}", f"stream {int(stream):#x}"]
    cudart.cudaFree(first)
    cudart.cudaStreamDestroy(stream)
    assert simulator.leaks() == []


def test_a_captured_graph_replays(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator()
    run = ready(simulator)
    mode = run.cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    assert run.enqueue()
    run.synchronize()
    assert run.cudart.cudaStreamBeginCapture(run.stream, mode) == (0,)
    assert (run.upload(), run.enqueue(), run.download()) == (0, True, 0)
    _, graph = run.cudart.cudaStreamEndCapture(run.stream)
    _, executable = run.cudart.cudaGraphInstantiate(graph, 0)
    run.cudart.cudaGraphDestroy(graph)
    run.synchronize()
    assert not np.array_equal(run.arrays["y"], 2 * run.arrays["x"])  # recorded, not run
    for value in (3, 7):
        run.arrays["x"][...] = value
        run.cudart.cudaGraphLaunch(executable, run.stream)
        assert run.synchronize() == 0
        assert (run.arrays["y"] == 2 * value).all()
    assert [line for line in simulator.leaks() if line.startswith("graph exec")]
    run.context = None
    del run.enqueue
    run.cudart.cudaGraphLaunch(executable, run.stream)
    assert run.synchronize() == run.cudart.cudaError_t.cudaErrorIllegalAddress
    assert simulator.faults == ["work of an execution context runs after the context is gone"]
    simulator.faults.clear()


def test_capture_wants_one_enqueue_before(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator()
    run = ready(simulator)
    mode = run.cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    run.cudart.cudaStreamBeginCapture(run.stream, mode)
    assert not run.enqueue()
    assert "captured before it ran once" in simulator.errors()[-1]
    assert run.cudart.cudaStreamEndCapture(run.stream) == (901, None)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda run: run.synchronize(), "cudaErrorStreamCaptureUnsupported"),
        (lambda run: run.cudart.cudaStreamQuery(run.stream)[0], "cudaErrorStreamCaptureUnsupported"),
        (lambda run: run.cudart.cudaDeviceSynchronize()[0], "cudaErrorStreamCaptureUnsupported"),
        (lambda run: run.cudart.cudaMalloc(8)[0], "cudaErrorStreamCaptureUnsupported"),
        (lambda run: run.cudart.cudaFree(run.device["x"])[0], "cudaErrorStreamCaptureUnsupported"),
        (
            lambda run: run.cudart.cudaMemcpy(
                run.device["x"], run.pinned["x"], 4, run.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
            )[0],
            "cudaErrorStreamCaptureImplicit",
        ),
    ],
)
def test_what_breaks_a_capture(tensorrt_simulator: Install, call: Callable[[Any], Any], error: str) -> None:
    run = ready(tensorrt_simulator())
    errors = run.cudart.cudaError_t
    run.cudart.cudaStreamBeginCapture(run.stream, run.cudart.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal)
    assert call(run) == getattr(errors, error)
    assert run.upload() == errors.cudaErrorStreamCaptureInvalidated
    assert run.cudart.cudaStreamEndCapture(run.stream) == (errors.cudaErrorStreamCaptureInvalidated, None)
    assert run.upload() == 0


def test_a_thread_local_capture_leaves_other_threads_alone(tensorrt_simulator: Install) -> None:
    run = ready(tensorrt_simulator())
    mode = run.cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    run.cudart.cudaStreamBeginCapture(run.stream, mode)
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.extend([run.cudart.cudaMalloc(8)[0], run.cudart.cudaStreamEndCapture(run.stream)[0]])
    )
    thread.start()
    thread.join()
    assert results == [0, run.cudart.cudaError_t.cudaErrorStreamCaptureWrongThread]
    assert run.cudart.cudaStreamEndCapture(run.stream)[0] == 0


def test_events_order_streams_and_tell_time(tensorrt_simulator: Install) -> None:
    cudart = tensorrt_simulator().cudart
    kinds = cudart.cudaMemcpyKind
    (_, first), (_, second) = cudart.cudaStreamCreateWithFlags(1), cudart.cudaStreamCreateWithFlags(1)
    (_, start), (_, end) = cudart.cudaEventCreate(), cudart.cudaEventCreate()
    _, device = cudart.cudaMalloc(8)
    _, pinned = cudart.cudaHostAlloc(8, 0)
    cudart.cudaEventRecord(start, first)
    cudart.cudaMemsetAsync(device, 5, 8, first)
    cudart.cudaEventRecord(end, first)
    cudart.cudaStreamWaitEvent(second, end, 0)
    cudart.cudaMemcpyAsync(pinned, device, 8, kinds.cudaMemcpyDeviceToHost, second)
    assert cudart.cudaEventQuery(end) == (cudart.cudaError_t.cudaErrorNotReady,)
    assert cudart.cudaEventElapsedTime(start, end)[0] == cudart.cudaError_t.cudaErrorNotReady
    cudart.cudaStreamSynchronize(second)
    assert bytes(_bytes_at(pinned, 8)) == bytes([5] * 8)
    error, took_ms = cudart.cudaEventElapsedTime(start, end)
    assert error == 0
    assert took_ms >= 0


# timing caches


def test_timing_caches_know_their_version_and_device(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator(**ORIN)
    config = builder_of(simulator).create_builder_config()
    own = bytes(config.create_timing_cache(b"").serialize())
    assert config.set_timing_cache(config.create_timing_cache(own), ignore_mismatch=False)
    assert config.create_timing_cache(b"rubbish") is None
    for machine in (tensorrt_simulator("10.13.3.9", **ORIN), tensorrt_simulator(**THOR)):
        config = builder_of(machine).create_builder_config()
        foreign = config.create_timing_cache(own)
        assert not config.set_timing_cache(foreign, ignore_mismatch=False)
        assert config.get_timing_cache() is None
        assert config.set_timing_cache(foreign, ignore_mismatch=True)


def test_host_memory_is_a_buffer_and_no_more(simulator_package: ModuleType) -> None:
    simulator = simulator_package.Simulator()
    plan = simulator.host_memory(b"some bytes")
    assert bytes(plan) == b"some bytes"
    assert plan.nbytes == memoryview(plan).nbytes == 10
    for wrong in (len, list, lambda memory: memory[0], lambda memory: memory + b"x"):
        with pytest.raises(TypeError):
            wrong(plan)
    with pytest.raises(AttributeError):
        plan.hex()
    assert plan
    assert hashlib.sha256(plan).hexdigest()
