"""Device memory, streams and captured graphs on the simulator: grown, released once, and clear when they fail."""

import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tclkit.runtime import cuda_memory
from tclkit.runtime.cuda_memory import (
    DeviceBuffer,
    Event,
    PinnedBuffer,
    Stream,
    capture_graph,
    copy_to_device,
    copy_to_host,
    cuda_runtime,
    current_device_number,
    device_count,
    device_name_and_capability,
    on_device,
)
from tclkit.runtime.errors import BackendError

Install = Callable[..., Any]


@pytest.fixture
def simulator(tensorrt_simulator: Install) -> Any:
    return tensorrt_simulator("10.3.0", memory_bytes=1 << 20)


def test_the_device(simulator: Any) -> None:
    assert device_count() == 1
    assert device_name_and_capability() == ("Orin", "8.7")


def test_bytes_go_up_and_come_back(simulator: Any) -> None:
    with Stream() as stream, DeviceBuffer(24) as device, PinnedBuffer(24) as up, PinnedBuffer(24) as down:
        up.view((2, 3), np.float32)[...] = [[1, 2, 3], [4, 5, 6]]
        copy_to_device(device.address, up, 24, stream)
        copy_to_host(down, device.address, 24, stream)
        stream.synchronize()
        np.testing.assert_array_equal(down.view((3, 2), np.float32), [[1, 2], [3, 4], [5, 6]])
    assert simulator.leaks() == []


@pytest.mark.parametrize("kind", [DeviceBuffer, PinnedBuffer])
def test_buffers_grow_and_never_shrink(simulator: Any, kind: Any) -> None:
    buffer = kind()
    assert (buffer.address, buffer.size_bytes, buffer.is_closed) == (0, 0, True)
    buffer.reserve(100)
    first = buffer.address
    buffer.reserve(50)
    assert (buffer.address, buffer.size_bytes) == (first, 100)
    buffer.reserve(200)
    assert (buffer.address != first, buffer.size_bytes) == (True, 200)
    assert len(simulator.leaks()) == 1
    buffer.close()
    buffer.close()
    assert simulator.leaks() == []
    assert buffer.size_bytes == 0
    buffer.reserve(10)
    assert not buffer.is_closed
    buffer.close()


@pytest.mark.parametrize("make", [Stream, Event, lambda: DeviceBuffer(8), lambda: PinnedBuffer(8)])
def test_the_garbage_collector_is_the_net(simulator: Any, make: Callable[[], Any]) -> None:
    thing = make()
    assert len(simulator.leaks()) == 1
    del thing
    gc.collect()
    assert simulator.leaks() == []


def test_events_measure(simulator: Any) -> None:
    with Stream() as stream, Event() as start, Event() as end:
        start.record(stream)
        end.record(stream)
        end.synchronize()
        assert 0 <= end.elapsed_ms(start) < 1000


def test_the_current_device_is_set_and_left_as_it_was(tensorrt_simulator: Install) -> None:
    tensorrt_simulator("10.3.0", device_count=2)
    with on_device(1):
        assert current_device_number() == 1
        with on_device(1), on_device(0):
            assert current_device_number() == 0
        assert current_device_number() == 1
    with pytest.raises(ZeroDivisionError), on_device(1):
        print(1 / 0)
    assert current_device_number() == 0
    with pytest.raises(BackendError, match="cudaSetDevice failed: cudaErrorInvalidDevice"), on_device(2):
        pass


def test_a_captured_graph_runs_when_it_is_launched(simulator: Any) -> None:
    with Stream() as stream, DeviceBuffer(4) as device, PinnedBuffer(4) as up, PinnedBuffer(4) as down:
        value = up.view((1,), np.int32)
        down.view((1,), np.int32)[0] = 0

        def there_and_back() -> None:
            copy_to_device(device.address, up, 4, stream)
            copy_to_host(down, device.address, 4, stream)

        with capture_graph(stream, there_and_back) as graph:
            stream.synchronize()
            assert down.view((1,), np.int32)[0] == 0  # recorded, not run
            for number in (7, 8):
                value[0] = number
                graph.launch(stream)
                stream.synchronize()
                assert down.view((1,), np.int32)[0] == number
    assert simulator.leaks() == []


def test_a_capture_that_fails_leaves_the_stream_usable(simulator: Any) -> None:
    with Stream() as stream, PinnedBuffer(4) as pinned, DeviceBuffer(4) as device:
        with pytest.raises(BackendError, match=r"cudaMalloc failed: cudaErrorStreamCaptureUnsupported"):
            capture_graph(stream, lambda: DeviceBuffer(8).close())
        with pytest.raises(ZeroDivisionError):
            capture_graph(stream, lambda: print(1 / 0))
        with pytest.raises(BackendError, match=r"cudaStreamEndCapture failed: cudaErrorStreamCaptureInvalidated"):
            capture_graph(stream, lambda: _ignoring_errors(stream.synchronize))
        copy_to_device(device.address, pinned, 4, stream)
        stream.synchronize()
    assert simulator.leaks() == []


def _ignoring_errors(call: Callable[[], None]) -> None:
    with pytest.raises(BackendError):
        call()


def test_a_full_device_names_the_error_and_what_to_do(simulator: Any) -> None:
    with pytest.raises(
        BackendError, match=r"cudaMalloc failed: cudaErrorMemoryAllocation .*smaller --max-batch"
    ) as info:
        DeviceBuffer(2 << 20)
    assert info.value.values["code"] == "cudaErrorMemoryAllocation"
    assert simulator.leaks() == []


def test_growing_that_fails_leaves_an_empty_buffer(simulator: Any) -> None:
    buffer = DeviceBuffer(16)
    with pytest.raises(BackendError):
        buffer.reserve(2 << 20)
    assert (buffer.address, buffer.size_bytes) == (0, 0)
    buffer.close()
    assert simulator.leaks() == []


def test_no_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match=r'cuda-python cannot be imported .* pip install "\.\[tensorrt\]"'):
        cuda_runtime()


def test_no_device(simulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code = simulator.cudart.cudaError_t.cudaErrorNoDevice
    monkeypatch.setattr(simulator.cudart, "cudaGetDeviceCount", lambda: (code, None))
    with pytest.raises(BackendError, match=r"cudaErrorNoDevice .*CUDA_VISIBLE_DEVICES hides devices"):
        device_count()
    monkeypatch.setattr(simulator.cudart, "cudaGetDeviceCount", lambda: (simulator.cudart.cudaError_t.cudaSuccess, 0))
    with pytest.raises(BackendError, match="CUDA counts no devices"):
        device_name_and_capability()


def test_no_cuda_library(simulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("Failed to dlopen libcudart")

    monkeypatch.setattr(simulator.cudart, "cudaGetDeviceCount", fail)
    with pytest.raises(
        BackendError, match=r"CUDA cannot be loaded \(Failed to dlopen libcudart\)\. Install NVIDIA's driver"
    ):
        device_count()


def test_what_fails_on_release_raises_nothing(simulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = simulator.cudart.cudaError_t.cudaErrorIllegalAddress
    buffer = DeviceBuffer(8)
    monkeypatch.setattr(cuda_memory, "check", lambda *arguments: (_ for _ in ()).throw(BackendError(str(broken))))
    buffer.close()
    assert buffer.is_closed
