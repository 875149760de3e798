"""Device memory, pinned memory, streams, events and captured graphs, through `cuda.bindings.runtime` (cuda-python).

cuda-python is imported when the first of these is made, so that importing this module costs nothing. Everything here is
released once: by `close`, at the end of a `with` block, or, as a net, when it is garbage collected or Python ends.

CUDA keeps a current device for every thread, 0 in a new one. What is made here lies on the device that was current
then; who uses it in another thread does so within `on_device`.

It ran on the simulator only (tests/tensorrt_simulator); no GPU was at hand.
"""

import contextlib
import ctypes
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .errors import BackendError
from .extras import install_command

_log = logging.getLogger(__name__)
_REMEDIES = {
    "cudaErrorMemoryAllocation": "The device has no memory left: close other programs, or build the engine with a "
    "smaller --max-batch or --max-prompts",
    "cudaErrorInsufficientDriver": "The driver is missing, or older than this cuda-python: update it, or for CUDA 12 "
    "(JetPack 6) pip install 'cuda-python<13'",
    "cudaErrorNoDevice": "No CUDA device is visible here; CUDA_VISIBLE_DEVICES hides devices",
}
_SelfT = TypeVar("_SelfT", bound="_Owned")


def cuda_runtime() -> Any:
    """The module `cuda.bindings.runtime`.

    Raises:
        BackendError: cuda-python is not installed, or cannot be loaded.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise BackendError(
            f"cuda-python cannot be imported ({error}). Install it: {install_command('tensorrt')}; for CUDA 12 "
            "(JetPack 6) pip install 'cuda-python<13'"
        ) from error
    return runtime


def check(result: tuple[Any, ...], function: str) -> Any:
    """Value of a CUDA call: None, the only one, or a tuple.

    Args:
        result: what cuda-python returned, the error first.
        function: the call's name, for the message.

    Raises:
        BackendError: the call failed; its attribute `code` is CUDA's name of the error.
    """
    error, *values = result
    if int(error) != 0:
        raise _cuda_error(error, function)
    if len(values) > 1:
        return tuple(values)
    return values[0] if values else None


def device_count() -> int:
    """Number of CUDA devices, at least 1.

    Raises:
        BackendError: no cuda-python, no driver, or no device.
    """
    runtime = cuda_runtime()
    try:
        count = int(check(runtime.cudaGetDeviceCount(), "cudaGetDeviceCount"))
    except RuntimeError as error:  # cuda-python finds no CUDA library
        raise BackendError(f"CUDA cannot be loaded ({error}). Install NVIDIA's driver") from error
    if not count:
        raise BackendError(f"CUDA counts no devices. {_REMEDIES['cudaErrorNoDevice']}", code="cudaErrorNoDevice")
    return count


def device_name_and_capability() -> tuple[str, str]:
    """Name and compute capability of the current device, such as ("Orin", "8.7").

    Raises:
        BackendError: no cuda-python, no driver, or no device.
    """
    device_count()
    properties = check(cuda_runtime().cudaGetDeviceProperties(current_device_number()), "cudaGetDeviceProperties")
    name = properties.name
    text = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return text.rstrip("\0"), f"{properties.major}.{properties.minor}"


def current_device_number() -> int:
    """Number of this thread's current device.

    Raises:
        BackendError: no cuda-python, no driver, or no device.
    """
    return int(check(cuda_runtime().cudaGetDevice(), "cudaGetDevice"))


@contextlib.contextmanager
def on_device(number: int) -> Iterator[None]:
    """Make a device this thread's current one; afterwards it is the one from before again.

    Args:
        number: as `current_device_number` gave it, in whichever thread.

    Raises:
        BackendError: there is no such device.
    """
    before = current_device_number()
    if before == number:
        yield
        return
    runtime = cuda_runtime()
    check(runtime.cudaSetDevice(number), "cudaSetDevice")
    try:
        yield
    finally:
        check(runtime.cudaSetDevice(before), "cudaSetDevice")


class _Owned:
    """Something that CUDA gave and takes back exactly once."""

    def __init__(self) -> None:
        self._runtime = cuda_runtime()
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def _own(self, function: str, *handle: Any) -> None:
        """Release `handle` with this function of the CUDA runtime, now or later, on the device that is current now."""
        free = getattr(self._runtime, function)
        self._finalizer = weakref.finalize(self, _release, free, function, handle, current_device_number())

    @property
    def is_closed(self) -> bool:
        """Whether CUDA has it back, or never gave any."""
        return self._finalizer is None or not self._finalizer.alive

    def close(self) -> None:
        """Give it back to CUDA; a second call does nothing."""
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self: _SelfT) -> _SelfT:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream(_Owned):
    """A queue of work on the device; it does not wait for the default stream.

    Attributes:
        device: number of the device it was made on.
        in_use: held by who puts work into it, since a capture records what comes from anybody.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = current_device_number()
        self.in_use = threading.Lock()
        flags = self._runtime.cudaStreamNonBlocking
        self.raw = check(self._runtime.cudaStreamCreateWithFlags(flags), "cudaStreamCreateWithFlags")
        self._own("cudaStreamDestroy", self.raw)

    @property
    def handle(self) -> int:
        """The stream as TensorRT wants it."""
        return int(self.raw)

    def synchronize(self) -> None:
        """Wait until all work in the stream is done; what failed in it is raised here.

        Raises:
            BackendError: earlier work in the stream failed.
        """
        check(self._runtime.cudaStreamSynchronize(self.raw), "cudaStreamSynchronize")


class Event(_Owned):
    """A mark in a stream, to be waited for and to measure time with."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = check(
            self._runtime.cudaEventCreateWithFlags(self._runtime.cudaEventDefault), "cudaEventCreateWithFlags"
        )
        self._own("cudaEventDestroy", self.raw)

    def record(self, stream: Stream) -> None:
        """Put the mark behind the work that is in the stream now."""
        check(self._runtime.cudaEventRecord(self.raw, stream.raw), "cudaEventRecord")

    def synchronize(self) -> None:
        """Wait until the work before the mark is done."""
        check(self._runtime.cudaEventSynchronize(self.raw), "cudaEventSynchronize")

    def elapsed_ms(self, start: "Event") -> float:
        """Milliseconds between `start` and this mark; both have been reached."""
        return float(check(self._runtime.cudaEventElapsedTime(start.raw, self.raw), "cudaEventElapsedTime"))


class DeviceBuffer(_Owned):
    """Bytes on the device, none at first; it grows and never shrinks.

    Attributes:
        address: of the first byte, a multiple of 256; it changes when the buffer grows.
        size_bytes: how many there are.
    """

    def __init__(self, size_bytes: int = 0) -> None:
        super().__init__()
        self.address = 0
        self.size_bytes = 0
        self.reserve(size_bytes)

    def reserve(self, size_bytes: int) -> None:
        """Make sure of this many bytes; growing loses what was in them.

        Raises:
            BackendError: the device has no memory left.
        """
        if size_bytes <= self.size_bytes:
            return
        self.close()
        self.address = int(check(self._runtime.cudaMalloc(size_bytes), "cudaMalloc"))
        self.size_bytes = size_bytes
        self._own("cudaFree", self.address)

    def close(self) -> None:
        """Free the bytes; `reserve` takes new ones."""
        super().close()
        self.address = self.size_bytes = 0


class PinnedBuffer(_Owned):
    """Bytes of the host that the device copies from and to without the CPU; grows and never shrinks."""

    def __init__(self, size_bytes: int = 0) -> None:
        super().__init__()
        self.address = 0
        self.size_bytes = 0
        self.reserve(size_bytes)

    def reserve(self, size_bytes: int) -> None:
        """Make sure of this many bytes; growing loses what was in them and makes earlier views invalid.

        Raises:
            BackendError: the host can pin no more memory.
        """
        if size_bytes <= self.size_bytes:
            return
        self.close()
        flags = self._runtime.cudaHostAllocDefault
        self.address = int(check(self._runtime.cudaHostAlloc(size_bytes, flags), "cudaHostAlloc"))
        self.size_bytes = size_bytes
        self._own("cudaFreeHost", self.address)

    def close(self) -> None:
        """Free the bytes; `reserve` takes new ones. Earlier views are invalid from now on."""
        super().close()
        self.address = self.size_bytes = 0

    def view(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """The first bytes as an array, not a copy; use it no longer than the buffer.

        Args:
            shape: of the array, with at least one element.
            dtype: of its elements.
        """
        wanted = np.dtype(dtype)
        size_bytes = int(np.prod(shape, dtype=np.int64)) * wanted.itemsize
        assert 0 < size_bytes <= self.size_bytes, "reserve first"
        raw = np.ctypeslib.as_array((ctypes.c_ubyte * size_bytes).from_address(self.address))
        return raw.view(wanted).reshape(shape)


def copy_to_device(target: int, source: PinnedBuffer, size_bytes: int, stream: Stream) -> None:
    """Queue a copy of pinned bytes to a device address; the bytes must stay as they are until it is done."""
    runtime = cuda_runtime()
    kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    check(runtime.cudaMemcpyAsync(target, source.address, size_bytes, kind, stream.raw), "cudaMemcpyAsync")


def copy_to_host(target: PinnedBuffer, source: int, size_bytes: int, stream: Stream) -> None:
    """Queue a copy from a device address to pinned bytes; they are there once the stream is synchronised."""
    runtime = cuda_runtime()
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
    check(runtime.cudaMemcpyAsync(target.address, source, size_bytes, kind, stream.raw), "cudaMemcpyAsync")


class CapturedGraph(_Owned):
    """Work of a stream, recorded once to be launched as one; made by `capture_graph`."""

    def __init__(self, graph: Any) -> None:
        super().__init__()
        self.raw = check(self._runtime.cudaGraphInstantiate(graph, 0), "cudaGraphInstantiate")
        self._own("cudaGraphExecDestroy", self.raw)

    def launch(self, stream: Stream) -> None:
        """Queue the recorded work."""
        check(self._runtime.cudaGraphLaunch(self.raw, stream.raw), "cudaGraphLaunch")


def capture_graph(stream: Stream, enqueue: Callable[[], None]) -> CapturedGraph:
    """Record what `enqueue` puts into the stream, without running it.

    The capture concerns this thread alone: others may allocate memory meanwhile. Whatever happens, the stream is out of
    capture mode afterwards.

    Args:
        stream: to record.
        enqueue: puts work into the stream.

    Raises:
        BackendError: the work cannot be captured; and what `enqueue` raises.
    """
    runtime = cuda_runtime()
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    check(runtime.cudaStreamBeginCapture(stream.raw, mode), "cudaStreamBeginCapture")
    try:
        enqueue()
    except BaseException:
        with contextlib.suppress(BackendError):  # the first failure is the one to tell
            check(runtime.cudaGraphDestroy(_end_capture(runtime, stream)), "cudaGraphDestroy")
        raise
    graph = _end_capture(runtime, stream)
    try:
        return CapturedGraph(graph)
    finally:
        check(runtime.cudaGraphDestroy(graph), "cudaGraphDestroy")


def _end_capture(runtime: Any, stream: Stream) -> Any:
    try:
        return check(runtime.cudaStreamEndCapture(stream.raw), "cudaStreamEndCapture")
    except BackendError:
        runtime.cudaGetLastError()  # else the next call of anyone would report it again
        raise


def _release(free: Callable[..., tuple[Any, ...]], function: str, handle: tuple[Any, ...], device: int) -> None:
    """Give back; what fails here has failed before, or the process ends: there is nobody to tell."""
    try:
        with on_device(device):
            check(free(*handle), function)
    except Exception as error:
        _log.debug("%s: %s", function, error)


def _cuda_error(error: Any, function: str) -> BackendError:
    code = getattr(error, "name", str(error))
    _, text = cuda_runtime().cudaGetErrorString(error)
    described = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    remedy = _REMEDIES.get(code, "")
    return BackendError(f"{function} failed: {code} ({described}){'. ' if remedy else ''}{remedy}", code=code)
