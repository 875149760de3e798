"""One TensorRT engine made ready to run: deserialised, its tensors bound by name, its work captured as CUDA graphs.

Who owns what: an engine is shared by all sessions of the process that run the same file, from any thread. A session has
execution contexts of its own and runs on one stream. Any thread may use it, but only one thread at a time uses sessions
of one stream: TensorRT forbids to enqueue a context twice at once, and a capture records what any thread enqueues.

It ran on the simulator only (tests/tensorrt_simulator), for TensorRT 10.3, 10.13, 10.16 and 11.4; no GPU was at hand.
"""

import collections
import contextlib
import logging
import math
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .cuda_memory import (
    CapturedGraph,
    DeviceBuffer,
    Event,
    PinnedBuffer,
    Stream,
    capture_graph,
    copy_to_device,
    copy_to_host,
    current_device_number,
    on_device,
)
from .engines import DeviceIdentity, EngineFile, import_tensorrt, read_engine_bytes
from .errors import BackendError, EngineMismatchError, InputError, TclkitError

Shape = tuple[int, ...]
_MOST_GRAPHS = 4  # captured, each with an execution context of its own
_MOST_SEEN = 16  # bindings that ran once, to be captured when they come again
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """An input or output of an engine.

    name: as in the graph.
    is_input: else an output.
    dtype: of its elements.
    smallest, largest: shapes that the engine was built for; of an output, both its declared shape, -1 for any.
    """

    name: str
    is_input: bool
    dtype: np.dtype[Any]
    smallest: Shape
    largest: Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceTensor:
    """A contiguous array on the device.

    address: of its first byte.
    shape, dtype: as numpy's.
    """

    address: int
    shape: Shape
    dtype: np.dtype[Any]

    @property
    def size_bytes(self) -> int:
        """Size of all elements."""
        return _size_bytes(self.shape, self.dtype)


class LoadedEngine:
    """A deserialised engine; see `load_engine`.

    Attributes:
        file: that it came from.
        engine: TensorRT's ICudaEngine.
        tensors: its inputs and outputs by name.
        lock: to be held while an execution context is made.
    """

    def __init__(self, file: EngineFile, tensorrt: Any, runtime: Any, engine: Any) -> None:
        self.file = file
        self.tensorrt = tensorrt
        self.engine = engine
        self._runtime = runtime
        self.lock = threading.Lock()
        self.tensors = {info.name: info for info in _tensors(tensorrt, engine, file)}

    def __del__(self) -> None:
        self.engine = None  # before the runtime that made it
        self._runtime = None


def load_engine(file: EngineFile, *, device: DeviceIdentity, remedy: str) -> LoadedEngine:
    """Deserialise an engine on the current device, or return the one that this process has there already.

    Args:
        file: from `find_engine`; its bytes are compared with the side-car first.
        device: this machine, for messages.
        remedy: closes the message of an error: how to build it again.

    Raises:
        BundleError: the file is damaged.
        EngineMismatchError: TensorRT refuses it.
        BackendError: tensorrt or cuda-python is not installed.
    """
    tensorrt = import_tensorrt()
    key = (file.record.engine_sha256, id(tensorrt), current_device_number())
    with _LOADING:
        loaded = _LOADED.get(key)
        if loaded is None:
            loaded = _LOADED[key] = _deserialized(file, tensorrt, device, remedy)
        return loaded


_LOADED: "weakref.WeakValueDictionary[tuple[str, int, int], LoadedEngine]" = weakref.WeakValueDictionary()
_LOADING = threading.Lock()


def _deserialized(file: EngineFile, tensorrt: Any, device: DeviceIdentity, remedy: str) -> LoadedEngine:
    content = read_engine_bytes(file, remedy=remedy)
    logger = _logger_of(tensorrt)
    logger.errors.clear()
    runtime = tensorrt.Runtime(logger)
    if runtime is None:
        raise BackendError(f"TensorRT {device.tensorrt_version} cannot start: {logger.last_error()}")
    flags = file.record.flags
    if "version-compatible" in flags:  # it carries a lean runtime of its own
        runtime.engine_host_code_allowed = True
    if "dla" in flags:
        runtime.DLA_core = 0
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        record = file.record
        why = logger.last_error()
        message = f"{device} refuses {file.path.name}, which was built by {record.place}: {why}. {remedy}"
        raise EngineMismatchError(message, expected=str(device), found=record.place)
    return LoadedEngine(file, tensorrt, runtime, engine)


class EngineSession:
    """Runs one engine on one stream.

        session = EngineSession(load_engine(file, device=current_device(), remedy="..."), stream)
        outputs = session.run({"image": images_BHWC})
        masks = session.to_host(outputs["masks"])

    Work is queued; `to_host` waits for it, as `stream.synchronize` does. Bindings (shapes and addresses) that come a
    second time are captured as a CUDA graph, each in an execution context of its own that shares the activation memory
    with the others, as NVIDIA advises: a graph holds state of its context. Where capture fails, one line is logged and
    work is queued plainly from then on.

    Threads may use it one after another; use by two at once is refused. It runs on the stream's device, whichever is
    current in the thread that uses it.

    Args:
        loaded: the engine, on the stream's device.
        stream: where it runs; several sessions may share it.
        capture: False queues everything plainly.

    Raises:
        BackendError: no memory for an execution context.
    """

    def __init__(self, loaded: LoadedEngine, stream: Stream, *, capture: bool = True) -> None:
        self._file = loaded.file
        self._tensors = loaded.tensors
        self._stream = stream
        self._captures = capture
        self._seen: collections.OrderedDict[_Bindings, None] = collections.OrderedDict()
        with on_device(stream.device):
            self._held = _Held(loaded=loaded, stream=stream)
            self._finalizer = weakref.finalize(self, _release, self._held)
            self._held.scratch.reserve(int(loaded.engine.device_memory_size_v2))
            self._held.context = self._make_context()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Inputs and outputs by name."""
        return self._tensors

    @property
    def captured_graphs(self) -> int:
        """How many CUDA graphs are held."""
        return len(self._held.captured)

    def run(
        self,
        inputs: Mapping[str, NDArray[Any] | DeviceTensor],
        outputs: Mapping[str, DeviceBuffer] | None = None,
    ) -> dict[str, DeviceTensor]:
        """Queue one run of the engine.

        Args:
            inputs: every input by name. Arrays are copied up through pinned memory; device tensors are read in place.
            outputs: buffers to write to, by name; they grow as needed. The others are the session's own, and are
                overwritten by its next run.

        Returns:
            Every output by name, complete once the stream is synchronised.

        Raises:
            InputError: an input is missing, of the wrong dtype, or of a shape that the engine was not built for.
            BackendError: TensorRT or CUDA refuses the work.
            TclkitError: another thread uses the session or its stream just now, or it is closed.
        """
        with self._alone():
            return self._run(inputs, outputs or {})

    def _run(
        self, inputs: Mapping[str, NDArray[Any] | DeviceTensor], outputs: Mapping[str, DeviceBuffer]
    ) -> dict[str, DeviceTensor]:
        self._check_inputs(inputs)
        self._held.uploads.synchronize()  # the last run's inputs have left pinned memory
        addresses = {
            name: value.address if isinstance(value, DeviceTensor) else self._uploaded(name, value)
            for name, value in inputs.items()
        }
        self._held.uploads.record(self._stream)
        input_shapes = tuple((name, tuple(value.shape)) for name, value in inputs.items())
        results = {}
        for name, shape in self._output_shapes(input_shapes).items():
            dtype = self._tensors[name].dtype
            buffer = outputs[name] if name in outputs else _buffer(self._held.device, name)
            buffer.reserve(_size_bytes(shape, dtype))
            addresses[name] = buffer.address
            results[name] = DeviceTensor(address=buffer.address, shape=shape, dtype=dtype)
        self._enqueue(_Bindings(input_shapes=input_shapes, addresses=tuple(addresses.items())))
        return results

    def to_host(self, tensor: DeviceTensor) -> NDArray[Any]:
        """Copy an array from the device, through pinned memory, once the work queued so far is done.

        Raises:
            BackendError: that work failed.
            TclkitError: another thread uses the session or its stream just now, or it is closed.
        """
        with self._alone():
            staging = self._held.download
            staging.reserve(tensor.size_bytes)
            copy_to_host(staging, tensor.address, tensor.size_bytes, self._stream)
            self._stream.synchronize()
            return staging.view(tensor.shape, tensor.dtype).copy()

    def close(self) -> None:
        """Release graphs, contexts, the share of the engine and buffers, in this order; a second call does nothing.

        It waits for the thread that uses the stream just now.
        """
        with self._stream.in_use:
            self._finalizer()

    def __enter__(self) -> "EngineSession":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Use the stream as the only thread, on its device: a context runs only where the engine's device is current.

        Source: TensorRT's developer guide, on several GPUs.
        """
        name = self._file.path.name
        if not self._stream.in_use.acquire(blocking=False):
            raise TclkitError(
                f"the session of {name}, or another of its stream, is used by another thread just now. Use them one "
                "after another, or open a Segmenter in each thread: they share the engine"
            )
        try:
            if not self._finalizer.alive or self._stream.is_closed:
                raise TclkitError(f"the session of {name} is closed, or its stream is")
            with on_device(self._stream.device):
                yield
        finally:
            self._stream.in_use.release()

    def _check_inputs(self, inputs: Mapping[str, NDArray[Any] | DeviceTensor]) -> None:
        engine = self._file.path.name
        wanted = [info.name for info in self._tensors.values() if info.is_input]
        if set(inputs) != set(wanted):
            raise InputError(f"{engine} takes {', '.join(sorted(wanted))}, found {', '.join(sorted(inputs))}")
        for name, value in inputs.items():
            info = self._tensors[name]
            if value.dtype != info.dtype:
                raise InputError(f"{engine} takes {name} as {info.dtype}, found {value.dtype}")
            if not _is_within(tuple(value.shape), info):
                message = f"{engine} was built for {name} of {_range_text(info)}, found {tuple(value.shape)}"
                remedy = "Build it for more with --max-batch or --max-prompts, or use --backend onnxruntime"
                raise InputError(f"{message}. {remedy}", name=name, shape=tuple(value.shape))

    def _uploaded(self, name: str, value: NDArray[Any]) -> int:
        """Address that the array will have been copied to when the run comes to it."""
        target = _buffer(self._held.device, name)
        staging = self._held.pinned.get(name) or self._held.pinned.setdefault(name, PinnedBuffer())
        staging.reserve(value.nbytes)
        target.reserve(value.nbytes)
        np.copyto(staging.view(value.shape, value.dtype), value)
        copy_to_device(target.address, staging, value.nbytes, self._stream)
        return target.address

    def _output_shapes(self, input_shapes: "_InputShapes") -> dict[str, Shape]:
        """Shape of every output by name; TensorRT is asked once for each combination of input shapes."""
        known = self._held.output_shapes.get(input_shapes)
        if known is not None:
            return known
        context = self._held.context
        self._set_shapes(context, input_shapes)
        missing = context.infer_shapes()
        names = [info.name for info in self._tensors.values() if not info.is_input]
        shapes = {name: tuple(int(side) for side in context.get_tensor_shape(name)) for name in names}
        if missing or any(side < 0 for shape in shapes.values() for side in shape):
            raise self._refusal(f"cannot tell the shapes of its outputs for {dict(input_shapes)}")
        if len(self._held.output_shapes) >= _MOST_SEEN:
            self._held.output_shapes.clear()
        self._held.output_shapes[input_shapes] = shapes
        return shapes

    def _enqueue(self, bindings: "_Bindings") -> None:
        held = self._held
        captured = held.captured.get(bindings)
        if captured is not None:
            held.captured.move_to_end(bindings)
            captured.graph.launch(self._stream)
        elif not (self._captures and bindings in self._seen and self._run_and_capture(bindings)):
            self._remember(bindings)
            self._bind(held.context, bindings)
            self._execute(held.context)

    def _run_and_capture(self, bindings: "_Bindings") -> bool:
        """Run once more, and capture for the next time; False where nothing was run."""
        try:
            context = self._make_context()
        except BackendError as error:
            self._give_up_capture(error)
            return False
        self._bind(context, bindings)
        self._execute(context)  # this run; it also does what TensorRT puts off after a change, as capture demands
        try:
            graph = capture_graph(self._stream, lambda: self._execute(context))
        except BackendError as error:
            self._stream.synchronize()  # before the context goes
            self._give_up_capture(error)
            return True
        captured = self._held.captured
        if len(captured) >= _MOST_GRAPHS:
            self._stream.synchronize()
            captured.popitem(last=False)[1].graph.close()
        captured[bindings] = _Captured(graph=graph, context=context)
        return True

    def _give_up_capture(self, error: BackendError) -> None:
        self._captures = False
        _log.warning("%s runs without CUDA graphs: %s", self._file.path.name, error)

    def _remember(self, bindings: "_Bindings") -> None:
        self._seen[bindings] = None
        self._seen.move_to_end(bindings)
        if len(self._seen) > _MOST_SEEN:
            self._seen.popitem(last=False)

    def _make_context(self) -> Any:
        """An execution context on the session's activation memory; contexts of one stream never run at once."""
        loaded, scratch = self._held.loaded, self._held.scratch
        assert loaded is not None, "the session is closed"
        strategy = loaded.tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
        with loaded.lock:
            context = loaded.engine.create_execution_context(strategy)
        if context is None:
            raise self._refusal("gives no execution context")
        if scratch.size_bytes:
            context.set_device_memory(scratch.address, scratch.size_bytes)
        return context

    def _bind(self, context: Any, bindings: "_Bindings") -> None:
        self._set_shapes(context, bindings.input_shapes)
        for name, address in bindings.addresses:
            if not context.set_tensor_address(name, address):
                raise self._refusal(f"refuses the address {address:#x} for {name}")

    def _set_shapes(self, context: Any, input_shapes: "_InputShapes") -> None:
        for name, shape in input_shapes:
            if not context.set_input_shape(name, shape):
                raise self._refusal(f"refuses the shape {shape} for {name}")

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.handle):
            raise self._refusal("could not be run")

    def _refusal(self, what: str) -> BackendError:
        assert self._held.loaded is not None, "the session is closed"
        said = _logger_of(self._held.loaded.tensorrt).last_error()
        name = self._file.path.name
        return BackendError(f"{name} {what}: {said}. Another way: --backend onnxruntime", engine=name)


_InputShapes = tuple[tuple[str, Shape], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bindings:
    """All that a captured graph depends on."""

    input_shapes: _InputShapes
    addresses: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Captured:
    graph: CapturedGraph
    context: Any


@dataclass(kw_only=True)
class _Held:
    """What a session has to give back; apart from it, so that it can be released after it."""

    stream: Stream
    loaded: LoadedEngine | None
    context: Any = None
    captured: "collections.OrderedDict[_Bindings, _Captured]" = field(default_factory=collections.OrderedDict)
    output_shapes: dict[_InputShapes, dict[str, Shape]] = field(default_factory=dict)
    scratch: DeviceBuffer = field(default_factory=DeviceBuffer)
    device: dict[str, DeviceBuffer] = field(default_factory=dict)
    pinned: dict[str, PinnedBuffer] = field(default_factory=dict)
    download: PinnedBuffer = field(default_factory=PinnedBuffer)
    uploads: Event = field(default_factory=Event)


def _release(held: _Held) -> None:
    with contextlib.suppress(BackendError), on_device(held.stream.device):
        _release_here(held)


def _release_here(held: _Held) -> None:
    if not held.stream.is_closed:
        with contextlib.suppress(BackendError):  # what failed was told when it did
            held.stream.synchronize()
    for captured in held.captured.values():
        captured.graph.close()
    held.captured.clear()
    held.context = None
    held.loaded = None
    for buffer in (held.scratch, *held.device.values(), held.download, *held.pinned.values()):
        buffer.close()
    held.uploads.close()


def _buffer(buffers: dict[str, DeviceBuffer], name: str) -> DeviceBuffer:
    if name not in buffers:
        buffers[name] = DeviceBuffer()
    return buffers[name]


def _tensors(tensorrt: Any, engine: Any, file: EngineFile) -> list[TensorInfo]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [_tensor(tensorrt, engine, file, name) for name in names]


def _tensor(tensorrt: Any, engine: Any, file: EngineFile, name: str) -> TensorInfo:
    kind = engine.get_tensor_dtype(name)
    dtypes: dict[str, DTypeLike] = {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8, "INT32": np.int32}
    dtypes |= {"INT64": np.int64, "INT8": np.int8, "BOOL": np.bool_}
    found = [dtype for label, dtype in dtypes.items() if kind == getattr(tensorrt.DataType, label)]
    if not found or engine.get_tensor_location(name) != tensorrt.TensorLocation.DEVICE:
        message = f"{file.path.name} has the tensor {name} of {kind}, at {engine.get_tensor_location(name)}"
        raise BackendError(f"{message}: not one that tclkit can give it")
    is_input = engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT
    smallest = largest = tuple(engine.get_tensor_shape(name))
    if is_input:
        smallest, _, largest = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0))
    return TensorInfo(name=name, is_input=is_input, dtype=np.dtype(found[0]), smallest=smallest, largest=largest)


def _is_within(shape: Shape, info: TensorInfo) -> bool:
    return len(shape) == len(info.largest) and all(
        low <= side <= high for low, side, high in zip(info.smallest, shape, info.largest, strict=True)
    )


def _range_text(info: TensorInfo) -> str:
    sides = zip(info.smallest, info.largest, strict=True)
    return f"({', '.join(str(low) if low == high else f'{low} to {high}' for low, high in sides)})"


def _size_bytes(shape: Shape, dtype: np.dtype[Any]) -> int:
    return math.prod(shape) * dtype.itemsize


_LOGGERS: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


def _logger_of(tensorrt: Any) -> Any:
    """The one logger that TensorRT gets in this process: it writes to Python's log, and keeps the last errors."""
    if tensorrt not in _LOGGERS:
        _LOGGERS[tensorrt] = _make_logger(tensorrt)
    return _LOGGERS[tensorrt]


def _make_logger(tensorrt: Any) -> Any:
    severity = tensorrt.ILogger.Severity
    failures = (severity.INTERNAL_ERROR, severity.ERROR)

    class Logger(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: collections.deque[str] = collections.deque(maxlen=8)

        def log(self, severity: Any, msg: str) -> None:
            if severity in failures:
                self.errors.append(msg)  # told by the exception that follows
            _log.debug("TensorRT: %s", msg)

        def last_error(self) -> str:
            return self.errors[-1].strip().rstrip(".") if self.errors else "TensorRT does not say why"

    return Logger()
