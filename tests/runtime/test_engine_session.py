"""One engine on the simulator: shapes, dtypes, CUDA graphs, threads, and everything given back."""

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tclkit.runtime import engine_session
from tclkit.runtime.bundle import Bundle
from tclkit.runtime.cuda_memory import DeviceBuffer, Stream
from tclkit.runtime.engine_session import EngineSession, LoadedEngine, load_engine
from tclkit.runtime.engines import EngineFile, current_device, find_engine
from tclkit.runtime.errors import BackendError, InputError, TclkitError
from tclkit.runtime.onnxruntime_backend import OnnxRuntimeBackend

GRIDS = {"grounded": (128, 64, 64), "kp": (128, 16, 16)}


@pytest.fixture
def simulator(tensorrt_simulator: Callable[..., Any]) -> Any:
    return tensorrt_simulator("10.3.0")


@pytest.fixture
def bundle(simulator: Any, shapes_folder: Path, build_engines: Callable[..., Bundle]) -> Bundle:
    return build_engines(simulator, shapes_folder)


@pytest.fixture
def stream(simulator: Any) -> Iterator[Stream]:
    with Stream() as opened:
        yield opened


def loaded(bundle: Bundle, graph: str = "masks") -> LoadedEngine:
    device = current_device()
    file = find_engine(bundle, graph=graph, precision="fp32", size=(128, 128), device=device)
    assert isinstance(file, EngineFile)
    return load_engine(file, device=device, remedy="Rebuild it")


@pytest.fixture
def session(bundle: Bundle, stream: Stream) -> Iterator[EngineSession]:
    """Of the masks graph: four inputs of which two have a free size, one is a scalar."""
    with EngineSession(loaded(bundle), stream) as opened:
        yield opened


@pytest.fixture
def feeds() -> Callable[..., dict[str, NDArray[Any]]]:
    def make(batch: int = 1, prompts: int = 3, seed: int = 0) -> dict[str, NDArray[Any]]:
        generator = np.random.default_rng(seed)
        arrays = {name: generator.normal(size=(batch, *shape)) for name, shape in GRIDS.items()}
        arrays |= {"text": generator.normal(size=(prompts, 128)), "kp_w": np.asarray(0.25)}
        return {name: array.astype(np.float32) / 10 for name, array in arrays.items()}

    return make


@pytest.fixture
def expected(bundle: Bundle) -> Callable[[dict[str, NDArray[Any]]], NDArray[np.float32]]:
    """The masks that ONNX Runtime gives."""
    backend = OnnxRuntimeBackend(bundle, threads=1)

    def run(arrays: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        return backend._run("masks.onnx", ("masks",), dict(arrays))[0]

    return run


Feeds = Callable[..., dict[str, NDArray[Any]]]
Expected = Callable[[dict[str, NDArray[Any]]], NDArray[np.float32]]


def masks_of(session: EngineSession, arrays: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    return session.to_host(session.run(arrays)["masks"])


def test_tensors_are_bound_by_name(session: EngineSession) -> None:
    assert {name: info.is_input for name, info in session.tensors.items()} == {
        "grounded": True,
        "kp": True,
        "text": True,
        "kp_w": True,
        "masks": False,
    }
    assert session.tensors["text"].smallest == (1, 128)
    assert session.tensors["text"].largest == (32, 128)
    assert session.tensors["kp_w"].largest == ()
    assert session.tensors["masks"].dtype == np.float32


def test_shapes_back_and_forth_through_cuda_graphs(
    simulator: Any, session: EngineSession, feeds: Feeds, expected: Expected
) -> None:
    """Each shape is queued plainly, then captured, then launched; with other values every time."""
    shapes = [(1, 3), (1, 17), (4, 1)]
    seed = 0
    for _ in range(4):
        for batch, prompts in shapes:
            seed += 1
            arrays = feeds(batch, prompts, seed)
            np.testing.assert_allclose(masks_of(session, arrays), expected(arrays), atol=1e-5)
    assert session.captured_graphs == 3
    # What grows moves to another address and counts as new: only the largest shapes come to be launched from the start.
    assert simulator.device.calls["cudaGraphLaunch"] >= 3


def test_a_shape_that_stays_is_launched_from_the_third_time_on(
    simulator: Any, session: EngineSession, feeds: Feeds
) -> None:
    for _ in range(5):
        masks_of(session, feeds())
    assert simulator.device.calls["cudaGraphLaunch"] == 3


def test_each_graph_has_a_context_of_its_own_on_shared_activation_memory(
    simulator: Any, bundle: Bundle, stream: Stream, feeds: Feeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA: one context for each captured graph, and the memory of activations given to all of them."""
    engine = loaded(bundle)
    made: list[Any] = []
    given: list[tuple[int, int]] = []
    real = simulator.tensorrt.ICudaEngine.create_execution_context
    monkeypatch.setattr(
        simulator.tensorrt.ICudaEngine,
        "create_execution_context",
        lambda self, strategy: made.append(strategy) or real(self, strategy),
    )
    give = simulator.tensorrt.IExecutionContext.set_device_memory
    monkeypatch.setattr(
        simulator.tensorrt.IExecutionContext,
        "set_device_memory",
        lambda self, memory, size: given.append((memory, size)) or give(self, memory, size),
    )
    with EngineSession(engine, stream) as session:
        for prompts in (32, 32, 3, 3, 3, 32):
            masks_of(session, feeds(prompts=prompts))
        assert session.captured_graphs == 2
        scratch = session._held.scratch
        assert given == [(scratch.address, engine.engine.device_memory_size_v2)] * 3
    assert made == [simulator.tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED] * 3


def test_few_graphs_are_kept(simulator: Any, session: EngineSession, feeds: Feeds, expected: Expected) -> None:
    masks_of(session, feeds(4, 32))  # from here on nothing grows
    for prompts in range(1, 8):
        for seed in range(3):
            arrays = feeds(1, prompts, seed)
            np.testing.assert_allclose(masks_of(session, arrays), expected(arrays), atol=1e-5)
    assert session.captured_graphs == 4
    assert len([line for line in simulator.leaks() if "graph exec" in line]) == 4


def test_without_capture(simulator: Any, bundle: Bundle, stream: Stream, feeds: Feeds) -> None:
    with EngineSession(loaded(bundle), stream, capture=False) as session:
        for _ in range(4):
            masks_of(session, feeds())
        assert session.captured_graphs == 0
    assert simulator.device.calls["cudaGraphLaunch"] == 0


def test_where_capture_fails_one_line_says_so(
    simulator: Any,
    session: EngineSession,
    feeds: Feeds,
    expected: Expected,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = simulator.cudart.cudaStreamEndCapture

    def invalidated(stream: Any) -> Any:
        real(stream)
        return simulator.cudart.cudaError_t.cudaErrorStreamCaptureInvalidated, None

    monkeypatch.setattr(simulator.cudart, "cudaStreamEndCapture", invalidated)
    with caplog.at_level(logging.WARNING):
        for seed in range(5):
            arrays = feeds(seed=seed)
            np.testing.assert_allclose(masks_of(session, arrays), expected(arrays), atol=1e-5)
    (line,) = caplog.messages
    assert "runs without CUDA graphs: cudaStreamEndCapture failed: cudaErrorStreamCaptureInvalidated" in line
    assert session.captured_graphs == 0
    simulator.device.graphs.clear()  # those that the failing call kept from us


def test_no_memory_for_another_context_is_no_reason_to_stop(
    session: EngineSession, feeds: Feeds, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> Any:
        raise BackendError("no memory")

    monkeypatch.setattr(session, "_make_context", full)
    for seed in range(4):
        arrays = feeds(seed=seed)
        np.testing.assert_allclose(masks_of(session, arrays), expected(arrays), atol=1e-5)
    assert session.captured_graphs == 0


def test_tensors_that_are_on_the_device_are_read_in_place(
    bundle: Bundle, stream: Stream, session: EngineSession, random_images: Callable[..., Any], feeds: Feeds
) -> None:
    with (
        EngineSession(loaded(bundle, "image"), stream) as image,
        DeviceBuffer() as grounded,
        DeviceBuffer() as kp,
    ):
        features = image.run({"image": random_images(2)}, {"grounded": grounded, "kp": kp})
        assert features["grounded"].address == grounded.address
        texts = {name: array for name, array in feeds().items() if name not in features}
        there = masks_of(session, {**features, **texts})
        over_host = {name: image.to_host(tensor) for name, tensor in features.items()}
        np.testing.assert_array_equal(there, masks_of(session, {**over_host, **texts}))


def test_views_and_two_runs_before_one_wait(session: EngineSession, feeds: Feeds, expected: Expected) -> None:
    """The second run's inputs must not reach pinned memory before the first run has read its own."""
    first, second = feeds(seed=1), feeds(seed=2)
    second["text"] = np.asfortranarray(second["text"])
    session.run(first)
    np.testing.assert_allclose(masks_of(session, second), expected(second), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": np.zeros((33, 128), np.float32)}, r"for text of \(1 to 32, 128\), found \(33, 128\).*--max-prompts"),
        ({"text": np.zeros((0, 128), np.float32)}, r"found \(0, 128\)"),
        ({"text": np.zeros((3, 64), np.float32)}, r"found \(3, 64\)"),
        ({"text": np.zeros(128, np.float32)}, r"found \(128,\)"),
        ({"text": np.zeros((3, 128), np.float64)}, "takes text as float32, found float64"),
        ({"grounded": np.zeros((5, 128, 64, 64), np.float32)}, r"grounded of \(1 to 4, 128, 64, 64\), found \(5,"),
        (
            {"texts": np.zeros((3, 128), np.float32)},
            "takes grounded, kp, kp_w, text, found grounded, kp, kp_w, text, t",
        ),
    ],
)
def test_inputs_that_do_not_fit(session: EngineSession, feeds: Feeds, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        session.run(feeds() | change)


def test_a_stream_that_was_closed_too_early(bundle: Bundle, feeds: Feeds, simulator: Any) -> None:
    stream = Stream()
    session = EngineSession(loaded(bundle), stream)
    masks_of(session, feeds())
    stream.close()
    with pytest.raises(TclkitError, match="is closed, or its stream is"):
        session.run(feeds())
    session.close()
    gc.collect()
    assert simulator.leaks() == []


def test_what_tensorrt_refuses_is_told_with_its_reason(
    session: EngineSession, feeds: Feeds, monkeypatch: pytest.MonkeyPatch, simulator: Any
) -> None:
    arrays = feeds()
    masks_of(session, arrays)
    context = session._held.context
    with monkeypatch.context() as patched:
        patched.setattr(type(context), "execute_async_v3", lambda self, handle: False)
        with pytest.raises(BackendError, match=r"masks-fp32.*could not be run: .*--backend onnxruntime"):
            session.run(feeds(prompts=5))
    with monkeypatch.context() as patched:
        patched.setattr(type(context), "set_input_shape", lambda self, name, shape: False)
        with pytest.raises(BackendError, match=r"refuses the shape \(1, 128, 64, 64\) for grounded"):
            session.run(feeds(prompts=6))
    with monkeypatch.context() as patched:
        patched.setattr(type(context), "set_tensor_address", lambda self, name, memory: False)
        with pytest.raises(BackendError, match="refuses the address 0x"):
            session.run(feeds(prompts=7))
    with monkeypatch.context() as patched:
        patched.setattr(type(context), "infer_shapes", lambda self: ["text"])
        with pytest.raises(BackendError, match="cannot tell the shapes of its outputs"):
            session.run(feeds(prompts=8))


def in_a_thread(use: Callable[[], Any]) -> list[Exception]:
    errors: list[Exception] = []

    def run() -> None:
        try:
            use()
        except TclkitError as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="second")
    thread.start()
    thread.join()
    return errors


def test_another_thread_may_go_on_with_a_session(session: EngineSession, feeds: Feeds, expected: Expected) -> None:
    """From plain runs over the capture to launches, each in a thread that ends afterwards."""
    found: list[NDArray[np.float32]] = []
    for _ in range(4):
        assert in_a_thread(lambda: found.append(masks_of(session, feeds()))) == []
        found.append(masks_of(session, feeds()))
    for masks in found:
        np.testing.assert_allclose(masks, expected(feeds()), atol=1e-5)
    assert session.captured_graphs == 1


def test_two_threads_at_once_are_refused(
    bundle: Bundle, stream: Stream, session: EngineSession, feeds: Feeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on two sessions of one stream: the work of the one would be recorded with the other's."""
    masks = session.run(feeds())["masks"]
    errors: list[Exception] = []
    real = session._execute
    with EngineSession(loaded(bundle), stream) as other:

        def meanwhile(context: Any) -> None:
            errors.extend(in_a_thread(lambda: session.run(feeds())))
            errors.extend(in_a_thread(lambda: session.to_host(masks)))
            errors.extend(in_a_thread(lambda: other.run(feeds())))
            real(context)

        with monkeypatch.context() as patched:
            patched.setattr(session, "_execute", meanwhile)
            session.run(feeds(prompts=4))
        assert len(errors) == 3
        for error in errors:
            assert "is used by another thread just now. Use them one after another, or open a Segmenter in" in str(
                error
            )
        assert in_a_thread(lambda: other.run(feeds())) == []


def test_a_session_stays_on_its_device(
    tensorrt_simulator: Callable[..., Any], shapes_folder: Path, build_engines: Callable[..., Bundle], feeds: Feeds
) -> None:
    """CUDA's current device is a thread's own, and 0 in a new one; the simulator's faults fail the test."""
    simulator = tensorrt_simulator("10.3.0", device_count=2)
    bundle = build_engines(simulator, shapes_folder)
    runtime = simulator.cudart
    runtime.cudaSetDevice(1)
    with Stream() as stream, EngineSession(loaded(bundle), stream) as session:
        before = masks_of(session, feeds())
        assert in_a_thread(lambda: masks_of(session, feeds(prompts=9))) == []  # more memory is taken there
        runtime.cudaSetDevice(0)
        for _ in range(3):
            np.testing.assert_array_equal(masks_of(session, feeds()), before)
        assert runtime.cudaGetDevice() == (0, 0)  # as the caller left it
        assert {one.device for one in simulator.device.live_allocations()} == {1}
        with Stream() as elsewhere, EngineSession(loaded(bundle), elsewhere) as other:  # an engine of its own
            np.testing.assert_array_equal(masks_of(other, feeds()), before)
    gc.collect()
    assert simulator.leaks() == []


def test_sessions_share_an_engine_and_the_last_one_lets_it_go(
    bundle: Bundle, stream: Stream, feeds: Feeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = EngineSession(loaded(bundle), stream)
    monkeypatch.setattr(engine_session, "_deserialized", lambda *arguments: pytest.fail("deserialised twice"))
    second = EngineSession(loaded(bundle), stream)
    np.testing.assert_array_equal(masks_of(first, feeds()), masks_of(second, feeds()))
    first.close()
    assert len(engine_session._LOADED) == 1
    masks_of(second, feeds())
    second.close()
    gc.collect()
    assert len(engine_session._LOADED) == 0


def test_sessions_in_two_threads(bundle: Bundle, feeds: Feeds, expected: Expected) -> None:
    """Each with a stream and a context of its own, on one engine."""
    kept = loaded(bundle)
    results: dict[int, bool] = {}

    def use(number: int) -> None:
        with Stream() as stream, EngineSession(loaded(bundle), stream) as session:
            arrays = [feeds(prompts=number + 1, seed=seed) for seed in range(5)]
            found = [masks_of(session, each) for each in arrays]
            results[number] = all(
                np.abs(masks - expected(each)).max() < 1e-5 for masks, each in zip(found, arrays, strict=True)
            )

    threads = [threading.Thread(target=use, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: True, 1: True}
    assert kept.tensors["masks"].name == "masks"


def test_everything_is_given_back(simulator: Any, bundle: Bundle, feeds: Feeds) -> None:
    with Stream() as stream:
        session = EngineSession(loaded(bundle), stream)
        for _ in range(3):
            masks_of(session, feeds())
        session.close()
        session.close()
        with pytest.raises(TclkitError, match=r"the session of masks-fp32-128x128-trt10\.3\.0-sm87\.engine is closed"):
            session.run(feeds())
    gc.collect()
    assert simulator.leaks() == []


def test_a_session_that_is_forgotten(simulator: Any, bundle: Bundle, feeds: Feeds) -> None:
    stream = Stream()
    session = EngineSession(loaded(bundle), stream)
    for _ in range(3):
        session.run(feeds())  # work that nobody waited for
    del session, stream
    gc.collect()
    assert simulator.leaks() == []


def test_a_session_that_does_not_fit_the_device(
    tensorrt_simulator: Callable[..., Any], shapes_folder: Path, build_engines: Callable[..., Bundle]
) -> None:
    simulator = tensorrt_simulator("10.3.0")
    bundle = build_engines(simulator, shapes_folder)
    simulator.device.memory_bytes = 1 << 15
    with Stream() as stream, pytest.raises(BackendError, match="cudaErrorMemoryAllocation"):
        EngineSession(loaded(bundle), stream)
    gc.collect()
    assert simulator.leaks() == []
