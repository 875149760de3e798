"""The ONNX Runtime backend runs a bundle's graphs, and says clearly what it cannot run."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from tclkit.runtime.backends import HostFeatures
from tclkit.runtime.bundle import open_bundle
from tclkit.runtime.errors import BackendError, BundleError, InputError
from tclkit.runtime.onnxruntime_backend import OnnxRuntimeBackend


@pytest.fixture(scope="module")
def backend(tiny_bundle_folder: Path) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(open_bundle(tiny_bundle_folder), threads=1)


def scene(tiny: ModuleType, size: tuple[int, int] = (64, 64), batch: int = 1) -> np.ndarray:
    """A red block at the top left, a blue one at the bottom right, on what is neither."""
    images = np.empty((batch, *size, 3), np.uint8)
    images[:] = tiny.OTHER_RGB
    images[:, :16, :32] = tiny.PALETTE["red"]
    images[:, -16:, -8:] = tiny.PALETTE["blue"]
    return images


def text(tiny: ModuleType, *colours: str) -> np.ndarray:
    return np.eye(tiny.WIDTH, dtype=np.float32)[[list(tiny.PALETTE).index(colour) for colour in colours]]


def test_features_and_masks(backend: OnnxRuntimeBackend, tiny: ModuleType) -> None:
    features = backend.image_features(scene(tiny, batch=2))
    assert features.grounded.shape == (2, tiny.WIDTH, 16, 16)
    assert features.kp is not None
    assert features.kp.shape == (2, tiny.WIDTH, 4, 4)
    masks = backend.masks(features, text(tiny, "red", "blue"), 0.0)
    assert masks.dtype == np.float32
    expected = np.zeros((2, 2, 16, 16), bool)
    expected[:, 0, :4, :8] = True
    expected[:, 1, -4:, -2:] = True
    np.testing.assert_array_equal(masks > 0.5, expected)


def test_images_of_a_batch_are_taken_one_by_one(backend: OnnxRuntimeBackend, tiny: ModuleType) -> None:
    pair = scene(tiny, batch=2)
    pair[1] = pair[1, ::-1]
    together = backend.image_features(pair)
    assert together.kp is not None
    for index, one in enumerate(pair):
        alone = backend.image_features(one[None])
        assert alone.kp is not None
        np.testing.assert_array_equal(together.grounded[index], alone.grounded[0])
        np.testing.assert_array_equal(together.kp[index], alone.kp[0])
    assert not np.array_equal(together.grounded[0], together.grounded[1])


def test_kp_w_mixes_the_two_branches(backend: OnnxRuntimeBackend, tiny: ModuleType) -> None:
    features = backend.image_features(scene(tiny))
    grounded, kp, mixed = (backend.masks(features, text(tiny, "red"), kp_w) for kp_w in (0.0, 1.0, 0.3))
    np.testing.assert_allclose(mixed, 0.3 * kp + 0.7 * grounded, atol=1e-6)
    assert np.abs(kp - grounded).max() > 0.1


def test_texts(backend: OnnxRuntimeBackend, tiny: ModuleType) -> None:
    tokenizer = tiny.tiny_tokenizer()
    ids = np.array([tokenizer.encode("red").ids, tokenizer.encode("blue").ids])
    embeddings = backend.encode_text(ids)
    assert embeddings.dtype == np.float32
    assert embeddings.argmax(axis=1).tolist() == [0, 2]


def test_without_kp_branch(write_tiny_bundle: Callable[..., Path], tmp_path: Path, tiny: ModuleType) -> None:
    backend = OnnxRuntimeBackend(open_bundle(write_tiny_bundle(tmp_path / "b", kp_w=0.0)), threads=1)
    features = backend.image_features(scene(tiny))
    assert features.kp is None
    assert backend.masks(features, text(tiny, "red"), 0.0)[0, 0, 0, 0] > 0.9
    with pytest.raises(InputError, match=r"tiny has no KP branch, but kp_w is 0\.3\. Use kp_w 0"):
        backend.masks(features, text(tiny, "red"), 0.3)


def test_each_size_has_its_graph(write_tiny_bundle: Callable[..., Path], tmp_path: Path, tiny: ModuleType) -> None:
    bundle = open_bundle(write_tiny_bundle(tmp_path / "b", more_sizes=[(32, 96)]))
    backend = OnnxRuntimeBackend(bundle, threads=1)
    assert backend.image_features(scene(tiny, (32, 96))).grounded.shape == (1, tiny.WIDTH, 8, 24)
    assert backend.image_features(scene(tiny)).grounded.shape == (1, tiny.WIDTH, 16, 16)
    with pytest.raises(InputError, match=r"images are 96x32, tiny has image graphs for 64x64, 32x96\. .*--size 96x32"):
        backend.image_features(scene(tiny, (96, 32)))


def test_sessions_are_made_when_needed(tiny_bundle_folder: Path, tmp_path: Path, tiny: ModuleType) -> None:
    folder = shutil.copytree(tiny_bundle_folder, tmp_path / "b")
    bundle = open_bundle(folder)
    (folder / "text.onnx").unlink()
    backend = OnnxRuntimeBackend(bundle, threads=1)
    backend.image_features(scene(tiny))
    with pytest.raises(BundleError, match="is not there"):
        backend.encode_text(np.zeros((1, 3), np.int64))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((64, 64, 3), np.uint8), r"images should be uint8 \(B, H, W, 3\), found uint8 \(64, 64, 3\)"),
        (np.zeros((1, 64, 64, 3), np.float32), r"found float32"),
        (np.zeros((1, 3, 64, 64), np.uint8), r"found uint8 \(1, 3, 64, 64\)"),
        (np.zeros((0, 64, 64, 3), np.uint8), r"found uint8 \(0, 64, 64, 3\)"),
        ([[1]], "should be a numpy array, .*found list"),
    ],
)
def test_images_that_do_not_fit(backend: OnnxRuntimeBackend, images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        backend.image_features(images)


def test_views_are_fine(backend: OnnxRuntimeBackend, tiny: ModuleType) -> None:
    image = scene(tiny)
    flipped = backend.image_features(image[:, ::-1, ::-1])
    same = backend.image_features(np.ascontiguousarray(image[:, ::-1, ::-1]))
    np.testing.assert_array_equal(flipped.grounded, same.grounded)


def test_masks_that_cannot_be(backend: OnnxRuntimeBackend, tiny: ModuleType) -> None:
    features = backend.image_features(scene(tiny))
    red = text(tiny, "red")
    for kp_w in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"kp_w should be in \[0, 1\], found"):
            backend.masks(features, red, kp_w)
    for wrong in (red[:0], red[:, :4], red[0], red.astype(np.float64)):
        with pytest.raises(InputError, match=r"text embeddings should be float32 \(N, 9\), found"):
            backend.masks(features, wrong, 0.3)
    with pytest.raises(InputError, match="KP features should be a numpy array"):
        backend.masks(HostFeatures(grounded=features.grounded, kp=None), red, 0.3)


def test_token_ids_that_do_not_fit(backend: OnnxRuntimeBackend) -> None:
    with pytest.raises(InputError, match="78 long, tiny reads at most 77"):
        backend.encode_text(np.zeros((1, 78), np.int64))
    with pytest.raises(InputError, match=r"token ids should be int64 \(M, L\), found int32"):
        backend.encode_text(np.zeros((1, 5), np.int32))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"token ids are 5 to 1000000, tiny knows 0 to"):
        backend.encode_text(np.array([[5, 10**6]]))


def test_a_graph_that_fails_to_run(tiny_bundle_folder: Path) -> None:
    bundle = open_bundle(tiny_bundle_folder)
    model = replace(bundle.manifest.model, vocab_size=10**10)  # more than the graph's table has
    backend = OnnxRuntimeBackend(replace(bundle, manifest=replace(bundle.manifest, model=model)), threads=1)
    with pytest.raises(BackendError, match=r"could not run text\.onnx of tiny on token_ids \(1, 3\): ") as caught:
        backend.encode_text(np.full((1, 3), 10**9))
    assert "\n" not in str(caught.value)


def test_a_graph_that_cannot_be_loaded(tiny_bundle_folder: Path, tmp_path: Path, tiny: ModuleType) -> None:
    folder = shutil.copytree(tiny_bundle_folder, tmp_path / "b")
    (folder / "image.onnx").write_bytes(b"not onnx")
    backend = OnnxRuntimeBackend(open_bundle(folder, verify=False), threads=1)
    with pytest.raises(
        BackendError, match=r"ONNX Runtime [\d.]+ cannot load .*image\.onnx: .*pip install -U"
    ) as caught:
        backend.image_features(scene(tiny))
    assert "\n" not in str(caught.value)


def test_a_graph_with_another_interface(tiny_bundle_folder: Path, tmp_path: Path, tiny: ModuleType) -> None:
    folder = shutil.copytree(tiny_bundle_folder, tmp_path / "b")
    model = onnx.load(folder / "image.onnx")
    model.graph.output.pop()
    onnx.save(model, folder / "image.onnx")
    backend = OnnxRuntimeBackend(open_bundle(folder, verify=False), threads=1)
    with pytest.raises(BundleError, match=r"should have the outputs grounded, kp, found grounded\. Export"):
        backend.image_features(scene(tiny))


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_positive(tiny_bundle_folder: Path, threads: int) -> None:
    with pytest.raises(InputError, match="1 or more"):
        OnnxRuntimeBackend(open_bundle(tiny_bundle_folder), threads=threads)
