"""Simulated device memory, streams, events and graphs, under the names of `cuda.bindings.runtime`.

"Device" memory is host memory, filled with garbage. Work on a stream is queued and runs when something waits for it, so
that reading a result before synchronising yields garbage, as it may on a GPU; copies that touch pageable host memory
behave as CUDA documents them (the source is read at once, the destination is written before the call returns). Freed
memory is never handed out again while the simulator lives, so use after free is found exactly.
"""

# ruff: noqa: N801, N802, N815 - the names are CUDA's

import collections
import ctypes
import enum
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

ALIGNMENT = 256  # bytes, of every device allocation
_GARBAGE = 0xCD


# fmt: off
class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalState = 401
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorStreamCaptureImplicit = 906
    cudaErrorCapturedEvent = 907
    cudaErrorStreamCaptureWrongThread = 908


_MESSAGES = {
    cudaError_t.cudaSuccess: b"no error",
    cudaError_t.cudaErrorInvalidValue: b"invalid argument",
    cudaError_t.cudaErrorMemoryAllocation: b"out of memory",
    cudaError_t.cudaErrorInsufficientDriver: b"CUDA driver version is insufficient for CUDA runtime version",
    cudaError_t.cudaErrorNoDevice: b"no CUDA-capable device is detected",
    cudaError_t.cudaErrorInvalidDevice: b"invalid device ordinal",
    cudaError_t.cudaErrorInvalidResourceHandle: b"invalid resource handle",
    cudaError_t.cudaErrorIllegalState: b"the operation cannot be performed in the present state",
    cudaError_t.cudaErrorNotReady: b"device not ready",
    cudaError_t.cudaErrorIllegalAddress: b"an illegal memory access was encountered",
    cudaError_t.cudaErrorStreamCaptureUnsupported: b"operation not permitted when stream is capturing",
    cudaError_t.cudaErrorStreamCaptureInvalidated: b"operation failed due to a previous error during capture",
    cudaError_t.cudaErrorStreamCaptureImplicit:
        b"operation would make the legacy stream depend on a capturing blocking stream",
    cudaError_t.cudaErrorStreamCaptureWrongThread:
        b"attempt to terminate a thread-local capture sequence from another thread",
    cudaError_t.cudaErrorCapturedEvent: b"operation not permitted on an event last recorded in a capturing stream",
}
# fmt: on


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3
    cudaMemcpyDefault = 4


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class cudaStreamCaptureStatus(enum.IntEnum):
    cudaStreamCaptureStatusNone = 0
    cudaStreamCaptureStatusActive = 1
    cudaStreamCaptureStatusInvalidated = 2


class _Handle:
    """A handle as cuda-python gives it: an object that converts to an int."""

    def __init__(self, init_value: int = 0) -> None:
        self._value = int(init_value)

    def __int__(self) -> int:
        return self._value

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and int(other) == self._value  # type: ignore[call-overload, no-any-return]

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._value:#x}>"


class cudaStream_t(_Handle):
    pass


class cudaEvent_t(_Handle):
    pass


class cudaGraph_t(_Handle):
    pass


class cudaGraphExec_t(_Handle):
    pass


class cudaDeviceProp:
    """The properties of the device that the simulator knows."""

    def __init__(self, device: "Device | None" = None) -> None:
        self.name = b"" if device is None else device.name.encode()
        self.major, self.minor = (0, 0) if device is None else device.compute_capability
        self.totalGlobalMem = 0 if device is None else device.memory_bytes
        self.multiProcessorCount = 0 if device is None else device.multiprocessors
        self.integrated = 0 if device is None else int(device.integrated)


SUCCESS = cudaError_t.cudaSuccess
Work = Callable[[], None]


class DeviceFaultError(Exception):
    """Work on a stream did something that breaks a real device's context."""


@dataclass
class Allocation:
    """Memory handed out: `kind` is "device" or "pinned", `device` the number of the one that was current."""

    kind: str
    address: int
    size: int
    memory: np.ndarray
    device: int
    alive: bool = True


@dataclass
class _Capture:
    mode: cudaStreamCaptureMode
    thread: int
    work: list[Work] = field(default_factory=list)
    valid: bool = True


@dataclass
class _Stream:
    blocking: bool
    device: int = 0
    queue: "collections.deque[Work]" = field(default_factory=collections.deque)
    queued: int = 0
    done: int = 0
    capture: _Capture | None = None


@dataclass
class _Event:
    device: int = 0
    stream: _Stream | None = None
    ticket: int = 0
    captured: bool = False
    time_s: float | None = None


@dataclass(kw_only=True)
class Device:
    """One simulated GPU: its memory, streams and graphs.

    Args:
        name: as the driver would tell it.
        compute_capability: (major, minor).
        memory_bytes: what cudaMalloc can hand out in all.
        multiprocessors: count.
        integrated: whether it shares memory with the CPU, as on a Jetson.
        dla_cores: deep-learning accelerators beside the GPU.
        cuda_version: as 12060 for 12.6.
        count: of such devices in the machine; memory is counted over all of them.
    """

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int = 8 << 30
    multiprocessors: int = 16
    integrated: bool = False
    dla_cores: int = 0
    cuda_version: int = 12060
    count: int = 1
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    broken: cudaError_t = SUCCESS
    faults: list[str] = field(default_factory=list)
    calls: "collections.Counter[str]" = field(default_factory=collections.Counter)

    def __post_init__(self) -> None:
        self._allocations: dict[int, Allocation] = {}
        self._freed: list[Allocation] = []
        self._numbers = itertools.count(0x51000, 16)
        self._thread = threading.local()
        self.streams: dict[int, _Stream] = {0: _Stream(blocking=True)}
        self.events: dict[int, _Event] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.graph_execs: dict[int, list[Work]] = {}

    @property
    def current(self) -> int:
        """Number of the calling thread's current device: 0 until it sets another."""
        return int(getattr(self._thread, "current", 0))

    @current.setter
    def current(self, number: int) -> None:
        self._thread.current = number

    # memory

    def allocate(self, kind: str, size: int) -> int | None:
        """Address of fresh memory full of garbage, aligned to 256 bytes; None when the device is full."""
        if kind == "device" and self.used_bytes() + size > self.memory_bytes:
            return None
        memory = np.full(size + ALIGNMENT, _GARBAGE, np.uint8)
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._allocations[address] = Allocation(kind, address, size, memory, self.current)
        return address

    def release(self, kind: str, address: int) -> bool:
        """Take memory back; False when no allocation of this kind starts there."""
        allocation = self._allocations.get(address)
        if allocation is None or allocation.kind != kind:
            return False
        del self._allocations[address]
        allocation.alive = False
        allocation.memory[:] = _GARBAGE
        self._freed.append(allocation)  # kept, so that nobody else gets this address
        return True

    def used_bytes(self) -> int:
        return sum(allocation.size for allocation in self._allocations.values() if allocation.kind == "device")

    def live_allocations(self) -> list[Allocation]:
        return list(self._allocations.values())

    def find(self, address: int) -> Allocation | None:
        """The live or freed allocation this address lies in; None for other host memory."""
        for allocation in itertools.chain(self._allocations.values(), self._freed):
            if allocation.address <= address < allocation.address + max(allocation.size, 1):
                return allocation
        return None

    def room(self, address: int, size: int, kind: str) -> bool:
        """Whether [address, address + size) lies in one live allocation of this kind."""
        found = self.find(address)
        fits = found is not None and address + size <= found.address + found.size
        return fits and found is not None and found.alive and found.kind == kind

    # work

    def stream(self, handle: Any) -> _Stream | None:
        return self.streams.get(0 if handle is None else int(handle))

    def enqueue(self, stream: _Stream, work: Work) -> None:
        """Queue work, or record it if the stream is being captured."""
        if stream.capture is not None:
            stream.capture.work.append(work)
        else:
            stream.queue.append(work)
            stream.queued += 1

    def drain(self, stream: _Stream, ticket: int | None = None) -> cudaError_t:
        """Run what is queued, up to a ticket; what the legacy stream waits for goes first."""
        with self.lock:
            if stream is self.streams[0]:
                for other in list(self.streams.values()):
                    if other.blocking and other is not stream:
                        self.drain(other)
            while stream.queue and (ticket is None or stream.done < ticket):
                work = stream.queue.popleft()
                stream.done += 1
                if self.broken == SUCCESS:
                    try:
                        work()
                    except DeviceFaultError as fault:
                        self.faults.append(str(fault))
                        self.broken = cudaError_t.cudaErrorIllegalAddress
            return self.broken

    def drain_all(self) -> cudaError_t:
        for stream in list(self.streams.values()):
            self.drain(stream)
        return self.broken

    def refuses_unsafe_call(self) -> bool:
        """Whether a call that capture forbids (an allocation, say) comes while one goes on; it breaks the capture."""
        refused = False
        for stream in self.streams.values():
            capture = stream.capture
            if capture is None or capture.mode == cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed:
                continue
            everyone = capture.mode == cudaStreamCaptureMode.cudaStreamCaptureModeGlobal
            if everyone or capture.thread == threading.get_ident():
                capture.valid = False
                refused = True
        return refused

    def number(self) -> int:
        return next(self._numbers)

    def leaks(self) -> list[str]:
        """What nobody has given back, one line each."""
        lines = [f"{a.kind} memory, {a.size} bytes at {a.address:#x}" for a in self._allocations.values()]
        lines += [f"stream {handle:#x}" for handle in self.streams if handle]
        lines += [f"event {handle:#x}" for handle in self.events]
        lines += [f"graph {handle:#x}" for handle in self.graphs]
        lines += [f"graph exec {handle:#x}" for handle in self.graph_execs]
        return lines


class CudaRuntime:
    """The functions of `cuda.bindings.runtime`, on one simulated device; each returns (error, value, ...)."""

    def __init__(self, device: Device) -> None:
        self._device = device

    # device

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return SUCCESS, self._device.count

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        if _size(device) >= self._device.count:
            return (cudaError_t.cudaErrorInvalidDevice,)
        self._device.current = device
        return (SUCCESS,)

    def cudaGetDevice(self) -> tuple[Any, ...]:
        return SUCCESS, self._device.current

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        if _size(device) >= self._device.count:
            return cudaError_t.cudaErrorInvalidDevice, None
        return SUCCESS, cudaDeviceProp(self._device)

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return SUCCESS, self._device.cuda_version

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return SUCCESS, self._device.cuda_version

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return SUCCESS, self._device.memory_bytes - self._device.used_bytes(), self._device.memory_bytes

    def cudaDeviceSynchronize(self) -> tuple[Any, ...]:
        with self._device.lock:
            if self._device.refuses_unsafe_call():
                return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
            return (self._device.drain_all(),)

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (self._device.broken,)

    def cudaGetErrorName(self, error: cudaError_t) -> tuple[Any, ...]:
        _instance("error", error, cudaError_t)
        return SUCCESS, error.name.encode()

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[Any, ...]:
        _instance("error", error, cudaError_t)
        return SUCCESS, _MESSAGES[error]

    # memory

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self._allocate("device", size)

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        return self._allocate("pinned", size)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return self._allocate("pinned", size)

    def cudaFree(self, devPtr: Any) -> tuple[Any, ...]:
        return self._free("device", devPtr)

    def cudaFreeHost(self, ptr: Any) -> tuple[Any, ...]:
        return self._free("pinned", ptr)

    def cudaMemcpy(self, dst: Any, src: Any, count: int, kind: cudaMemcpyKind) -> tuple[Any, ...]:
        with self._device.lock:
            if self._device.refuses_unsafe_call():
                return (cudaError_t.cudaErrorStreamCaptureImplicit,)
            error = self._device.drain(self._device.streams[0])
            return (error,) if error else (self._copy(dst, src, count, kind, self._device.streams[0], wait=True),)

    def cudaMemcpyAsync(self, dst: Any, src: Any, count: int, kind: cudaMemcpyKind, stream: Any) -> tuple[Any, ...]:
        with self._device.lock:
            found = self._device.stream(stream)
            if found is None:
                return (cudaError_t.cudaErrorInvalidResourceHandle,)
            error = self._device.broken or _capture_error(found)
            return (error or self._copy(dst, src, count, kind, found, wait=False),)

    def cudaMemsetAsync(self, devPtr: Any, value: int, count: int, stream: Any) -> tuple[Any, ...]:
        device, address, size = self._device, _pointer(devPtr), _size(count)
        with device.lock:
            found = device.stream(stream)
            if found is None:
                return (cudaError_t.cudaErrorInvalidResourceHandle,)
            if error := _capture_error(found):
                return (error,)
            if not device.room(address, size, "device"):
                return (cudaError_t.cudaErrorInvalidValue,)

            def work() -> None:
                if not device.room(address, size, "device"):
                    raise DeviceFaultError(f"a memset writes {size} bytes at {address:#x}, which was freed")
                ctypes.memset(address, value, size)

            device.enqueue(found, work)
            return (device.broken,)

    # streams and events

    def cudaStreamCreate(self) -> tuple[Any, ...]:
        return self.cudaStreamCreateWithFlags(0)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        if _size(flags) not in (0, 1):
            return cudaError_t.cudaErrorInvalidValue, None
        with self._device.lock:
            handle = self._device.number()
            self._device.streams[handle] = _Stream(blocking=flags == 0, device=self._device.current)
            return SUCCESS, cudaStream_t(handle)

    def cudaStreamDestroy(self, stream: Any) -> tuple[Any, ...]:
        with self._device.lock:
            found = self._device.stream(stream)
            if found is None or found is self._device.streams[0]:
                return (cudaError_t.cudaErrorInvalidResourceHandle,)
            error = self._device.drain(found)
            del self._device.streams[int(stream)]
            return (error,)

    def cudaStreamSynchronize(self, stream: Any) -> tuple[Any, ...]:
        with self._device.lock:
            self._device.calls["cudaStreamSynchronize"] += 1
            found = self._device.stream(stream)
            if found is None:
                return (cudaError_t.cudaErrorInvalidResourceHandle,)
            if found.capture is not None:
                found.capture.valid = False
                return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
            return (self._device.drain(found),)

    def cudaStreamQuery(self, stream: Any) -> tuple[Any, ...]:
        with self._device.lock:
            found = self._device.stream(stream)
            if found is None:
                return (cudaError_t.cudaErrorInvalidResourceHandle,)
            if found.capture is not None:
                found.capture.valid = False
                return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
            return (cudaError_t.cudaErrorNotReady if found.queue else self._device.broken,)

    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> tuple[Any, ...]:
        with self._device.lock:
            found, waited = self._device.stream(stream), self._device.events.get(int(event))
            if found is None or waited is None:
                return (cudaError_t.cudaErrorInvalidResourceHandle,)
            if waited.captured != (found.capture is not None):
                return (cudaError_t.cudaErrorCapturedEvent,)
            source, ticket = waited.stream, waited.ticket
            if source is not None and source is not found and not waited.captured:
                self._device.enqueue(found, lambda: _ignore(self._device.drain(source, ticket)))
            return (self._device.broken,)

    def cudaEventCreate(self) -> tuple[Any, ...]:
        return self.cudaEventCreateWithFlags(0)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        with self._device.lock:
            handle = self._device.number()
            self._device.events[handle] = _Event(device=self._device.current)
            return SUCCESS, cudaEvent_t(handle)

    def cudaEventRecord(self, event: Any, stream: Any) -> tuple[Any, ...]:
        with self._device.lock:
            found, recorded = self._device.stream(stream), self._device.events.get(int(event))
            if found is None or recorded is None or found.device != recorded.device:
                return (cudaError_t.cudaErrorInvalidResourceHandle,)
            if error := _capture_error(found):
                return (error,)
            recorded.captured = found.capture is not None
            recorded.stream, recorded.time_s = found, None

            def work() -> None:
                recorded.time_s = time.perf_counter()

            self._device.enqueue(found, work)
            recorded.ticket = found.queued
            return (self._device.broken,)

    def cudaEventSynchronize(self, event: Any) -> tuple[Any, ...]:
        with self._device.lock:
            found = self._device.events.get(int(event))
            if found is None:
                return (cudaError_t.cudaErrorInvalidResourceHandle,)
            if found.captured:
                return (cudaError_t.cudaErrorCapturedEvent,)
            return (self._device.broken if found.stream is None else self._device.drain(found.stream, found.ticket),)

    def cudaEventQuery(self, event: Any) -> tuple[Any, ...]:
        with self._device.lock:
            found = self._device.events.get(int(event))
            if found is None:
                return (cudaError_t.cudaErrorInvalidResourceHandle,)
            waiting = found.stream is not None and found.time_s is None
            return (cudaError_t.cudaErrorNotReady if waiting else self._device.broken,)

    def cudaEventElapsedTime(self, start: Any, end: Any) -> tuple[Any, ...]:
        with self._device.lock:
            events = [self._device.events.get(int(event)) for event in (start, end)]
            if any(event is None or event.stream is None for event in events):
                return cudaError_t.cudaErrorInvalidResourceHandle, None
            times = [event.time_s for event in events if event is not None]
            if None in times:
                return cudaError_t.cudaErrorNotReady, None
            return SUCCESS, 1e3 * (times[1] - times[0])  # type: ignore[operator]

    def cudaEventDestroy(self, event: Any) -> tuple[Any, ...]:
        with self._device.lock:
            gone = self._device.events.pop(int(event), None)
            return (cudaError_t.cudaErrorInvalidResourceHandle if gone is None else SUCCESS,)

    # graphs

    def cudaStreamBeginCapture(self, stream: Any, mode: cudaStreamCaptureMode) -> tuple[Any, ...]:
        _instance("mode", mode, cudaStreamCaptureMode)
        with self._device.lock:
            found = self._device.stream(stream)
            if found is None:
                return (cudaError_t.cudaErrorInvalidResourceHandle,)
            if found is self._device.streams[0]:
                return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
            if found.capture is not None:
                return (cudaError_t.cudaErrorIllegalState,)
            found.capture = _Capture(mode, threading.get_ident())
            return (self._device.broken,)

    def cudaStreamEndCapture(self, stream: Any) -> tuple[Any, ...]:
        with self._device.lock:
            found = self._device.stream(stream)
            if found is None or found.capture is None:
                return cudaError_t.cudaErrorIllegalState, None
            relaxed = found.capture.mode == cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
            if not relaxed and found.capture.thread != threading.get_ident():
                return cudaError_t.cudaErrorStreamCaptureWrongThread, None
            capture, found.capture = found.capture, None
            if not capture.valid:
                return cudaError_t.cudaErrorStreamCaptureInvalidated, None
            handle = self._device.number()
            self._device.graphs[handle] = capture.work
            return SUCCESS, cudaGraph_t(handle)

    def cudaStreamIsCapturing(self, stream: Any) -> tuple[Any, ...]:
        with self._device.lock:
            found = self._device.stream(stream)
            if found is None:
                return cudaError_t.cudaErrorInvalidResourceHandle, None
            if found.capture is None:
                return SUCCESS, cudaStreamCaptureStatus.cudaStreamCaptureStatusNone
            if not found.capture.valid:
                return SUCCESS, cudaStreamCaptureStatus.cudaStreamCaptureStatusInvalidated
            return SUCCESS, cudaStreamCaptureStatus.cudaStreamCaptureStatusActive

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        _size(flags)
        with self._device.lock:
            work = self._device.graphs.get(int(graph))
            if work is None:
                return cudaError_t.cudaErrorInvalidValue, None
            handle = self._device.number()
            self._device.graph_execs[handle] = list(work)
            return SUCCESS, cudaGraphExec_t(handle)

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> tuple[Any, ...]:
        with self._device.lock:
            self._device.calls["cudaGraphLaunch"] += 1
            found, work = self._device.stream(stream), self._device.graph_execs.get(int(graphExec))
            if found is None:
                return (cudaError_t.cudaErrorInvalidResourceHandle,)
            if work is None:
                return (cudaError_t.cudaErrorInvalidValue,)
            if error := _capture_error(found):
                return (error,)
            for piece in work:
                self._device.enqueue(found, piece)
            return (self._device.broken,)

    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple[Any, ...]:
        with self._device.lock:
            gone = self._device.graph_execs.pop(int(graphExec), None)
            return (cudaError_t.cudaErrorInvalidValue if gone is None else SUCCESS,)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        with self._device.lock:
            gone = self._device.graphs.pop(int(graph), None)
            return (cudaError_t.cudaErrorInvalidValue if gone is None else SUCCESS,)

    def _allocate(self, kind: str, size: int) -> tuple[Any, ...]:
        with self._device.lock:
            if self._device.refuses_unsafe_call():
                return cudaError_t.cudaErrorStreamCaptureUnsupported, None
            if self._device.broken:
                return self._device.broken, None
            if _size(size) == 0:
                return SUCCESS, 0
            self._device.calls["allocate"] += 1
            address = self._device.allocate(kind, size)
            return (cudaError_t.cudaErrorMemoryAllocation, None) if address is None else (SUCCESS, address)

    def _free(self, kind: str, pointer: Any) -> tuple[Any, ...]:
        address = _pointer(pointer)
        with self._device.lock:
            if self._device.refuses_unsafe_call():
                return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
            if address == 0:
                return (SUCCESS,)
            self._device.drain_all()  # the real call waits for the device, too
            freed = self._device.release(kind, address)
            return (SUCCESS if freed else cudaError_t.cudaErrorInvalidValue,)

    def _copy(self, dst: Any, src: Any, count: int, kind: Any, stream: _Stream, *, wait: bool) -> cudaError_t:
        _instance("kind", kind, cudaMemcpyKind)
        device, target, source, size = self._device, _pointer(dst), _pointer(src), _size(count)
        sides = [device.find(source), device.find(target)]
        for address, side in zip((source, target), sides, strict=True):
            ends = side is None or address + size <= side.address + side.size
            if address == 0 or not ends or (side is not None and not side.alive):
                return cudaError_t.cudaErrorInvalidValue
        on_device = [side is not None and side.kind == "device" for side in sides]
        expected = {0: [False, False], 1: [False, True], 2: [True, False], 3: [True, True], 4: on_device}
        if on_device != expected[int(kind)]:
            return cudaError_t.cudaErrorInvalidValue
        pageable_source, pageable_target = sides[0] is None, sides[1] is None
        if stream.capture is not None and (pageable_source or pageable_target):
            stream.capture.valid = False
            return cudaError_t.cudaErrorStreamCaptureUnsupported
        staged = ctypes.string_at(source, size) if pageable_source else None

        def work() -> None:
            for side in sides:
                if side is not None and not side.alive:
                    raise DeviceFaultError(f"a copy of {size} bytes touches {side.kind} memory that was freed")
            ctypes.memmove(target, source if staged is None else staged, size)

        device.enqueue(stream, work)
        if wait or pageable_target:
            return device.drain(stream)
        return device.broken


def _capture_error(stream: _Stream) -> cudaError_t:
    """What every call on a stream says once its capture has been broken."""
    broken = stream.capture is not None and not stream.capture.valid
    return cudaError_t.cudaErrorStreamCaptureInvalidated if broken else SUCCESS


def _ignore(value: object) -> None:
    """For work whose result nobody reads."""


def _size(value: Any) -> int:
    """As Cython converts a number to an unsigned type."""
    if isinstance(value, float) or not hasattr(value, "__index__"):
        raise TypeError(f"an integer is required, found {type(value).__name__}")
    if int(value) < 0:
        raise OverflowError("can't convert negative value to size_t")
    return int(value)


def _pointer(value: Any) -> int:
    """As cuda-python converts a pointer: None, an int, or something with the buffer protocol."""
    if value is None:
        return 0
    if hasattr(value, "__index__") and not isinstance(value, np.ndarray):
        return int(value)
    return int(np.frombuffer(memoryview(value).cast("B"), np.uint8).ctypes.data)


def _instance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"Argument '{name}' is not instance of type {kind.__name__}, found {type(value).__name__}")


TYPES = (
    cudaError_t,
    cudaMemcpyKind,
    cudaStreamCaptureMode,
    cudaStreamCaptureStatus,
    cudaStream_t,
    cudaEvent_t,
    cudaGraph_t,
    cudaGraphExec_t,
    cudaDeviceProp,
)
CONSTANTS = {
    "cudaStreamDefault": 0,
    "cudaStreamNonBlocking": 1,
    "cudaHostAllocDefault": 0,
    "cudaHostAllocPortable": 1,
    "cudaEventDefault": 0,
    "cudaEventBlockingSync": 1,
    "cudaEventDisableTiming": 2,
}


def cuda_runtime_module(device: Device) -> ModuleType:
    """The stand-in for `cuda.bindings.runtime` on this device."""
    module = ModuleType("cuda.bindings.runtime", "The simulator of cuda.bindings.runtime.")
    runtime = CudaRuntime(device)
    for name in dir(runtime):
        if name.startswith("cuda"):
            setattr(module, name, getattr(runtime, name))
    for kind in TYPES:
        setattr(module, kind.__name__, kind)
    for name, value in CONSTANTS.items():
        setattr(module, name, value)
    return module
