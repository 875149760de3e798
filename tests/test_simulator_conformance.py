"""The simulator offers nothing that the real bindings do not have: tests/tensorrt_api, and the installed cuda-python.

So code that passes against the simulator calls real names with real parameters. Planted faults show that these tests,
and the simulator's own refusals, can fail.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

VERSIONS = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")
MEMBERS = ("num_io_tensors", "deserialize_cuda_engine", "execute_async_v3", "set_timing_cache", "progress_monitor")


@pytest.fixture(scope="module")
def parts(simulator_package: ModuleType) -> Callable[[str], Any]:
    """parts("api") -> the module of the simulator's package."""
    return lambda name: importlib.import_module(f"{simulator_package.__name__}.{name}")


@pytest.fixture(scope="module", params=VERSIONS)
def simulator(request: pytest.FixtureRequest, simulator_package: ModuleType) -> Any:
    """A machine of each version, not installed."""
    return simulator_package.Simulator(request.param)


@pytest.fixture(scope="module")
def real_cudart(simulator_package: ModuleType) -> Any:
    """The real cuda.bindings.runtime; it can be inspected without a GPU."""
    module = importlib.import_module("cuda.bindings.runtime")
    assert Path(str(module.__file__)).suffix in (".so", ".pyd")
    return module


def property_names(entry: dict[str, Any]) -> dict[str, bool]:
    """name -> whether it is read-only."""
    return {text.removesuffix(" (read-only)"): text.endswith(" (read-only)") for text in entry["properties"]}


def public_members(kind: type) -> dict[str, Any]:
    """Methods and properties that a class defines itself, and those it only stores."""
    stored = dict.fromkeys(getattr(kind, "_stored", {}), property())
    return stored | {name: value for name, value in vars(kind).items() if not name.startswith("_")}


def invented_members(body: type, apis: list[dict[str, Any]]) -> list[str]:
    """Members of a simulated class that no version of the real one has, or has as something else."""
    entries = [api["classes"].get(body.__name__) for api in apis]
    found = []
    for name, value in public_members(body).items():
        home = "properties" if isinstance(value, property) else "methods"
        known = [name in (property_names(entry) if home == "properties" else entry[home]) for entry in entries if entry]
        if not any(known):
            found.append(f"{body.__name__}.{name}: no version has it among its {home}")
    return found


def misfitting_calls(body: type, api: dict[str, Any], parts: Callable[[str], Any]) -> Iterator[str]:
    """Simulated methods that cannot be called as the real ones of a version can, or take what those do not."""
    signatures = {name: lines for name, lines in api["classes"][body.__name__]["methods"].items() if name in vars(body)}
    for name, lines in signatures.items():
        where = f"{body.__name__}.{name} ({api['version']})"
        overloads, method = parts("api").overloads(lines), vars(body)[name]
        offered = 0
        for parameters in overloads:
            nameless = [parameter for parameter in parameters if parameter.nameless]
            named = [parameter for parameter in parameters if not parameter.nameless]
            full = dict.fromkeys(parameter.name for parameter in named)
            least = {parameter.name: None for parameter in named if not parameter.optional}
            if parts("api").takes(method, nameless, full):
                offered += 1
                if not parts("api").takes(method, nameless, least):
                    yield f"{where}: an optional parameter of {parameters} is required"
        if not offered:
            yield f"{where}: takes none of the overloads {lines}"
        real_names = {parameter.name for parameters in overloads for parameter in parameters}
        for parameter in list(inspect.signature(method).parameters.values())[1:]:
            if parameter.name not in real_names and parameter.default is inspect.Parameter.empty:
                yield f"{where}: parameter {parameter.name} is not in {lines}"


def invented_parameters(body: type, apis: list[dict[str, Any]], parts: Callable[[str], Any]) -> list[str]:
    """Parameters of simulated methods that the real method has in no version."""
    found = []
    for name, method in vars(body).items():
        lines = [
            line for api in apis for line in api["classes"].get(body.__name__, {"methods": {}})["methods"].get(name, [])
        ]
        real = {parameter.name for parameters in parts("api").overloads(lines) for parameter in parameters}
        if lines and inspect.isfunction(method) and not name.startswith("_"):
            own = list(inspect.signature(method).parameters)[1:]
            found += [f"{body.__name__}.{name}: {parameter}" for parameter in own if parameter not in real]
    return found


@pytest.fixture(scope="module")
def apis(simulator_package: ModuleType) -> list[dict[str, Any]]:
    return [simulator_package.load_api(version) for version in VERSIONS]


def test_the_four_versions_are_imitated(simulator_package: ModuleType) -> None:
    assert simulator_package.VERSIONS == VERSIONS
    assert simulator_package.load_api("10.3.0")["version"] == "10.3.0"


def test_enums_have_the_members_of_the_version(simulator: Any) -> None:
    for name, members in simulator.api["enums"].items():
        offered = getattr(simulator.tensorrt, name)
        assert set(offered.__members__) == set(members), name
        assert len({int(member) for member in offered.__members__.values()}) == len(members), name


def test_the_module_offers_nothing_else(simulator: Any) -> None:
    names = {name for name in vars(simulator.tensorrt) if not name.startswith("_")}
    assert names <= {*simulator.api["enums"], *simulator.api["classes"], *simulator.api["functions"]}
    assert simulator.tensorrt.__version__ == simulator.version


def test_no_member_is_invented(apis: list[dict[str, Any]], parts: Callable[[str], Any]) -> None:
    bodies = parts("tensorrt_classes").CLASSES
    assert len(bodies) > 15
    for body in (*bodies, parts("tensorrt_classes").IHostMemory):
        assert invented_members(body, apis) == []
        assert invented_parameters(body, apis, parts) == []


def test_methods_take_what_the_real_ones_take(simulator: Any, parts: Callable[[str], Any]) -> None:
    for body in parts("tensorrt_classes").CLASSES:
        assert list(misfitting_calls(body, simulator.api, parts)) == []


def test_classes_have_the_members_of_the_version_alone(simulator: Any, parts: Callable[[str], Any]) -> None:
    seen = set()
    for body in parts("tensorrt_classes").CLASSES:
        kind, entry = getattr(simulator.tensorrt, body.__name__), simulator.api["classes"][body.__name__]
        properties = property_names(entry)
        for name, value in vars(kind).items():
            if name.startswith("_") or (body.__name__ == "ILogger" and name in _severities(simulator)):
                continue
            seen.add(name)
            if isinstance(value, property):
                assert (value.fset is None) == properties[name], f"{body.__name__}.{name}"
            else:
                assert name in entry["methods"], f"{body.__name__}.{name}"
    assert seen >= set(MEMBERS)


def _severities(simulator: Any) -> set[str]:
    """pybind11 exports the members of ILogger.Severity into ILogger; the api files do not list them."""
    return set(simulator.tensorrt.ILogger.Severity.__members__)


def test_functions_take_what_the_real_ones_take(simulator: Any) -> None:
    assert list(inspect.signature(simulator.tensorrt.init_libnvinfer_plugins).parameters) == ["logger", "namespace"]
    for name in ("init_libnvinfer_plugins", "volume", "nptype"):
        assert name in simulator.api["functions"]
    assert simulator.tensorrt.volume((2, 3, 4)) == 24
    with pytest.raises(TypeError, match="Could not resolve"):
        simulator.tensorrt.nptype(simulator.tensorrt.DataType.FP8)


# planted faults: the conformance tests can fail


def test_an_invented_method_property_or_keyword_is_caught(
    apis: list[dict[str, Any]], parts: Callable[[str], Any]
) -> None:
    class Runtime:
        _stored = {"max_threads": 1, "max_thread": 1}  # noqa: RUF012

        def deserialize_cuda_engine(self, serialized_engine: Any, verify: bool = True) -> Any: ...

        def deserialize_engine(self, data: Any) -> Any: ...

        @property
        def load_runtime(self) -> Any: ...

    assert invented_members(Runtime, apis) == [
        "Runtime.max_thread: no version has it among its properties",
        "Runtime.deserialize_engine: no version has it among its methods",
        "Runtime.load_runtime: no version has it among its properties",
    ]
    assert invented_parameters(Runtime, apis, parts) == ["Runtime.deserialize_cuda_engine: verify"]


def test_a_misnamed_or_missing_parameter_is_caught(simulator: Any, parts: Callable[[str], Any]) -> None:
    class IExecutionContext:
        def execute_async_v3(self, stream: int) -> bool: ...  # the real one has stream_handle

        def set_tensor_address(self, name: str) -> bool: ...

    faults = list(misfitting_calls(IExecutionContext, simulator.api, parts))
    assert [re.sub(r" \(.*", "", fault) for fault in faults] == [
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.execute_async_v3",
        "IExecutionContext.set_tensor_address",
    ]


def test_a_required_parameter_that_is_optional_is_caught(simulator: Any, parts: Callable[[str], Any]) -> None:
    class Builder:
        def create_network(self, flags: int) -> Any: ...

    assert [fault.partition(":")[0] for fault in misfitting_calls(Builder, simulator.api, parts)] == [
        f"Builder.create_network ({simulator.version})"
    ]


# planted faults: what a version does not have fails in the code under test


def precision_flag(trt: Any) -> Any:
    return trt.BuilderFlag.FP16


def explicit_batch(trt: Any) -> Any:
    return trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH


def set_calibrator(trt: Any) -> Any:
    trt.Builder(trt.Logger()).create_builder_config().int8_calibrator = None


def get_calibrator(trt: Any) -> Any:
    return trt.Builder(trt.Logger()).create_builder_config().int8_calibrator


def fast_fp16(trt: Any) -> Any:
    return trt.Builder(trt.Logger()).platform_has_fast_fp16


def set_type(trt: Any) -> Any:
    trt.INetworkDefinition.add_nothing  # noqa: B018


@pytest.mark.parametrize("code", [precision_flag, explicit_batch, set_calibrator, get_calibrator, fast_fp16, set_type])
def test_what_tensorrt_11_dropped_is_not_there(
    tensorrt_simulator: Callable[..., Any], code: Callable[[Any], Any]
) -> None:
    with pytest.raises(AttributeError):
        code(tensorrt_simulator("11.4.0.106").tensorrt)


@pytest.mark.parametrize("code", [precision_flag, explicit_batch, set_calibrator, get_calibrator, fast_fp16])
@pytest.mark.parametrize("version", VERSIONS[:3])
def test_and_on_tensorrt_10_it_was(
    tensorrt_simulator: Callable[..., Any], version: str, code: Callable[[Any], Any]
) -> None:
    code(tensorrt_simulator(version).tensorrt)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("BuilderFlag.STRICT_NANS", "10.13.3.9"),
        ("HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY", "10.13.3.9"),
        ("EngineStat.TOTAL_WEIGHTS_SIZE", "10.16.1.11"),
    ],
)
def test_what_came_later_is_not_there_before(simulator: Any, name: str, first: str) -> None:
    enum, member = name.split(".")
    has_it = hasattr(getattr(simulator.tensorrt, enum, None), member)
    assert has_it == (VERSIONS.index(simulator.version) >= VERSIONS.index(first))


def test_wrong_calls_are_refused(simulator: Any) -> None:
    trt = simulator.tensorrt
    builder = trt.Builder(logger=trt.Logger(min_severity=trt.Logger.ERROR))
    config = builder.create_builder_config()
    for wrong in (
        lambda: trt.Builder(log=trt.Logger()),
        lambda: trt.Builder(),
        lambda: trt.Builder("logger"),
        lambda: builder.create_network(flag=0),
        lambda: builder.create_network(1.0),
        lambda: config.set_flag(0),
        lambda: config.set_flag(trt.DataType.FLOAT),
        lambda: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
        lambda: config.set_timing_cache(None),
        lambda: trt.Runtime(trt.Logger()).deserialize_cuda_engine("a text"),
        lambda: builder.create_optimization_profile().set_shape("x", (1.5,), (2,), (3,)),
        lambda: trt.IBuilderConfig(),
        lambda: trt.IHostMemory(b"bytes"),
    ):
        with pytest.raises(TypeError):
            wrong()


def test_unknown_and_read_only_attributes_cannot_be_set(simulator: Any) -> None:
    trt = simulator.tensorrt
    builder = trt.Builder(trt.Logger())
    config = builder.create_builder_config()
    with pytest.raises(AttributeError, match="no attribute 'max_workspace_size'"):
        config.max_workspace_size = 1 << 30
    with pytest.raises(AttributeError):
        builder.num_DLA_cores = 2
    config.builder_optimization_level = 5
    assert config.builder_optimization_level == 5


def test_a_real_member_that_is_not_simulated_says_so(simulator: Any) -> None:
    trt = simulator.tensorrt
    with pytest.raises(NotImplementedError, match=r"has Builder\.reset, but the simulator does not offer it"):
        trt.Builder(trt.Logger()).reset()
    with pytest.raises(NotImplementedError, match="has Refitter, but the simulator does not offer it"):
        trt.Refitter  # noqa: B018


def test_subclasses_call_the_base(simulator: Any) -> None:
    """As pybind11 wants it: an object whose C++ side was never made would crash."""

    class Monitor(simulator.tensorrt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            self.phases: list[str] = []

    with pytest.raises(TypeError, match=r"__init__\(\) must be called when overriding __init__"):
        Monitor()


# the CUDA runtime


def test_cuda_functions_take_what_the_real_ones_take(parts: Callable[[str], Any], real_cudart: Any) -> None:
    runtime = parts("cuda_runtime").CudaRuntime
    names = [name for name in vars(runtime) if name.startswith("cuda")]
    assert len(names) > 30
    for name in names:
        own = list(inspect.signature(getattr(runtime, name)).parameters)[1:]
        assert list(inspect.signature(getattr(real_cudart, name)).parameters) == own, name


def test_cuda_types_and_constants_are_the_real_ones(parts: Callable[[str], Any], real_cudart: Any) -> None:
    for kind in parts("cuda_runtime").TYPES:
        real = getattr(real_cudart, kind.__name__)
        for member in getattr(kind, "__members__", {}).values():
            assert getattr(real, member.name).value == member.value
    for name, value in parts("cuda_runtime").CONSTANTS.items():
        assert getattr(real_cudart, name) == value
    for name in vars(parts("cuda_runtime").cudaDeviceProp()):
        assert hasattr(real_cudart.cudaDeviceProp, name), name


def test_cuda_error_names_and_texts_are_the_real_ones(
    simulator: Any, parts: Callable[[str], Any], real_cudart: Any
) -> None:
    for error in parts("cuda_runtime").cudaError_t:
        real = real_cudart.cudaError_t(error.value)
        assert simulator.cudart.cudaGetErrorName(error) == (0, real_cudart.cudaGetErrorName(real)[1])
        assert simulator.cudart.cudaGetErrorString(error) == (0, real_cudart.cudaGetErrorString(real)[1])


def number_of_results(function: Any) -> int:
    """How many values the documentation of a function of cuda-python says that it returns, the error among them."""
    section = re.search(r"\nReturns\n-+\n(.*?)(?=\n\n\S|\Z)", function.__doc__, re.DOTALL)
    if section is None:  # cudaMemcpy and others say nothing: they return the error alone
        return 1
    return len([line for line in section.group(1).splitlines() if line and not line.startswith(" ")])


def test_cuda_functions_return_as_many_values_as_the_real_ones(simulator_package: ModuleType, real_cudart: Any) -> None:
    cudart = simulator_package.Simulator().cudart
    results: dict[str, tuple[Any, ...]] = {}

    def call(name: str, *arguments: Any) -> Any:
        results[name] = getattr(cudart, name)(*arguments)
        assert results[name][0] == 0, name
        return results[name][-1]

    stream, event = call("cudaStreamCreate"), call("cudaEventCreate")
    call("cudaStreamDestroy", call("cudaStreamCreateWithFlags", 1))
    call("cudaEventDestroy", call("cudaEventCreateWithFlags", 0))
    device, pinned, host = call("cudaMalloc", 8), call("cudaMallocHost", 8), call("cudaHostAlloc", 8, 0)
    call("cudaMemcpy", device, pinned, 8, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice)
    call("cudaStreamBeginCapture", stream, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal)
    call("cudaMemcpyAsync", device, pinned, 8, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)
    call("cudaMemsetAsync", device, 0, 8, stream)
    call("cudaStreamIsCapturing", stream)
    graph = call("cudaStreamEndCapture", stream)
    executable = call("cudaGraphInstantiate", graph, 0)
    for name, arguments in {
        "cudaGraphLaunch": (executable, stream),
        "cudaEventRecord": (event, stream),
        "cudaStreamWaitEvent": (stream, event, 0),
        "cudaEventSynchronize": (event,),
        "cudaEventQuery": (event,),
        "cudaEventElapsedTime": (event, event),
        "cudaStreamSynchronize": (stream,),
        "cudaStreamQuery": (stream,),
        "cudaDeviceSynchronize": (),
        "cudaGraphExecDestroy": (executable,),
        "cudaGraphDestroy": (graph,),
        "cudaFree": (device,),
        "cudaFreeHost": (pinned,),
        "cudaSetDevice": (0,),
        "cudaGetDeviceProperties": (0,),
        "cudaGetErrorName": (cudart.cudaError_t.cudaSuccess,),
        "cudaGetErrorString": (cudart.cudaError_t.cudaSuccess,),
        **dict.fromkeys(["cudaGetDevice", "cudaGetDeviceCount", "cudaDriverGetVersion", "cudaRuntimeGetVersion"], ()),
        **dict.fromkeys(["cudaMemGetInfo", "cudaGetLastError"], ()),
    }.items():
        call(name, *arguments)
    cudart.cudaFreeHost(host)
    assert set(results) == {
        name for name in vars(cudart) if name.startswith("cuda") and inspect.ismethod(vars(cudart)[name])
    }
    for name, result in results.items():
        assert len(result) == number_of_results(getattr(real_cudart, name)), name


# installed and taken out again


def test_the_modules_are_there_and_gone_again(simulator_package: ModuleType) -> None:
    fixtures = importlib.import_module(f"{simulator_package.__name__}.fixtures")
    real = importlib.import_module("cuda.bindings.runtime")
    with fixtures.simulators() as install:
        simulator = install("10.16.1.11")
        from cuda.bindings import runtime

        assert importlib.import_module("tensorrt") is simulator.tensorrt
        assert runtime is importlib.import_module("cuda.bindings.runtime") is simulator.cudart
        assert importlib.util.find_spec("tensorrt") is not None
        assert importlib.metadata.version("tensorrt") == "10.16.1.11"
        assert importlib.import_module("polygraphy.backend.trt.util").trt.__version__ == "10.16.1.11"
        install("11.4.0.106")
        assert importlib.metadata.version("tensorrt") == "11.4.0.106"
        assert importlib.import_module("polygraphy.backend.trt.util").trt.__version__ == "11.4.0.106"
    assert "tensorrt" not in sys.modules
    from cuda.bindings import runtime as again

    assert again is importlib.import_module("cuda.bindings.runtime") is real


def test_faults_fail_the_test_that_leaves_them(simulator_package: ModuleType) -> None:
    fixtures = importlib.import_module(f"{simulator_package.__name__}.fixtures")
    with pytest.raises(AssertionError, match="use after free"), fixtures.simulators() as install:
        install().faults.append("use after free")
    assert "tensorrt" not in sys.modules
