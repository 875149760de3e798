"""One engine from one graph, on simulated machines of four TensorRT versions."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tclkit.export.engine_builder import EngineOptions, Profile, build_engine_bytes, image_profile, masks_profile
from tclkit.runtime.bundle import open_bundle
from tclkit.runtime.errors import BuildError, ConfigError, InputError

VERSIONS = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")
BUNDLE = open_bundle("tcl-shapes")
MASKS = BUNDLE.path("masks.onnx").read_bytes()
IMAGE = BUNDLE.path("image.onnx").read_bytes()
PROFILE = masks_profile(BUNDLE.manifest, 128, 128, 8, 256)
ORIN = {"compute_capability": (8, 7), "device_name": "Orin"}
H100 = {"compute_capability": (9, 0), "device_name": "NVIDIA H100"}
Install = Callable[..., Any]


def build(onnx_bytes: bytes = MASKS, profile: Profile = PROFILE, progress: Any = None, **options: Any) -> bytes:
    return build_engine_bytes(onnx_bytes, profile, EngineOptions(**options), progress=progress)


def header_of(engine: bytes, simulator_package: Any) -> Any:
    """What the simulator wrote into an engine about how it was built."""
    return sys.modules[f"{simulator_package.__name__}.engine_format"].engine_from_bytes(engine)[0]


def engine_outputs(simulator: Any, plan: bytes, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run an engine once, straight on the modules."""
    trt, cudart = simulator.tensorrt, simulator.cudart
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(plan)
    assert engine is not None, simulator.log
    context, addresses = engine.create_execution_context(), {}
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    for name in feeds:
        assert context.set_input_shape(name, feeds[name].shape), simulator.log
    results = {name: np.empty(tuple(context.get_tensor_shape(name)), np.float32) for name in names if name not in feeds}
    kinds = cudart.cudaMemcpyKind
    for name in names:
        array = feeds.get(name, results.get(name))
        assert array is not None
        _, addresses[name] = cudart.cudaMalloc(array.nbytes)
        if name in feeds:
            cudart.cudaMemcpy(addresses[name], array.ctypes.data, array.nbytes, kinds.cudaMemcpyHostToDevice)
        assert context.set_tensor_address(name, addresses[name])
    assert context.execute_async_v3(0), simulator.log
    for name, array in results.items():
        cudart.cudaMemcpy(array.ctypes.data, addresses[name], array.nbytes, kinds.cudaMemcpyDeviceToHost)
    for address in addresses.values():
        cudart.cudaFree(address)
    return results


def mask_feeds(batch: int, prompts: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch * 100 + prompts)
    shapes = {"grounded": (batch, 128, 64, 64), "text": (prompts, 128), "kp": (batch, 128, 16, 16)}
    feeds = {name: random.standard_normal(shape).astype(np.float32) / 8 for name, shape in shapes.items()}
    return feeds | {"kp_w": np.array(0.1, np.float32)}


def one_node(operator: str, opset: int = 20, **attributes: Any) -> bytes:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 4]) for name in ("x", "y")]
    node = helper.make_node(operator, ["x"], ["y"], name="the_node", **attributes)
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]), opset_imports=imports, ir_version=9)
    return bytes(model.SerializeToString())


X_PROFILE: Profile = {"x": ((1, 4), (1, 4), (8, 4))}


@pytest.mark.parametrize("version", VERSIONS)
def test_masks_engine_computes_what_the_graph_does(tensorrt_simulator: Install, version: str) -> None:
    simulator = tensorrt_simulator(version)
    plan = build()
    session = onnxruntime.InferenceSession(MASKS)
    for batch, prompts in ((1, 3), (4, 17), (1, 1)):
        feeds = mask_feeds(batch, prompts)
        expected = session.run(["masks"], feeds)[0]
        np.testing.assert_allclose(engine_outputs(simulator, plan, feeds)["masks"], expected, atol=1e-5)
    assert simulator.leaks() == []


@pytest.mark.parametrize("version", VERSIONS)
def test_image_engine_computes_what_the_graph_does(tensorrt_simulator: Install, version: str) -> None:
    simulator = tensorrt_simulator(version)
    plan = build(IMAGE, image_profile(128, 128, 4))
    image = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), np.uint8)
    expected = onnxruntime.InferenceSession(IMAGE).run(["grounded", "kp"], {"image": image})
    found = engine_outputs(simulator, plan, {"image": image})
    np.testing.assert_allclose(found["grounded"], expected[0], atol=1e-5)
    np.testing.assert_allclose(found["kp"], expected[1], atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_networks_are_strongly_typed_and_fp32_is_fp32(
    tensorrt_simulator: Install, simulator_package: Any, version: str
) -> None:
    tensorrt_simulator(version)
    header = header_of(build(), simulator_package)
    assert header.strongly_typed
    assert not header.tf32


@pytest.mark.parametrize("version", VERSIONS)
def test_options_reach_the_builder(tensorrt_simulator: Install, simulator_package: Any, version: str) -> None:
    tensorrt_simulator(version, **H100)
    plain = header_of(build(), simulator_package)
    chosen = header_of(build(workspace_mb=64, hardware_compatible=True, version_compatible=True), simulator_package)
    assert (plain.hardware_level, plain.version_compatible, plain.dla) == ("NONE", False, False)
    assert (chosen.hardware_level, chosen.version_compatible, chosen.dla) == ("AMPERE_PLUS", True, False)
    assert chosen.workspace_bytes == 64 << 20
    assert chosen.profile["text"] == [[1, 128], [16, 128], [256, 128]]


@pytest.mark.parametrize("version", VERSIONS)
def test_dla_falls_back_to_the_gpu(tensorrt_simulator: Install, simulator_package: Any, version: str) -> None:
    tensorrt_simulator(version, **ORIN)
    assert header_of(build(dla=True), simulator_package).dla
    tensorrt_simulator(version, compute_capability=(11, 0), device_name="Thor")
    with pytest.raises(BuildError, match=r"no deep-learning accelerator \(DLA\).* Leave out --dla"):
        build(dla=True)


def test_profiles() -> None:
    assert image_profile(128, 96, 4) == {"image": ((1, 128, 96, 3), (1, 128, 96, 3), (4, 128, 96, 3))}
    assert masks_profile(BUNDLE.manifest, 128, 96, 4, 8) == {
        "grounded": ((1, 128, 64, 48), (1, 128, 64, 48), (4, 128, 64, 48)),
        "text": ((1, 128), (8, 128), (8, 128)),
        "kp": ((1, 128, 16, 12), (1, 128, 16, 12), (4, 128, 16, 12)),
    }
    with pytest.raises(InputError, match="130x128 is no multiple of the patch, 8 pixels"):
        masks_profile(BUNDLE.manifest, 130, 128, 4, 8)


def test_profile_without_kp(write_tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    manifest = open_bundle(write_tiny_bundle(tmp_path / "b", kp_w=0.0)).manifest
    assert list(masks_profile(manifest, 64, 64, 1, 1)) == ["grounded", "text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch should be a whole number from 1, found 0"),
        ({"max_prompts": -1}, "max_prompts should be a whole number from 1, found -1"),
        ({"max_batch": 1.5}, r"max_batch should be a whole number from 1, found 1\.5"),
        ({"max_batch": True}, "found True"),
        ({"workspace_mb": 0}, "workspace_mb should be a whole number from 1, found 0"),
        ({"timing_cache": Path(__file__).parent}, "timing_cache should be a file, .* is a folder"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineOptions(**options)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"x": ((2, 4), (1, 4), (8, 4))}, r"shapes of x should grow from smallest to largest, found \(2, 4\), "),
        ({"x": ((1, 4), (1, 4), (8, 4, 1))}, "should grow"),
        ({"x": ((0, 4), (1, 4), (8, 4))}, "should grow"),
        ({"z": ((1, 4), (1, 4), (8, 4))}, "the profile names z, the graph's inputs are x"),
        ({}, r"the profile lacks x, whose shape is \(-1, 4\)"),
    ],
)
def test_profiles_that_do_not_fit(tensorrt_simulator: Install, profile: Any, message: str) -> None:
    tensorrt_simulator()
    with pytest.raises(InputError, match=message):
        build(one_node("Relu"), profile)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_profile_that_tensorrt_refuses(tensorrt_simulator: Install, version: str) -> None:
    tensorrt_simulator(version)
    with pytest.raises(BuildError, match=rf"TensorRT {version} could not build the engine: .*\(1, 5\) for x.*Try "):
        build(one_node("Relu"), {"x": ((1, 5), (1, 5), (8, 5))})


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (one_node("Det"), r"node the_node \(Det\): operator is not in the parser's table"),
        (one_node("Relu", opset=21), "opset 21 is outside 9 to 20"),
        (b"not onnx", "Failed to parse the ONNX model"),
        (b"", "Failed to parse the ONNX model"),
    ],
)
def test_graphs_that_tensorrt_cannot_read(
    tensorrt_simulator: Install, version: str, graph: bytes, message: str
) -> None:
    tensorrt_simulator(version)
    with pytest.raises(BuildError, match=rf"TensorRT {version} cannot read the graph: {message}.*tclkit export"):
        build(graph, X_PROFILE)


def test_only_some_of_many_parser_errors_are_told(tensorrt_simulator: Install) -> None:
    tensorrt_simulator()
    model = onnx.load_from_string(one_node("Det"))
    for index in range(5):
        model.graph.node.append(helper.make_node("Det", ["x"], [f"y{index}"], name=f"more_{index}"))
    with pytest.raises(BuildError, match=r"the_node .*more_0 .*more_1 .*\(and 3 more\)") as caught:
        build(model.SerializeToString(), X_PROFILE)
    assert caught.value.values["nodes"] == ["the_node", *(f"more_{index}" for index in range(5))]


def test_a_builder_that_fails_says_why_and_what_to_do(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator(**ORIN)
    simulator.planted_build_error = "Could not find any implementation for node {MatMul_3}"
    with pytest.raises(
        BuildError, match=r"could not build the engine: .*for node \{MatMul_3\}.* Try more memory .*--w"
    ):
        build(workspace_mb=16)
    simulator.planted_build_error = None
    with pytest.raises(BuildError, match=r"not supported on JetPack.* Try .*leave out --hardware-compatible"):
        build(hardware_compatible=True)


def test_a_machine_on_which_tensorrt_cannot_start(tensorrt_simulator: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    simulator = tensorrt_simulator()

    def builder(logger: Any) -> Any:
        logger.log(simulator.tensorrt.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(simulator.tensorrt, "Builder", builder)
    with pytest.raises(
        BuildError, match=r"could not start: CUDA initialization failure with error: 35\. Check the driver"
    ):
        build()


@pytest.mark.parametrize("name", ["tensorrt", "polygraphy.backend.trt"])
def test_what_is_not_installed_is_named(tensorrt_simulator: Install, name: str) -> None:
    tensorrt_simulator()
    # Not the fixture: it is undone after the simulator is gone, and would bring its module back.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, None)
        with pytest.raises(BuildError, match=rf"{name.partition('.')[0]} cannot be imported .*pip install"):
            build()


def test_a_polygraphy_that_is_too_old_is_named(tensorrt_simulator: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Polygraphy 0.49 is for TensorRT 11."""
    simulator = tensorrt_simulator("11.4.0.106")
    import polygraphy.backend.trt

    def create_config(**options: Any) -> Any:
        return lambda builder, network: network.get_layer(0).precision_is_set

    monkeypatch.setattr(polygraphy.backend.trt, "CreateConfig", create_config)
    with pytest.raises(BuildError, match=r"Polygraphy does not know TensorRT 11\.4.*precision_is_set.*pip install -U"):
        build()
    assert simulator.builds == []


def test_progress(tensorrt_simulator: Install) -> None:
    tensorrt_simulator()
    reports: list[tuple[str, int, int]] = []
    build(progress=lambda phase, done, total: reports.append((phase, done, total)))
    assert {phase for phase, _, _ in reports} >= {"Building Engine", "Computing profile costs"}
    for phase in {phase for phase, _, _ in reports}:
        counts = [done for name, done, _ in reports if name == phase]
        assert counts == sorted(counts)
        assert counts[0] == 0
        assert counts[-1] == next(total for name, _, total in reports if name == phase)


def test_an_error_in_the_progress_report_stops_the_build(tensorrt_simulator: Install) -> None:
    tensorrt_simulator()

    def broken(phase: str, done: int, total: int) -> None:
        raise ZeroDivisionError("in the progress bar")

    with pytest.raises(ZeroDivisionError, match="in the progress bar"):
        build(progress=broken)


@pytest.fixture
def python_handles_ctrl_c() -> Iterator[None]:
    """Also where a shell started the tests with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_ctrl_c_stops_the_build(tensorrt_simulator: Install) -> None:
    simulator = tensorrt_simulator()
    steps: list[int] = []

    def before_step(index: int) -> None:
        steps.append(index)
        if index == 1:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

    simulator.before_step = before_step
    with pytest.raises(KeyboardInterrupt):
        build()
    assert 2 <= len(steps) < simulator.builds[0]["timed"]
    assert "tclkit-build-engine" not in {thread.name for thread in threading.enumerate()}


def test_timing_cache_saves_the_second_build(tensorrt_simulator: Install, tmp_path: Path) -> None:
    simulator = tensorrt_simulator()
    cache = tmp_path / "new folder" / "cache.bin"
    build(timing_cache=cache)
    build(timing_cache=cache)
    build(IMAGE, image_profile(128, 128, 1), timing_cache=cache)
    build(timing_cache=cache)
    first, second, image, last = simulator.builds
    assert first["timed"] == first["layers"]
    assert second["timed"] == last["timed"] == 0
    assert image["timed"] > 0
    assert [path.name for path in cache.parent.iterdir()] == ["cache.bin"]


@pytest.mark.parametrize(
    "other", [{"version": "11.4.0.106", **ORIN}, H100, "damaged"], ids=["version", "device", "bytes"]
)
def test_a_timing_cache_that_does_not_fit_is_set_aside(
    tensorrt_simulator: Install, tmp_path: Path, caplog: pytest.LogCaptureFixture, other: Any
) -> None:
    cache = tmp_path / "cache.bin"
    if other == "damaged":
        cache.write_bytes(b"no timing cache")
    else:
        tensorrt_simulator(**other)
        build(timing_cache=cache)
    before = cache.read_bytes()
    simulator = tensorrt_simulator("10.3.0", **ORIN)
    with caplog.at_level(logging.WARNING):
        build(timing_cache=cache)
    records = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [record.getMessage() for record in records] == [
        f"timing cache {cache} is damaged, or of another TensorRT version or device: set aside as cache.bin.other, "
        "a new one is begun"
    ]
    assert (tmp_path / "cache.bin.other").read_bytes() == before
    build(timing_cache=cache)
    assert [entry["timed"] > 0 for entry in simulator.builds] == [True, False]


def test_a_timing_cache_that_cannot_be_read(tensorrt_simulator: Install, tmp_path: Path) -> None:
    tensorrt_simulator()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"the timing cache .*cache\.bin cannot be read: "):
        build(timing_cache=tmp_path / "file" / "cache.bin")


def test_a_timing_cache_that_cannot_be_written_costs_no_engine(
    tensorrt_simulator: Install, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt_simulator()

    def full_disk(path: Path) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tclkit.export.engine_builder.atomic_file", full_disk)
    with caplog.at_level(logging.WARNING):
        assert build(timing_cache=tmp_path / "cache.bin")
    assert "cache.bin could not be written: [Errno 28] No space left on device" in caplog.text


def test_nothing_is_printed(tensorrt_simulator: Install, capfd: pytest.CaptureFixture[str]) -> None:
    simulator = tensorrt_simulator()
    simulator.planted_build_warnings = ["some warning"]
    build()
    simulator.planted_build_error = "some error"
    with pytest.raises(BuildError):
        build()
    assert capfd.readouterr() == ("", "")


def test_polygraphys_log_is_left_as_it_was(tensorrt_simulator: Install) -> None:
    tensorrt_simulator()
    from polygraphy.logger import G_LOGGER

    before = G_LOGGER.module_severity.get()
    build()
    assert G_LOGGER.module_severity.get() == before


def test_what_tensorrt_says_is_in_the_log(tensorrt_simulator: Install, caplog: pytest.LogCaptureFixture) -> None:
    simulator = tensorrt_simulator()
    simulator.planted_build_warnings = ["some warning"]
    with caplog.at_level(logging.INFO):
        build()
    assert "TensorRT: some warning" in [record.getMessage() for record in caplog.records]


def test_torch_and_tensorrt_are_not_imported() -> None:
    code = (
        "import sys; import tclkit.export.engine_builder; "
        "print([name for name in ('torch', 'tensorrt', 'polygraphy', 'onnx', 'onnxruntime') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
