import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tclkit.runtime import segmenter as segmenter_module
from tclkit.runtime.backends import Features
from tclkit.runtime.errors import BackendError, BundleError, InputError, TclkitError
from tclkit.runtime.labels import labels_from_masks
from tclkit.runtime.pamr import refine_masks, resize_with_corners
from tclkit.runtime.prompts import PromptSet
from tclkit.runtime.result import Segmentation
from tclkit.runtime.segmenter import Segmenter
from tclkit.runtime.upsample import resize_masks

COLOURS = ("red", "green", "blue")
NAMES = ["a red circle", "the green square", "blue"]
Image = NDArray[np.uint8]


@pytest.fixture
def segmenter(tiny_bundle_folder: Path) -> Segmenter:
    return Segmenter.open(tiny_bundle_folder, backend="onnxruntime", threads=1)


@pytest.fixture
def paint(tiny: ModuleType) -> Callable[..., Image]:
    """paint((64, 96), red=(0, 32, 0, 16), ...): a picture in no colour of the palette but for the given boxes."""

    def painted(size: tuple[int, int], **boxes: tuple[int, int, int, int]) -> Image:
        image = np.empty((*size, 3), np.uint8)
        image[:] = tiny.OTHER_RGB
        for colour, (top, bottom, left, right) in boxes.items():
            image[top:bottom, left:right] = tiny.PALETTE[colour]
        return image

    return painted


@pytest.fixture
def scene(paint: Callable[..., Image]) -> Image:
    return paint((64, 64), red=(0, 32, 0, 32), green=(32, 64, 16, 64))


def expected_map(image: Image, tiny: ModuleType) -> NDArray[np.int16]:
    label_map = np.full(image.shape[:2], -1, np.int16)
    for index, colour in enumerate(COLOURS):
        label_map[(image == tiny.PALETTE[colour]).all(axis=2)] = index
    return label_map


def agreement(found: NDArray[np.int16], expected: NDArray[np.int16]) -> float:
    return float((found == expected).mean())


def test_a_scene_is_labelled(segmenter: Segmenter, scene: Image, tiny: ModuleType) -> None:
    result = segmenter(scene, NAMES, kp_w=0)
    assert agreement(result.label_map, expected_map(scene, tiny)) > 0.999  # all but the corners
    assert result.areas == pytest.approx({"a red circle": 0.25, "the green square": 0.375, "blue": 0}, abs=0.001)
    assert result.model == "tiny"
    assert result.backend == "onnxruntime"
    assert result.threshold == 0.5
    assert result.image_hwc is scene
    assert [region.box for region in result.regions()] == [(0, 0, 32, 32), (16, 32, 64, 64)]
    json.dumps(result.to_dict(), allow_nan=False)


def test_defaults_are_the_bundles(segmenter: Segmenter, scene: Image, tiny: ModuleType) -> None:
    result = segmenter(scene, NAMES)
    assert result.settings == {
        "fit": "whole",
        "kp_w": 0.3,
        "pamr": False,
        "flip": False,
        "sizes": [[64, 64]],
        "windows": 1,
        "precision": "fp32",
    }
    assert agreement(result.label_map, expected_map(scene, tiny)) > 0.9
    assert segmenter(scene, NAMES, pamr=True).threshold == 0.4
    assert segmenter(scene, NAMES, background=False).threshold is None
    assert segmenter(scene, NAMES, threshold=0.9).threshold == 0.9


@pytest.mark.parametrize("size", [(480, 640), (640, 480), (100, 30), (1, 1), (65, 64)])
@pytest.mark.parametrize("fit", ["whole", "stretch", "slide"])
def test_any_size_in_any_fit(
    segmenter: Segmenter, paint: Callable[..., Image], tiny: ModuleType, fit: str, size: tuple[int, int]
) -> None:
    height, width = size
    image = paint(size, red=(0, (height + 1) // 2, 0, width), blue=((height + 1) // 2, height, 0, width))
    result = segmenter(image, NAMES, kp_w=0, fit=fit)
    assert result.label_map.shape == size
    assert agreement(result.label_map, expected_map(image, tiny)) > 0.93
    assert result.soft_masks.shape == (3, *size)


def test_slide_sees_details_that_whole_cannot(segmenter: Segmenter, paint: Callable[..., Image]) -> None:
    image = paint((200, 640), red=(90, 115, 300, 325))
    assert segmenter(image, ["red"], kp_w=0).areas["red"] == 0
    result = segmenter(image, ["red"], kp_w=0, fit="slide")
    (region,) = result.regions()
    np.testing.assert_allclose(region.box, (300, 90, 325, 115), atol=10)
    assert result.settings["windows"] == segmenter.stats.windows - 1 == 6


def test_pamr_and_the_mix_follow_the_reference_order(segmenter: Segmenter, scene: Image) -> None:
    prompts = segmenter.prompts(NAMES)
    features = segmenter.features(scene)
    grid = [segmenter.backend.masks(features.features[0], prompts.embeddings, w)[0] for w in (0.0, 1.0)]
    planes = scene.transpose(2, 0, 1).astype(np.float32)
    small = resize_with_corners(planes, grid[0].shape[1:]).transpose(1, 2, 0)
    expected = 0.3 * grid[1] + 0.7 * refine_masks(small, grid[0])
    masks = segmenter.masks(features, prompts, pamr=True)
    np.testing.assert_allclose(segmenter(scene, prompts, pamr=True).soft_masks, masks, atol=1e-6)
    np.testing.assert_allclose(masks[:, 2::4, 2::4], expected, atol=0.3)  # the grid's cells, up to the resizing
    assert "pamr" in segmenter(scene, prompts, pamr=True).timings_ms


def test_features_are_asked_again_for_the_price_of_the_head(segmenter: Segmenter, scene: Image) -> None:
    features = segmenter.features(scene)
    result = segmenter.segment(features, NAMES)
    np.testing.assert_array_equal(result.label_map, segmenter(scene, NAMES).label_map)
    masks = segmenter.masks(features, ["the green square"])
    assert masks.shape == (1, 64, 64)
    np.testing.assert_allclose(masks[0], result.soft_mask("the green square"), atol=1e-5)
    assert segmenter.stats.windows == 2
    assert segmenter.stats.images == 2


def test_prompts_are_embedded_once(tiny_bundle_folder: Path, scene: Image) -> None:
    first = Segmenter.open(tiny_bundle_folder)
    for _ in range(3):
        result = first(scene, NAMES)
    assert first.stats.text_encoder_runs == 1
    assert result.counters == {"images": 3, "windows": 3, "text_encoder_runs": 1, "text_cache_hits": 0}
    second = Segmenter.open(tiny_bundle_folder)
    second(scene, NAMES)
    assert (second.stats.text_encoder_runs, second.stats.text_cache_hits) == (0, 3)
    without = Segmenter.open(tiny_bundle_folder, cache=False)
    without(scene, NAMES)
    assert (without.stats.text_encoder_runs, without.stats.text_cache_hits) == (1, 0)


def test_cache_in_a_file_of_ones_own(tiny_bundle_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    Segmenter.open(tiny_bundle_folder, cache=path).prompts(NAMES)
    assert path.exists()


def test_few_prompt_sets_are_remembered(segmenter: Segmenter) -> None:
    for number in range(40):
        segmenter.prompts([f"red {number}"])
    assert len(segmenter._remembered) == 16
    assert segmenter.prompts(["red 39"]) is segmenter.prompts(["red 39"])


def test_prompts_of_another_encoder_are_refused(segmenter: Segmenter, scene: Image) -> None:
    prompts = segmenter.prompts(NAMES)
    other = PromptSet(names=prompts.names, embeddings=prompts.embeddings, key="f" * 64)
    with pytest.raises(InputError, match=r"embedded by another text encoder \(ffffffffffff\) than that of tiny"):
        segmenter(scene, other)


@pytest.mark.parametrize("prompts", [[], "red", ["red", "red"], [""], [7], None])
def test_bad_prompts(segmenter: Segmenter, scene: Image, prompts: object) -> None:
    with pytest.raises(InputError):
        segmenter(scene, prompts)  # type: ignore[arg-type]


def test_unknown_words_are_announced_once(
    write_tiny_bundle: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    segmenter = Segmenter.open(write_tiny_bundle(tmp_path / "tiny", vocabulary=["red", "circle"]))
    with caplog.at_level(logging.WARNING):
        segmenter.prompts(["a red circle"])
        assert caplog.records == []
        segmenter.prompts(["a red zebra"])
        segmenter.prompts(["zebra"])
    assert [record.getMessage() for record in caplog.records] == ["tiny does not know 'zebra': knows only colours"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold is a number from 0 to 1, got 1.5"),
        ({"threshold": float("nan")}, "threshold is a number"),
        ({"kp_w": -0.1}, "kp_w is a number from 0 to 1"),
        ({"fit": "crop"}, "unknown fit 'crop'"),
        ({"background": False, "threshold": 0.3}, "threshold 0.3 has no effect without a background"),
    ],
)
def test_bad_options(segmenter: Segmenter, scene: Image, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        segmenter(scene, NAMES, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        segmenter.stream([scene], NAMES, **options)  # type: ignore[arg-type]


def test_bad_images(segmenter: Segmenter, scene: Image) -> None:
    with pytest.raises(InputError, match=r"floats in 0\.\.1 take"):
        segmenter(scene / np.float32(255), NAMES)
    with pytest.raises(InputError, match="thinner than one patch of 16"):
        segmenter(np.zeros((2, 900, 3), np.uint8), NAMES)


def test_bundle_without_kp(write_tiny_bundle: Callable[..., Path], tmp_path: Path, scene: Image) -> None:
    segmenter = Segmenter.open(write_tiny_bundle(tmp_path / "tiny", kp_w=0.0))
    for pamr in (False, True):
        assert segmenter(scene, NAMES, pamr=pamr).settings["kp_w"] == 0
    with pytest.raises(InputError, match=r"tiny was exported without the KP branch, but kp_w is 0\.3; take kp_w 0"):
        segmenter(scene, NAMES, kp_w=0.3)


def test_the_graph_of_the_nearest_aspect_runs(
    write_tiny_bundle: Callable[..., Path], tmp_path: Path, paint: Callable[..., Image], tiny: ModuleType
) -> None:
    segmenter = Segmenter.open(write_tiny_bundle(tmp_path / "tiny", more_sizes=[(64, 128)]))
    image = paint((128, 256), red=(0, 64, 0, 128), green=(0, 128, 192, 256))
    features = segmenter.features(image)
    assert features.plan.graph_size == (64, 128)
    result = segmenter.segment(features, NAMES, kp_w=0)
    assert agreement(result.label_map, expected_map(image, tiny)) > 0.98


def test_masks_that_are_not_finite_are_refused(
    segmenter: Segmenter, scene: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(features: Features, text: NDArray[np.float32], kp_w: float) -> NDArray[np.float32]:
        return np.full((1, len(text), 16, 16), np.nan, np.float32)

    monkeypatch.setattr(segmenter.backend, "masks", overflow)
    with pytest.raises(BackendError, match="masks that are not finite for tiny"):
        segmenter(scene, NAMES)


def test_one_thread_each(segmenter: Segmenter, scene: Image) -> None:
    segmenter(scene, NAMES)
    errors: list[Exception] = []

    def use() -> None:
        try:
            segmenter(scene, NAMES)
        except TclkitError as error:
            errors.append(error)

    thread = threading.Thread(target=use, name="second")
    thread.start()
    thread.join()
    (error,) = errors
    assert "belongs to the thread 'MainThread', but 'second' uses it. Open one in each thread" in str(error)
    segmenter(scene, NAMES)


def test_a_thread_that_has_ended_leaves_its_segmenter_to_others(segmenter: Segmenter, scene: Image) -> None:
    found: list[Segmentation] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(segmenter(scene, NAMES)))
        thread.start()
        thread.join()
    found.append(segmenter(scene, NAMES))
    assert len(found) == 3
    assert found[0].areas == found[2].areas


@pytest.mark.parametrize("value", ["0.5", [0.5], 1 + 0j, float("nan")])
def test_shares_are_numbers(segmenter: Segmenter, scene: Image, value: Any) -> None:
    for name in ("threshold", "kp_w"):
        with pytest.raises(InputError, match=f"{name} is a number from 0 to 1, got"):
            segmenter(scene, NAMES, **{name: value})
    assert segmenter(scene, NAMES, threshold=np.float32(0.5)).threshold == 0.5


@pytest.mark.parametrize("model", [None, 7, b"tcl-shapes"])
def test_a_model_is_a_name_or_a_folder(model: Any) -> None:
    with pytest.raises(BundleError, match="a model is a name or a folder, found"):
        Segmenter.open(model)


def test_closing_releases_the_backend(tiny_bundle_folder: Path, scene: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    with Segmenter.open(tiny_bundle_folder, backend="onnxruntime", threads=1) as segmenter:
        segmenter(scene, NAMES)
        monkeypatch.setattr(segmenter.backend, "close", lambda: closed.append(segmenter.backend.name))
    assert closed == ["onnxruntime"]


def test_unknown_model_and_backend(tiny_bundle_folder: Path) -> None:
    with pytest.raises(BundleError, match="not installed"):
        Segmenter.open("no-such-model")
    with pytest.raises(BackendError, match="unknown backend"):
        Segmenter.open(tiny_bundle_folder, backend="magic")
    with pytest.raises(BackendError, match="tiny has no image graph in fp16, only in fp32"):
        Segmenter.open(tiny_bundle_folder, precision="fp16")


def test_stream_equals_calls(segmenter: Segmenter, scene: Image) -> None:
    frames = [scene, scene[::-1], scene[:, ::-1]]
    prompts = segmenter.prompts(NAMES)
    results = list(segmenter.stream(iter(frames), prompts, kp_w=0))
    assert len(results) == 3
    for frame, result in zip(frames, results, strict=True):
        np.testing.assert_array_equal(result.label_map, segmenter(frame, prompts, kp_w=0).label_map)
    assert set(results[0].timings_ms) == {"preprocess", "image", "masks", "labels"}


def test_stream_may_change_its_prompts(segmenter: Segmenter, scene: Image) -> None:
    current = ["red"]
    results = segmenter.stream([scene] * 4, lambda: current, kp_w=0)
    assert next(results).names == ("red",)
    current = ["green", "blue"]
    assert next(results).names == ("green", "blue")
    assert segmenter.stats.text_encoder_runs == 2
    assert [result.names for result in results] == [("green", "blue")] * 2
    assert segmenter.stats.text_encoder_runs == 2


def test_stream_of_a_camera_that_reuses_its_buffer(segmenter: Segmenter, scene: Image, tiny: ModuleType) -> None:
    buffer = np.empty_like(scene)

    def camera() -> Iterator[Image]:
        for frame in (scene, scene[::-1], scene[:, ::-1]):
            buffer[:] = frame
            yield buffer

    results = list(segmenter.stream(camera(), NAMES, kp_w=0))
    for frame, result in zip((scene, scene[::-1], scene[:, ::-1]), results, strict=True):
        np.testing.assert_array_equal(result.image_hwc, frame)
        assert agreement(result.label_map, expected_map(frame, tiny)) > 0.999


def test_stream_passes_exceptions_and_cleans_up(segmenter: Segmenter, scene: Image) -> None:
    def camera() -> Iterator[Image | None]:
        yield scene
        yield None

    results = segmenter.stream(camera(), NAMES)  # type: ignore[arg-type]
    next(results)
    with pytest.raises(InputError, match="the camera or file gave no frame"):
        next(results)
    early = segmenter.stream([scene] * 100, NAMES)
    next(early)
    early.close()
    assert all(thread.name != "tclkit-prefetch" for thread in threading.enumerate())
    assert segmenter.stats.images == 2
    with pytest.raises(InputError, match="there are no prompts"):
        segmenter.stream([scene], [])


class NotedBackend:
    """A backend that notes which call runs in which thread, and whether two ever run at once."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.images_run = threading.Semaphore(0)
        self.image_threads: list[str] = []
        self.mask_threads: list[str] = []
        self.overlapped = False
        self._running = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def image_features(self, images_BHWC: NDArray[np.uint8]) -> Features:
        self.image_threads.append(threading.current_thread().name)
        features: Features = self._noted(self.backend.image_features, images_BHWC)
        self.images_run.release()
        return features

    def masks(self, features: Features, text: NDArray[np.float32], kp_w: float) -> NDArray[np.float32]:
        self.mask_threads.append(threading.current_thread().name)
        masks: NDArray[np.float32] = self._noted(self.backend.masks, features, text, kp_w)
        return masks

    def encode_text(self, token_ids_ML: NDArray[np.int64]) -> NDArray[np.float32]:
        vectors: NDArray[np.float32] = self._noted(self.backend.encode_text, token_ids_ML)
        return vectors

    def close(self) -> None:
        self._noted(self.backend.close)

    def _noted(self, run: Callable[..., Any], *arguments: object) -> Any:
        self._running += 1
        self.overlapped |= self._running > 1
        time.sleep(0.002)  # two at once would meet here
        try:
            return run(*arguments)
        finally:
            self._running -= 1


@pytest.fixture
def noted(segmenter: Segmenter) -> NotedBackend:
    backend = NotedBackend(segmenter.backend)
    segmenter.backend = backend
    return backend


def test_stream_runs_the_image_graph_while_the_caller_draws(
    segmenter: Segmenter, noted: NotedBackend, scene: Image
) -> None:
    taken: list[int] = []

    def camera() -> Iterator[Image]:
        for number in range(6):
            taken.append(number)
            yield scene

    for number, result in enumerate(segmenter.stream(camera(), NAMES)):
        assert noted.images_run.acquire(timeout=10)  # of this frame
        if number < 5:  # the next one's runs to its end before the caller asks for it
            assert noted.images_run.acquire(timeout=10)
            noted.images_run.release()
        assert len(noted.image_threads) <= number + 2  # and no further
        deadline = time.monotonic() + 10
        while len(taken) < min(6, number + 3) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert len(taken) == min(6, number + 3)
        assert result.counters["images"] == result.counters["windows"] == number + 1  # not what runs ahead
    assert set(noted.image_threads) == {"tclkit-prefetch"}
    assert set(noted.mask_threads) == {threading.current_thread().name}
    assert segmenter.stats.windows == 6


@pytest.mark.parametrize("fit", ["whole", "slide"])
@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("stage", ["refine_masks", "labels_from_masks"])
def test_stream_runs_the_image_graph_while_masks_are_refined_and_labelled(
    two_sizes: Path, paint: Callable[..., Image], monkeypatch: pytest.MonkeyPatch, fit: str, scales: bool, stage: str
) -> None:
    """While this frame's stage waits, the image graph runs on the next frame: the second run in the stream's thread."""
    segmenter = Segmenter.open(two_sizes, threads=1, scales=scales)
    segmenter.backend = noted = NotedBackend(segmenter.backend)
    real = getattr(segmenter_module, stage)
    runs_ahead: list[int] = []

    def waiting(*arguments: Any) -> Any:
        deadline = time.monotonic() + 3
        while noted.image_threads.count("tclkit-prefetch") < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
        runs_ahead.append(noted.image_threads.count("tclkit-prefetch"))
        return real(*arguments)

    monkeypatch.setattr(segmenter_module, stage, waiting)
    results = segmenter.stream([paint((100, 250), red=(0, 50, 0, 120))] * 2, NAMES, fit=fit, pamr=True)
    next(results)
    results.close()
    assert set(runs_ahead) == {2}
    assert not noted.overlapped


def test_stream_asks_for_prompts_in_the_callers_thread_once_a_frame(segmenter: Segmenter, scene: Image) -> None:
    asked: list[str] = []

    def ask() -> list[str]:
        asked.append(threading.current_thread().name)
        return NAMES

    for number, _ in enumerate(segmenter.stream([scene] * 4, ask)):
        assert asked == [threading.current_thread().name] * (number + 1)
    assert len(asked) == 4


def test_the_backend_is_never_used_by_two_threads_at_once(
    segmenter: Segmenter, noted: NotedBackend, scene: Image, paint: Callable[..., Image]
) -> None:
    wide = paint((64, 230), red=(0, 40, 0, 100))
    expected = segmenter(wide, NAMES, fit="slide").label_map
    for number, result in enumerate(segmenter.stream([wide] * 8, NAMES, fit="slide")):
        np.testing.assert_array_equal(result.label_map, expected)
        segmenter(scene, [f"red {number}"])
    assert not noted.overlapped


@pytest.mark.parametrize("read", [0, 1, 2])
def test_a_stream_that_is_closed_early_leaves_no_thread(
    segmenter: Segmenter, noted: NotedBackend, scene: Image, read: int
) -> None:
    for _ in range(5):
        before = len(noted.image_threads)
        results = segmenter.stream([scene] * 100, NAMES)
        for _ in range(read):
            next(results)
        results.close()
        assert all(thread.name != "tclkit-prefetch" for thread in threading.enumerate())
        assert len(noted.image_threads) - before <= read + 1


@pytest.fixture
def slow_from_the_second_on(segmenter: Segmenter, noted: NotedBackend, monkeypatch: pytest.MonkeyPatch) -> NotedBackend:
    """The image graph takes 0.5 s on all images but the first."""
    run = noted.backend.image_features

    def slow(images_BHWC: NDArray[np.uint8]) -> Features:
        if len(noted.image_threads) > 1:
            time.sleep(0.5)
        features: Features = run(images_BHWC)
        return features

    monkeypatch.setattr(noted.backend, "image_features", slow)
    return noted


def wait_for_images(noted: NotedBackend, count: int) -> None:
    """Until the image graph has begun on this many images."""
    deadline = time.monotonic() + 10
    while len(noted.image_threads) < count and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(noted.image_threads) == count


def test_closing_a_stream_waits_for_the_image_graph(
    segmenter: Segmenter,
    slow_from_the_second_on: NotedBackend,
    scene: Image,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("tclkit.runtime.prefetch._JOIN_SECONDS", 0.2)
    results = segmenter.stream([scene] * 9, NAMES)
    next(results)
    wait_for_images(slow_from_the_second_on, 2)
    with caplog.at_level(logging.WARNING):
        results.close()
    assert all(thread.name != "tclkit-prefetch" for thread in threading.enumerate())
    assert caplog.messages == []


def test_closing_the_segmenter_waits_for_the_image_graph_of_a_stream(
    segmenter: Segmenter, slow_from_the_second_on: NotedBackend, scene: Image
) -> None:
    results = segmenter.stream([scene] * 9, NAMES)
    next(results)
    wait_for_images(slow_from_the_second_on, 2)
    segmenter.close()
    results.close()
    assert not slow_from_the_second_on.overlapped


def test_a_stream_may_be_closed_by_who_holds_the_backend(
    segmenter: Segmenter, noted: NotedBackend, scene: Image
) -> None:
    """As the garbage collector does it during a call, for a stream that was forgotten in a cycle."""
    second = threading.Event()

    def camera() -> Iterator[Image]:
        yield scene
        second.wait(10)
        yield scene

    results = segmenter.stream(camera(), NAMES)
    next(results)
    with segmenter._backend_lock:
        second.set()
        time.sleep(0.05)  # the thread comes to wait for the backend
        results.close()
    assert all(thread.name != "tclkit-prefetch" for thread in threading.enumerate())
    assert len(noted.image_threads) == 1


def test_an_image_that_the_model_cannot_run_comes_after_those_before_it(
    segmenter: Segmenter, scene: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, count = segmenter.backend.image_features, iter(range(10))

    def failing(images_BHWC: NDArray[np.uint8]) -> Features:
        if next(count) == 2:
            raise BackendError("out of memory", backend="tiny")
        return run(images_BHWC)

    monkeypatch.setattr(segmenter.backend, "image_features", failing)
    results = segmenter.stream([scene] * 5, NAMES)
    assert len([next(results), next(results)]) == 2
    with pytest.raises(BackendError, match="out of memory"):
        next(results)
    assert all(thread.name != "tclkit-prefetch" for thread in threading.enumerate())


def test_timings_add_up(segmenter: Segmenter, scene: Image) -> None:
    results = [segmenter(scene, NAMES, pamr=True) for _ in range(2)]
    for stage in ("preprocess", "image", "masks", "pamr", "labels"):
        assert segmenter.stats.timings_ms[stage] == pytest.approx(sum(r.timings_ms[stage] for r in results))
    assert segmenter.stats.timings_ms["prompts"] > 0


@pytest.mark.parametrize("pamr", [False, True])
@pytest.mark.parametrize("windows_per_run", [2, 3, 100])
def test_windows_taken_together_give_what_they_give_one_by_one(
    tiny_bundle_folder: Path, paint: Callable[..., Image], windows_per_run: int, pamr: bool
) -> None:
    image = paint((80, 230), red=(0, 40, 0, 100), blue=(30, 80, 130, 230))
    alone = Segmenter.open(tiny_bundle_folder, threads=1)(image, NAMES, fit="slide", pamr=pamr)
    segmenter = Segmenter.open(tiny_bundle_folder, threads=1, windows_per_run=windows_per_run)
    batches = []
    run = segmenter.backend.image_features

    def noting(images_BHWC: NDArray[np.uint8]) -> Features:
        batches.append(len(images_BHWC))
        return run(images_BHWC)

    segmenter.backend.image_features = noting  # type: ignore[method-assign]
    together = segmenter(image, NAMES, fit="slide", pamr=pamr)
    np.testing.assert_array_equal(together.label_map, alone.label_map)
    np.testing.assert_allclose(together.fitted_masks, alone.fitted_masks, rtol=0, atol=1e-6)  # measured: 0
    count = alone.settings["windows"]
    assert sum(batches) == segmenter.stats.windows == count
    assert max(batches) == min(windows_per_run, count)  # type: ignore[type-var]


def test_windows_per_run_below_one(tiny_bundle_folder: Path) -> None:
    with pytest.raises(InputError, match="windows_per_run should be 1 or more, found 0"):
        Segmenter.open(tiny_bundle_folder, windows_per_run=0)


@pytest.fixture
def refined_counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many masks each call of PAMR was given."""
    counts: list[int] = []

    def noting(image_hwc: NDArray[np.float32], masks_Nhw: NDArray[np.float32]) -> NDArray[np.float32]:
        counts.append(len(masks_Nhw))
        return refine_masks(image_hwc, masks_Nhw)

    monkeypatch.setattr("tclkit.runtime.segmenter.refine_masks", noting)
    return counts


@pytest.mark.parametrize("fit", ["whole", "slide"])
@pytest.mark.parametrize("kp_w", [0.0, 0.3])
def test_pamr_leaves_out_prompts_that_cannot_label_a_pixel(
    segmenter: Segmenter, paint: Callable[..., Image], refined_counts: list[int], fit: str, kp_w: float
) -> None:
    """The label map is that of refining all; red is in one window only, and refined in every one all the same."""
    names = ["red", "green", "blue", "yellow", "cyan"]
    image = paint((64, 200), red=(0, 40, 0, 30), blue=(10, 64, 60, 200))
    result = segmenter(image, names, fit=fit, kp_w=kp_w, pamr=True)
    windows = result.settings["windows"]
    assert refined_counts == [2] * windows  # type: ignore[operator]
    features = segmenter.features(image, fit=fit)
    everything = segmenter.masks(features, names, kp_w=kp_w, pamr=True)
    assert refined_counts[windows:] == [5] * windows  # type: ignore[operator,misc]
    expected = labels_from_masks(everything, image.shape[:2], result.threshold)
    assert (result.label_map == expected).mean() > 0.999  # both resize in another order: rounding at borders
    for name in ("red", "blue"):
        np.testing.assert_allclose(result.soft_mask(name), everything[names.index(name)], atol=1e-5)
    segmenter(image, names, fit=fit, kp_w=kp_w, pamr=True, background=False)
    assert refined_counts[2 * windows :] == [5] * windows  # type: ignore[operator,misc]


def test_no_prompt_can_label_a_pixel(segmenter: Segmenter, scene: Image, refined_counts: list[int]) -> None:
    result = segmenter(scene, ["cyan", "magenta"], pamr=True)
    assert refined_counts == [0]
    assert (result.label_map == -1).all()


@pytest.mark.parametrize("fit", ["whole", "slide"])
@pytest.mark.parametrize("windows_per_run", [1, 2])
@pytest.mark.parametrize("pamr", [False, True])
def test_flip_takes_the_mean_of_the_image_and_its_mirror_image(
    tiny_bundle_folder: Path, fit: str, windows_per_run: int, pamr: bool
) -> None:
    """Held against mirroring the whole by hand, on a picture whose windows lie symmetrically.

    The tiny model sees a mirrored picture as the picture mirrored; here it takes the left edge of its input for blue.
    """

    def opened(**settings: Any) -> Segmenter:
        segmenter = Segmenter.open(tiny_bundle_folder, threads=1, **settings)
        run = segmenter.backend.image_features

        def lopsided(images_BHWC: Image) -> Features:
            images_BHWC = images_BHWC.copy()
            images_BHWC[:, :, :8] = (0, 0, 255)
            return run(images_BHWC)

        segmenter.backend.image_features = lopsided  # type: ignore[method-assign]
        return segmenter

    image = np.random.default_rng(0).integers(0, 256, (64, 128, 3)).astype(np.uint8)
    image[8:40, 10:60] = (255, 0, 0)
    plain = opened()
    straight, mirrored = (
        plain.masks(plain.features(one, fit=fit), NAMES, kp_w=0.3)
        for one in (image, np.ascontiguousarray(image[:, ::-1]))
    )
    flipping = opened(flip=True, windows_per_run=windows_per_run)
    features = flipping.features(image, fit=fit)
    assert flipping.stats.windows == 2 * len(features.inputs)
    found = flipping.masks(features, NAMES, kp_w=0.3)
    np.testing.assert_allclose(found, (straight + mirrored[..., ::-1]) / 2, rtol=0, atol=1e-5)
    assert np.abs(found - straight).max() > 0.1
    result = flipping(image, NAMES, pamr=pamr, fit=fit)
    assert (result.label_map[10:38, 14:56] == 0).mean() > 0.9


@pytest.mark.parametrize("flip", [False, True])
def test_features_of_a_segmenter_that_flips_otherwise(
    tiny_bundle_folder: Path, paint: Callable[..., Image], flip: bool
) -> None:
    maker, other = (Segmenter.open(tiny_bundle_folder, threads=1, flip=one) for one in (flip, not flip))
    features = maker.features(paint((64, 96), red=(0, 32, 0, 16)))
    words = ("with", "without") if flip else ("without", "with")
    message = rf"made {words[0]} the mirrored .* works {words[1]} it\. Make them .*features\(image\), .* flip={flip}"
    with pytest.raises(InputError, match=message):
        other.segment(features, NAMES)
    with pytest.raises(InputError, match=message):
        other.masks(features, NAMES)


@pytest.mark.parametrize("pamr", [False, True])
def test_features_of_a_segmenter_that_takes_other_windows_at_once(
    tiny_bundle_folder: Path, paint: Callable[..., Image], pamr: bool
) -> None:
    image = paint((80, 230), red=(0, 40, 0, 100), blue=(30, 80, 130, 230))
    one, three = (Segmenter.open(tiny_bundle_folder, threads=1, windows_per_run=count) for count in (1, 3))
    wanted = one(image, NAMES, fit="slide", pamr=pamr)
    for maker, other in ((one, three), (three, one)):
        features = maker.features(image, fit="slide")
        result = other.segment(features, NAMES, pamr=pamr)
        np.testing.assert_array_equal(result.label_map, wanted.label_map)
        np.testing.assert_array_equal(other.masks(features, NAMES), maker.masks(features, NAMES))


@pytest.fixture
def two_sizes(write_tiny_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A bundle with a square graph in two sizes, and a wide one in a single size."""
    return write_tiny_bundle(tmp_path / "scales", more_sizes=[(128, 128), (64, 128)])


def at_size(folder: Path, size: tuple[int, int]) -> Segmenter:
    """A Segmenter that has one of the bundle's image graphs alone."""
    segmenter = Segmenter.open(folder, threads=1)
    segmenter._graph_sizes = [size]
    return segmenter


@pytest.mark.parametrize("fit", ["whole", "stretch", "slide"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pamr", [False, True])
def test_scales_take_the_mean_over_the_sizes(
    two_sizes: Path, paint: Callable[..., Image], fit: str, flip: bool, pamr: bool
) -> None:
    """Held against each size on its own, the coarse masks brought to the fine ones' grid."""
    image = paint((100, 150), red=(0, 50, 0, 70), blue=(31, 90, 83, 141))
    fine, coarse = (at_size(two_sizes, size) for size in ((128, 128), (64, 64)))
    fine.flip = coarse.flip = flip
    found = [one(image, NAMES, fit=fit, pamr=pamr, threshold=0) for one in (fine, coarse)]  # 0: all are refined
    size = found[0].fitted_masks.shape[1:]
    expected = (found[0].fitted_masks + resize_masks(found[1].fitted_masks, size)) / 2
    both = Segmenter.open(two_sizes, threads=1, scales=True, flip=flip)
    result = both(image, NAMES, fit=fit, pamr=pamr, threshold=0)
    np.testing.assert_allclose(result.fitted_masks, expected, rtol=0, atol=1e-6)
    assert np.abs(expected - found[0].fitted_masks).max() > 0.05
    assert result.settings["sizes"] == [[128, 128], [64, 64]]
    windows = result.settings["windows"]
    assert windows == sum(one.settings["windows"] for one in found)  # type: ignore[misc]
    assert both.stats.windows == windows * (1 + flip)  # type: ignore[operator]
    features = both.features(image, fit=fit)
    asked_later = both.segment(features, NAMES, pamr=pamr, threshold=0)
    np.testing.assert_array_equal(asked_later.fitted_masks, result.fitted_masks)
    (streamed,) = both.stream([image], NAMES, fit=fit, pamr=pamr, threshold=0)
    np.testing.assert_array_equal(streamed.label_map, result.label_map)
    assert both.masks(features, NAMES).shape == (3, 100, 150)
    assert both.stats.images == 3


@pytest.mark.parametrize("kp_w", [0.0, 0.3])
def test_pamr_over_scales_refines_what_their_mean_may_label(
    two_sizes: Path, paint: Callable[..., Image], refined_counts: list[int], kp_w: float
) -> None:
    """A red spot that the fine graph alone sees: what counts is the mean of both, and both are refined or neither."""
    image = paint((128, 128), red=(4, 12, 4, 8), blue=(64, 128, 0, 128))
    names = ["red", "green", "blue"]
    fine, coarse = (
        at_size(two_sizes, size)(image, names, kp_w=kp_w, fit="stretch").peaks["red"] for size in ((128, 128), (64, 64))
    )
    assert (fine > 0.6, coarse < 0.1) == (True, True)
    segmenter = Segmenter.open(two_sizes, threads=1, scales=True)
    everything = segmenter.masks(segmenter.features(image), names, kp_w=kp_w, pamr=True)
    assert refined_counts == [3, 3]
    for threshold, count in ((0.02, 3), (0.2, 2), (0.6, 1)):
        refined_counts.clear()
        result = segmenter(image, names, kp_w=kp_w, pamr=True, threshold=threshold)
        assert refined_counts == [count, count]
        expected = labels_from_masks(everything, (128, 128), threshold)
        np.testing.assert_array_equal(result.label_map, expected)


def test_scales_of_the_nearest_aspect(
    write_tiny_bundle: Callable[..., Path], tmp_path: Path, paint: Callable[..., Image], tiny: ModuleType
) -> None:
    sizes = [(64, 128), (128, 128), (128, 272)]
    segmenter = Segmenter.open(write_tiny_bundle(tmp_path / "tiny", more_sizes=sizes), scales=True, windows_per_run=4)
    image = paint((128, 256), red=(0, 64, 0, 128), green=(0, 128, 192, 256))
    result = segmenter(image, NAMES, kp_w=0)
    assert result.settings["sizes"] == [[128, 272], [64, 128]]  # alike to within a tenth
    assert agreement(result.label_map, expected_map(image, tiny)) > 0.98
    assert segmenter(image[:, :128], NAMES).settings["sizes"] == [[128, 128], [64, 64]]
    assert segmenter(image, NAMES, fit="slide").settings["sizes"] == [[128, 128], [64, 64]]


@pytest.mark.parametrize(("more", "have"), [([], "64x64"), ([(64, 128)], "64x64, 64x128")])
def test_scales_need_two_sizes(
    write_tiny_bundle: Callable[..., Path], tmp_path: Path, more: list[tuple[int, int]], have: str
) -> None:
    remedy = "tclkit export CHECKPOINT -o FOLDER --size 64x64 --size 128x128"
    text = rf"of one aspect in two sizes or more, found {have}\. .*: {remedy}"
    with pytest.raises(InputError, match=text):
        Segmenter.open(write_tiny_bundle(tmp_path / "tiny", more_sizes=more), scales=True)


@pytest.mark.parametrize("pamr", [False, True])
def test_pixels_of_contrast_prompts_are_background(segmenter: Segmenter, scene: Image, pamr: bool) -> None:
    plain = segmenter(scene, ["red", "green"], kp_w=0, pamr=pamr)
    assert plain.areas["green"] > 0.3
    result = segmenter(scene, ["red"], kp_w=0, contrast=["green", "blue"], pamr=pamr)
    assert result.names == ("red",)
    assert dict(result.areas) == {"red": plain.areas["red"]}
    np.testing.assert_array_equal(result.label_map == 0, plain.label_map == 0)
    assert result.soft_masks.shape == (1, 64, 64)
    asked_later = segmenter.segment(segmenter.features(scene), ["red"], kp_w=0, contrast=["green", "blue"], pamr=pamr)
    np.testing.assert_array_equal(asked_later.label_map, result.label_map)
    (streamed,) = segmenter.stream([scene], ["red"], kp_w=0, contrast=["green", "blue"], pamr=pamr)
    np.testing.assert_array_equal(streamed.label_map, result.label_map)


def test_a_contrast_prompt_that_was_named_too_takes_nothing_away(segmenter: Segmenter, scene: Image) -> None:
    plain = segmenter(scene, ["red", "green"], kp_w=0)
    result = segmenter(scene, ["red", "green"], kp_w=0, contrast=["green", "blue"])
    np.testing.assert_array_equal(result.label_map, plain.label_map)


def test_contrast_decides_where_a_threshold_cannot(segmenter: Segmenter, scene: Image) -> None:
    """Without a background every pixel is red's; a prompt for the rest takes it away."""
    assert segmenter(scene, ["red"], kp_w=0, background=False).areas["red"] == 1
    result = segmenter(scene, ["red"], kp_w=0, background=False, contrast=["green"])
    assert (result.label_map[scene[..., 1] == 255] == -1).mean() > 0.99
    assert segmenter(scene, ["red"], kp_w=0, contrast=[]).areas == segmenter(scene, ["red"], kp_w=0).areas
