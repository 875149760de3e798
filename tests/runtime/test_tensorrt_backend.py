"""The TensorRT backend on the simulator, from engine files to label maps; nothing here has run on a GPU."""

import gc
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tclkit.runtime.backends import HostFeatures, choose_backend
from tclkit.runtime.bundle import Bundle, open_bundle, write_manifest
from tclkit.runtime.errors import BackendError, BundleError, EngineMismatchError, InputError, TclkitError
from tclkit.runtime.onnxruntime_backend import OnnxRuntimeBackend
from tclkit.runtime.result import Segmentation
from tclkit.runtime.segmenter import Segmenter
from tclkit.runtime.tensorrt_backend import TensorRTBackend, open_tensorrt

VERSIONS = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")
Install = Callable[..., Any]
Build = Callable[..., Bundle]
Images = Callable[..., NDArray[np.uint8]]
Texts = Callable[..., NDArray[np.float32]]


@pytest.fixture
def simulator(tensorrt_simulator: Install) -> Any:
    return tensorrt_simulator("10.3.0")


@pytest.fixture
def bundle(simulator: Any, shapes_folder: Path, build_engines: Build) -> Bundle:
    return build_engines(simulator, shapes_folder)


def reference(bundle: Bundle) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(bundle, threads=1)


@pytest.mark.parametrize("version", VERSIONS)
def test_prompts_change_without_a_rebuild(
    version: str,
    tensorrt_simulator: Install,
    shapes_folder: Path,
    build_engines: Build,
    random_images: Images,
    random_texts: Texts,
) -> None:
    simulator = tensorrt_simulator(version)
    bundle = build_engines(simulator, shapes_folder)
    onnxruntime, builds = reference(bundle), len(simulator.builds)
    backend = open_tensorrt(bundle)
    for round_, batch in enumerate((1, 4, 1)):
        images = random_images(batch, round_)
        found, wanted = backend.image_features(images), onnxruntime.image_features(images)
        for prompts in (3, 17, 1, 3, 3, 3):
            texts = random_texts(prompts, round_)
            masks = backend.masks(found, texts, 0.1)
            assert masks.shape == (batch, prompts, 64, 64)
            np.testing.assert_allclose(masks, onnxruntime.masks(wanted, texts, 0.1), atol=1e-5)
    assert len(simulator.builds) == builds
    assert simulator.device.calls["cudaGraphLaunch"] > 0
    backend.close()
    gc.collect()
    del found
    assert simulator.leaks() == []


@pytest.mark.parametrize("version", VERSIONS)
def test_a_segmenter_takes_engines_and_gives_everything_back(
    version: str, tensorrt_simulator: Install, shapes_folder: Path, build_engines: Build, random_images: Images
) -> None:
    simulator = tensorrt_simulator(version)
    build_engines(simulator, shapes_folder)
    image_hwc = random_images(1)[0]
    prompts = ["red circle", "a blue star", "green ring"]
    wanted = Segmenter.open(shapes_folder, backend="onnxruntime")(image_hwc, prompts)
    with Segmenter.open(shapes_folder) as segmenter:
        assert segmenter.backend.reason == (
            f"the best backend available here (TensorRT {version} on sm_87 (Orin), fp32)"
        )
        for result in segmenter.stream([image_hwc] * 4, prompts):
            assert (result.label_map == wanted.label_map).mean() > 0.999
            np.testing.assert_allclose(result.fitted_masks, wanted.fitted_masks, atol=1e-5)
        assert (result.backend, result.settings["precision"]) == ("tensorrt", "fp32")
        assert result.to_dict()["settings"]["precision"] == "fp32"
    with pytest.raises(TclkitError, match="the TensorRT backend of tcl-shapes is closed"):
        segmenter(image_hwc, prompts)
    gc.collect()
    assert simulator.leaks() == []


def test_features_are_kept_over_other_frames(
    bundle: Bundle, simulator: Any, random_images: Images, random_texts: Texts
) -> None:
    backend, texts = open_tensorrt(bundle), random_texts(3)
    kept = [backend.image_features(random_images(1, seed)) for seed in range(3)]
    before = [backend.masks(features, texts, 0.1) for features in kept]
    for seed in range(10, 14):
        backend.masks(backend.image_features(random_images(1, seed)), texts, 0.1)
    for features, masks in zip(kept, before, strict=True):
        np.testing.assert_array_equal(backend.masks(features, texts, 0.1), masks)
    wanted = [reference(bundle).image_features(random_images(1, seed)).grounded for seed in range(3)]
    for features, grounded in zip(kept, wanted, strict=True):
        np.testing.assert_allclose(features.grounded, grounded, atol=1e-5)
    backend.close()
    features = None
    for still_lent in (3, 2, 1):
        assert len([line for line in simulator.leaks() if line.startswith("device memory")]) == 2 * still_lent
        kept.pop()
    gc.collect()
    assert simulator.leaks() == []


def test_memory_does_not_grow_with_frames(bundle: Bundle, simulator: Any, random_images: Images) -> None:
    backend = open_tensorrt(bundle)
    many = [backend.image_features(random_images(1, seed)) for seed in range(4)]
    del many
    gc.collect()
    backend.image_features(random_images(1))
    used = simulator.device.used_bytes()
    for seed in range(4):
        backend.image_features(random_images(1, seed))
    assert simulator.device.used_bytes() == used
    assert len(backend._sizes[128, 128].pool._free) <= 2
    backend.close()


def test_features_come_down_only_when_they_are_read(
    bundle: Bundle, random_images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_tensorrt(bundle)
    features = backend.image_features(random_images(1))
    copied: list[Any] = []
    real = backend.to_host
    monkeypatch.setattr(backend, "to_host", lambda size, tensor: copied.append(tensor.shape) or real(size, tensor))
    assert copied == []
    first = features.grounded
    assert first is features.grounded
    assert features.kp is features.kp
    assert copied == [(1, 128, 64, 64), (1, 128, 16, 16)]
    backend.close()


@pytest.mark.parametrize("batch", [5, 8])
def test_large_batches_are_split(bundle: Bundle, random_images: Images, random_texts: Texts, batch: int) -> None:
    backend, images, texts = open_tensorrt(bundle), random_images(batch), random_texts(2)
    features = backend.image_features(images)
    assert len(features.chunks) == -(-batch // 4)
    wanted = reference(bundle).image_features(images)
    np.testing.assert_allclose(features.grounded, wanted.grounded, atol=1e-5)
    masks = backend.masks(features, texts, 0.1)
    np.testing.assert_allclose(masks, reference(bundle).masks(wanted, texts, 0.1), atol=1e-5)
    np.testing.assert_allclose(backend.masks(wanted, texts, 0.1), masks, atol=1e-5)  # copied up, in parts too
    backend.close()


def test_features_of_another_backend(bundle: Bundle, random_images: Images, random_texts: Texts) -> None:
    first, second, texts = open_tensorrt(bundle), open_tensorrt(bundle), random_texts(3)
    features = first.image_features(random_images(1))
    masks = first.masks(features, texts, 0.1)
    np.testing.assert_array_equal(second.masks(features, texts, 0.1), masks)
    wrong = HostFeatures(grounded=np.zeros((1, 128, 32, 32), np.float32), kp=np.zeros((1, 128, 8, 8), np.float32))
    with pytest.raises(InputError, match=r"the grid \(32, 32\) belong to no image size of tcl-shapes \(128x128\)"):
        first.masks(wrong, texts, 0.1)
    with pytest.raises(InputError, match="KP features should be a numpy array"):
        first.masks(HostFeatures(grounded=features.grounded, kp=None), texts, 0.1)
    with pytest.raises(InputError, match="features should be float32"):
        first.masks(HostFeatures(grounded=np.zeros((1, 3)), kp=None), texts, 0.1)  # type: ignore[arg-type]
    first.close()
    second.close()


def test_more_prompts_than_the_engine_takes(bundle: Bundle, random_images: Images, random_texts: Texts) -> None:
    backend = open_tensorrt(bundle)
    features = backend.image_features(random_images(1))
    assert backend.masks(features, random_texts(32), 0.1).shape == (1, 32, 64, 64)
    with pytest.raises(
        BackendError,
        match=r"33 prompts, but the engine was built for at most 32: rebuild it with tclkit build-engine --fp32 "
        r"--model .*tcl-shapes --max-prompts 64, or use --backend onnxruntime",
    ):
        backend.masks(features, random_texts(33), 0.1)
    backend.close()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 128, 128, 3), np.float32), r"images should be uint8 \(B, H, W, 3\), found float32"),
        (np.zeros((0, 128, 128, 3), np.uint8), r"found uint8 \(0, 128, 128, 3\)"),
        (np.zeros((1, 128, 64, 3), np.uint8), r"images are 128x64, tcl-shapes has image graphs for 128x128"),
    ],
)
def test_images_that_do_not_fit(bundle: Bundle, images: Any, message: str) -> None:
    backend = open_tensorrt(bundle)
    with pytest.raises(InputError, match=message):
        backend.image_features(images)
    backend.close()


def test_masks_that_cannot_be(bundle: Bundle, random_images: Images, random_texts: Texts) -> None:
    backend = open_tensorrt(bundle)
    features = backend.image_features(random_images(1))
    with pytest.raises(InputError, match=r"kp_w should be in \[0, 1\], found 2"):
        backend.masks(features, random_texts(1), 2)
    with pytest.raises(InputError, match=r"text embeddings should be float32 \(N, 128\), found float32 \(0, 128\)"):
        backend.masks(features, random_texts(1)[:0], 0.1)
    backend.close()


def test_a_bundle_of_two_sizes_without_kp(
    simulator: Any, write_tiny_bundle: Callable[..., Path], tmp_path: Path, build_engines: Build, tiny: Any
) -> None:
    bundle = build_engines(simulator, write_tiny_bundle(tmp_path / "tiny", kp_w=0.0, more_sizes=[(32, 96)]))
    backend = open_tensorrt(bundle)
    texts = np.eye(tiny.WIDTH, dtype=np.float32)[:2]
    for size in ((64, 64), (32, 96), (64, 64)):
        images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
        features, wanted = backend.image_features(images), reference(bundle).image_features(images)
        assert features.kp is None
        for given in (features, wanted):
            masks = backend.masks(given, texts, 0.0)
            np.testing.assert_allclose(masks, reference(bundle).masks(wanted, texts, 0.0), atol=1e-5)
    with pytest.raises(InputError, match="tiny has no KP branch"):
        backend.masks(features, texts, 0.3)
    backend.close()


def test_texts_are_embedded_on_the_cpu(bundle: Bundle) -> None:
    backend = open_tensorrt(bundle, threads=1)
    ids = np.ones((2, 5), np.int64)
    np.testing.assert_array_equal(backend.encode_text(ids), reference(bundle).encode_text(ids))
    backend.close()


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


def test_one_backend_in_one_thread_after_another(bundle: Bundle, random_images: Images, random_texts: Texts) -> None:
    backend = open_tensorrt(bundle)
    features = backend.image_features(random_images(1))
    masks = backend.masks(features, random_texts(1), 0.1)
    for use in (
        lambda: backend.image_features(random_images(1)),
        lambda: np.testing.assert_array_equal(backend.masks(features, random_texts(1), 0.1), masks),
        lambda: features.grounded,
        lambda: backend.encode_text(np.ones((1, 3), np.int64)),
    ):
        assert in_a_thread(use) == []
    np.testing.assert_array_equal(backend.masks(features, random_texts(1), 0.1), masks)
    assert in_a_thread(lambda: open_tensorrt(bundle).image_features(random_images(1))) == []
    assert in_a_thread(backend.close) == []


def test_threads_that_use_one_backend_at_once_wait_for_each_other(
    bundle: Bundle, random_images: Images, random_texts: Texts
) -> None:
    backend, texts = open_tensorrt(bundle), random_texts(3)
    wanted = [reference(bundle).image_features(random_images(1, seed)).grounded for seed in range(2)]
    errors: list[BaseException] = []

    def use(seed: int) -> None:
        try:
            for _ in range(6):
                features = backend.image_features(random_images(1, seed))
                backend.masks(features, texts[: seed + 1], 0.1)
                np.testing.assert_allclose(features.grounded, wanted[seed], atol=1e-5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    backend.close()
    assert errors == []


def labels_of(results: Iterable[Segmentation]) -> list[NDArray[np.int16]]:
    return [result.label_map for result in results]


def test_streams_and_calls_of_one_segmenter(bundle: Bundle, random_images: Images) -> None:
    """Each stream runs the image engine in a thread of its own, which ends with it."""
    image_hwc, names = random_images(1)[0], ["red circle", "blue star"]
    wide_hwc = np.concatenate(random_images(3, 1), axis=1)[:, :340]
    with Segmenter.open(bundle.folder, backend="onnxruntime") as other:
        wanted, wanted_wide = other(image_hwc, names).label_map, other(wide_hwc, names, fit="slide").label_map
    with Segmenter.open(bundle.folder, backend="tensorrt") as segmenter:
        found = [segmenter(image_hwc, names).label_map]
        for _ in range(2):
            found += labels_of(segmenter.stream([image_hwc] * 3, names))
        for result in segmenter.stream([image_hwc] * 3, names):
            found += [result.label_map, segmenter(image_hwc, names).label_map]
        (features,) = segmenter.features(image_hwc).features
        for _ in segmenter.stream([image_hwc] * 3, names):
            assert features.grounded.shape == (1, 128, 64, 64)
        slid = list(segmenter.stream([wide_hwc] * 2, names, fit="slide"))
        found.append(segmenter(image_hwc, names).label_map)
    assert [result.settings["windows"] for result in slid] == [5, 5]
    assert all((label_map == wanted).mean() > 0.999 for label_map in found)
    assert all((label_map == wanted_wide).mean() > 0.999 for label_map in labels_of(slid))


def test_a_segmenter_that_is_closed_during_a_stream(bundle: Bundle, random_images: Images, simulator: Any) -> None:
    for number in range(6):
        segmenter = Segmenter.open(bundle.folder, backend="tensorrt")
        results = segmenter.stream([random_images(1)[0]] * 9, ["red circle"])
        next(results)
        time.sleep(0.003 * number)  # before, in and after the run of the image engine
        segmenter.close()
        with pytest.raises(TclkitError, match="the TensorRT backend of tcl-shapes is closed"):
            list(results)
    gc.collect()
    assert simulator.leaks() == []


def test_a_segmenter_stays_on_the_device_that_it_was_opened_on(
    tensorrt_simulator: Install, shapes_folder: Path, build_engines: Build, random_images: Images
) -> None:
    """The first stream makes the sessions in its thread, where device 0 is the current one."""
    simulator = tensorrt_simulator("10.3.0", device_count=2)
    build_engines(simulator, shapes_folder)
    simulator.cudart.cudaSetDevice(1)
    with Segmenter.open(shapes_folder, backend="tensorrt") as segmenter:
        for _ in range(2):
            assert len(list(segmenter.stream([random_images(1)[0]] * 3, ["red circle"]))) == 3
        simulator.cudart.cudaSetDevice(0)
        segmenter(random_images(1)[0], ["red circle"])
        assert {one.device for one in simulator.device.live_allocations()} == {1}
    gc.collect()
    assert simulator.leaks() == []


def test_features_that_are_forgotten_in_another_thread(bundle: Bundle, random_images: Images, simulator: Any) -> None:
    backend = open_tensorrt(bundle)
    kept = [backend.image_features(random_images(1))]
    assert in_a_thread(lambda: (kept.clear(), gc.collect())) == []
    backend.image_features(random_images(1))
    assert len([a for a in simulator.device.live_allocations() if a.size == 128 * 64 * 64 * 4]) == 1
    backend.close()


def test_a_full_device(
    tensorrt_simulator: Install, shapes_folder: Path, build_engines: Build, random_images: Images
) -> None:
    simulator = tensorrt_simulator("10.3.0")
    backend = open_tensorrt(build_engines(simulator, shapes_folder))
    simulator.device.memory_bytes = 1 << 20
    with pytest.raises(BackendError, match=r"cudaMalloc failed: cudaErrorMemoryAllocation .*smaller --max-batch"):
        backend.image_features(random_images(1))
    backend.close()
    gc.collect()
    assert simulator.leaks() == []


def test_closed(bundle: Bundle, random_images: Images, simulator: Any) -> None:
    backend = open_tensorrt(bundle)
    kept = [backend.image_features(random_images(1))]
    backend.close()
    backend.close()
    for use in (
        lambda: backend.image_features(random_images(1)),
        lambda: backend.masks(kept[0], np.zeros((1, 128), np.float32), 0.1),
        lambda: backend.encode_text(np.ones((1, 3), np.int64)),
        lambda: kept[0].grounded,
    ):
        with pytest.raises(TclkitError, match="the TensorRT backend of tcl-shapes is closed"):
            use()
    kept.clear()
    gc.collect()
    assert simulator.leaks() == []


# Engines that do not fit


def engine_path(folder: Path, graph: str = "image") -> Path:
    (path,) = (folder / "engines").glob(f"{graph}-*.engine")
    return path


def sign_again(path: Path) -> None:
    """Make the side-car vouch for the bytes that the engine has now."""
    side_car = path.with_suffix(".json")
    raw = json.loads(side_car.read_text(encoding="utf-8"))
    content = path.read_bytes()
    raw |= {"engine_sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    side_car.write_text(json.dumps(raw), encoding="utf-8")


def carried(tensorrt_simulator: Install) -> None:
    tensorrt_simulator("11.4.0.106")


def other_capability(tensorrt_simulator: Install) -> None:
    tensorrt_simulator("10.3.0", compute_capability=(8, 9), device_name="L4")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


MACHINES = [
    (carried, "another TensorRT", r"built with TensorRT 10\.3\.0 on sm_87 .*has TensorRT 11\.4\.0\.106 on sm_87"),
    (
        other_capability,
        "another device",
        r"built with TensorRT 10\.3\.0 on sm_87 .*has TensorRT 10\.3\.0 on sm_89 \(L4\)",
    ),
]


@pytest.mark.usefixtures("without_openvino")
def test_auto_announces_why_it_took_another_backend_and_by_name_it_is_refused(
    tensorrt_simulator: Install, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    for move, reason, message in MACHINES:
        caplog.clear()
        move(tensorrt_simulator)
        with pytest.raises(EngineMismatchError, match=message) as info:
            choose_backend("tensorrt", bundle)
        assert info.value.values["reason"] == reason
        assert "Rebuild it here: tclkit build-engine --fp32 --model" in str(info.value)
        assert "or use --backend onnxruntime" in str(info.value)
        with caplog.at_level(logging.WARNING):
            backend = choose_backend("auto", bundle)
        assert (backend.name, backend.precision) == ("onnxruntime", "fp32")
        (warning,) = caplog.messages
        assert warning.startswith("tcl-shapes does not run on TensorRT ")
        assert str(info.value) in warning
        assert str(info.value) in backend.reason


@pytest.mark.usefixtures("without_openvino")
@pytest.mark.parametrize("graph", ["image", "masks"])
@pytest.mark.parametrize(
    ("harm", "is_signed", "kind", "message"),
    [
        (truncated, False, BundleError, r"is damaged: expected \d+ bytes, found \d+"),
        (flipped, False, BundleError, r"is damaged: expected SHA-256 \w+, found \w+"),
        (
            truncated,
            True,
            EngineMismatchError,
            r"TensorRT 10\.3\.0 on sm_87 \(Orin\) refuses .*built by TensorRT 10\.3\.0",
        ),
        (flipped, True, EngineMismatchError, r"refuses .*Serialization assertion failed"),
    ],
)
def test_damaged_engines(
    bundle: Bundle,
    simulator: Any,
    harm: Callable[[Path], None],
    is_signed: bool,
    kind: type[TclkitError],
    message: str,
    graph: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hash is compared before TensorRT sees a byte; where the side-car vouches for the damage, TensorRT refuses."""
    path = engine_path(bundle.folder, graph)
    harm(path)
    seen: list[int] = []
    real = simulator.tensorrt.Runtime.deserialize_cuda_engine
    monkeypatch.setattr(
        simulator.tensorrt.Runtime,
        "deserialize_cuda_engine",
        lambda self, content: seen.append(len(content)) or real(self, content),
    )
    if is_signed:
        sign_again(path)
    with pytest.raises(kind, match=message) as info:
        choose_backend("tensorrt", bundle)
    assert (path.stat().st_size in seen) is is_signed
    assert "Rebuild it here: tclkit build-engine --fp32" in str(info.value)
    assert "or use --backend onnxruntime" in str(info.value)
    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto", bundle).name == "onnxruntime"
    assert str(info.value) in caplog.messages[-1]
    gc.collect()
    assert simulator.leaks() == []


def test_an_engine_of_another_graph_is_refused(
    simulator: Any, bundle: Bundle, shapes_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masks = engine_path(shapes_folder, "masks").read_bytes()
    path = engine_path(shapes_folder, "image")
    path.write_bytes(masks)
    sign_again(path)
    with pytest.raises(BundleError, match="should have the inputs image uint8, found grounded float32, kp float32"):
        choose_backend("tensorrt", bundle)


def test_a_graph_that_changed_after_the_build(simulator: Any, bundle: Bundle) -> None:
    raw = json.loads((bundle.folder / "bundle.json").read_text(encoding="utf-8"))
    graph = bundle.folder / "image.onnx"
    graph.write_bytes(graph.read_bytes() + b"\x62\x00")  # an empty `model_version`-like field: another file, same graph
    write_manifest(bundle.folder, {key: value for key, value in raw.items() if key != "manifest_sha256"})
    changed = open_bundle(bundle.folder)
    with pytest.raises(EngineMismatchError, match="was built from another image graph"):
        choose_backend("tensorrt", changed)


@pytest.mark.usefixtures("without_openvino")
def test_no_engines(simulator: Any, shapes_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = open_bundle(shapes_folder)
    with pytest.raises(BackendError, match=r"no engines were built for tcl-shapes\. Build them here: .*--fp16 --model"):
        choose_backend("tensorrt", bundle)
    with caplog.at_level(logging.WARNING):
        assert choose_backend("auto", bundle).name == "onnxruntime"
    assert "no engines were built for tcl-shapes" in caplog.text


def with_half_graph(folder: Path) -> None:
    """Add a further image graph that is called fp16; its weights are those of the first."""
    raw = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    (folder / "image.fp16.onnx").write_bytes((folder / "image.onnx").read_bytes())
    raw["images"][0]["files"]["fp16"] = "image.fp16.onnx"
    write_manifest(folder, raw)


@pytest.mark.usefixtures("without_openvino")
def test_precisions_are_never_replaced_silently(
    simulator: Any, shapes_folder: Path, build_engines: Build, caplog: pytest.LogCaptureFixture
) -> None:
    with_half_graph(shapes_folder)
    bundle = build_engines(simulator, shapes_folder, precision="fp16")

    def chosen(precision: str, name: str = "auto") -> tuple[str, str]:
        backend = choose_backend(name, bundle, precision=precision)
        assert f", {backend.precision})" in backend.reason
        backend.close()
        return backend.name, backend.precision

    assert chosen("auto") == chosen("fp16") == chosen("auto", "tensorrt") == ("tensorrt", "fp16")
    assert caplog.messages == []
    assert chosen("fp32") == ("onnxruntime", "fp32")
    assert "no image engine in fp32 was built for tcl-shapes at 128x128" in caplog.text
    with pytest.raises(BackendError, match="no image engine in fp32 was built"):
        choose_backend("tensorrt", bundle, precision="fp32")
    with pytest.raises(BackendError, match="tcl-shapes has no image graph in int8"):
        choose_backend("auto", bundle, precision="int8")
    with pytest.raises(BackendError, match=r"TensorRT engines are fp32, fp16 or int8, not bf16"):
        choose_backend("tensorrt", bundle, precision="bf16")
    with pytest.raises(BackendError, match=r"unknown precision 'half'\. Choose auto, fp32, fp16, bf16, int8"):
        choose_backend("auto", bundle, precision="half")
    build_engines(simulator, shapes_folder, precision="fp32")
    assert chosen("auto") == ("tensorrt", "fp16")
    assert chosen("fp32") == ("tensorrt", "fp32")
    assert chosen("auto", "onnxruntime") == ("onnxruntime", "fp32")
    assert chosen("fp16", "onnxruntime") == ("onnxruntime", "fp16")


@pytest.mark.parametrize(
    ("flags", "version", "machine"),
    [
        (("version-compatible",), "11.4.0.106", {}),
        (("hardware-compatible",), "10.3.0", {"compute_capability": (8, 9), "device_name": "L4"}),
    ],
)
def test_compatible_engines_run_elsewhere(
    tensorrt_simulator: Install,
    shapes_folder: Path,
    build_engines: Build,
    random_images: Images,
    flags: tuple[str, ...],
    version: str,
    machine: dict[str, Any],
) -> None:
    builder = tensorrt_simulator("10.3.0", compute_capability=(8, 6), device_name="A10")
    bundle = build_engines(builder, shapes_folder, flags=flags)
    tensorrt_simulator(version, **({"compute_capability": (8, 6), "device_name": "A10"} | machine))
    backend = open_tensorrt(bundle)
    assert isinstance(backend, TensorRTBackend)
    images = random_images(1)
    np.testing.assert_allclose(
        backend.image_features(images).grounded, reference(bundle).image_features(images).grounded, atol=1e-5
    )
    backend.close()


@pytest.mark.usefixtures("without_openvino")
def test_tensorrt_without_a_device(
    simulator: Any, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    code = simulator.cudart.cudaError_t.cudaErrorNoDevice
    monkeypatch.setattr(simulator.cudart, "cudaGetDeviceCount", lambda: (code, None))
    with pytest.raises(BackendError, match=r"backend tensorrt cannot be used\. .*cudaErrorNoDevice"):
        choose_backend("tensorrt", bundle)
    with caplog.at_level(logging.WARNING):
        backend = choose_backend("auto", bundle)
    assert backend.name == "onnxruntime"
    assert "TensorRT 10.3.0 cannot be used: cudaGetDeviceCount failed: cudaErrorNoDevice" in backend.reason
    assert "does not run on TensorRT 10.3.0" in caplog.text
