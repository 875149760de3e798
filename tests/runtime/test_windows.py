from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tclkit.runtime.labels import labels_from_masks
from tclkit.runtime.upsample import resize_masks
from tclkit.runtime.windows import Window, WindowAverage, window_positions


def test_positions_equal_the_reference(golden: Path) -> None:
    expected = np.load(golden / "slide.npz")["windows_y1y2x1x2_150x200"]
    assert window_positions((150, 200), (64, 64), (32, 32)) == tuple(Window(*row) for row in expected.tolist())


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 64), [(0, 64, 0, 64)]),
        ((50, 130), [(0, 50, 0, 64), (0, 50, 32, 96), (0, 50, 64, 128), (0, 50, 66, 130)]),
        ((1, 1), [(0, 1, 0, 1)]),
        ((65, 10), [(0, 64, 0, 10), (1, 65, 0, 10)]),
    ],
)
def test_positions_of_odd_sizes(size: tuple[int, int], expected: list[tuple[int, int, int, int]]) -> None:
    windows = window_positions(size, (64, 64), (32, 32))
    assert list(windows) == expected
    assert (windows[0].height, windows[0].width) == (min(64, size[0]), min(64, size[1]))


def test_average_of_pieces_is_the_whole() -> None:
    whole = np.random.default_rng(0).random((3, 50, 70), np.float32)
    average = WindowAverage(3, (50, 70))
    for window in window_positions((50, 70), (32, 32), (16, 16)):
        average.add(window, whole[:, window.top : window.bottom, window.left : window.right])
    mean = average.mean()
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, whole, atol=1e-6)


def test_average_weighs_windows_equally() -> None:
    average = WindowAverage(1, (1, 3))
    average.add(Window(0, 1, 0, 2), np.full((1, 1, 2), 1, np.float32))
    average.add(Window(0, 1, 1, 3), np.full((1, 1, 2), 2, np.float32))
    np.testing.assert_array_equal(average.mean(), [[[1, 1.5, 2]]])


@pytest.fixture(scope="module")
def reference_masks(golden: Path) -> Callable[..., NDArray[np.float32]]:
    """The authors' tiny model: a normalised crop (1, 3, h, w) to its soft masks (N, h, w)."""
    import torch

    from tclkit.tcl import load_model

    model = load_model(golden / "official_learned.pth", clip=golden / "clip_tiny.pt")
    texts = torch.from_numpy(np.load(golden / "slide.npz")["text_embedding"])

    def masks(crop_BCHW: NDArray[np.float32], kp_w: float, pamr: bool) -> NDArray[np.float32]:
        with torch.no_grad():
            generated = model.generate_masks(torch.from_numpy(crop_BCHW), texts, kp_w=kp_w, pamr=pamr)
        return np.asarray(generated[0].numpy())

    return masks


@pytest.mark.parametrize(
    ("tag", "kp_w", "pamr", "background"),
    [("bg_pamr", 0.3, True, 0.4), ("bg_nopamr", 0.3, False, 0.5), ("nobg_nopamr_kp0", 0.0, False, None)],
)
@pytest.mark.parametrize("size", ["150x200", "50x130"])
def test_averaged_masks_and_labels_equal_the_reference(
    golden: Path, reference_masks: Callable[..., NDArray[np.float32]], size: str, tag: str, kp_w: float, pamr: bool,
    background: float | None,
) -> None:  # fmt: skip
    arrays = np.load(golden / "slide.npz")
    image = arrays[f"image_{size}"]
    average = WindowAverage(3, image.shape[2:])
    for window in window_positions(image.shape[2:], (64, 64), (32, 32)):
        crop = image[:, :, window.top : window.bottom, window.left : window.right]
        average.add(window, reference_masks(np.ascontiguousarray(crop), kp_w, pamr))
    masks = average.mean()
    stride = 1 if f"{tag}/logits_{size}" in arrays else 2
    expected = arrays[f"{tag}/logits_{size}" + ("" if stride == 1 else "_strided2")][0]
    if background is not None:
        np.testing.assert_allclose(expected[0], background, atol=1e-6)
        expected = expected[1:]
    np.testing.assert_allclose(masks[:, ::stride, ::stride], expected, rtol=0, atol=1e-5)  # measured: 1.4e-6
    if size == "150x200":
        shift = 0 if background is None else 1
        for name, target in (("150x200", (150, 200)), ("ori270x361", (270, 361))):
            resized = resize_masks(masks, target)
            if target == (270, 361):
                logits = arrays[f"{tag}/logits_ori270x361_strided8"][0, shift:]
                np.testing.assert_allclose(resized[:, ::8, ::8], logits, rtol=0, atol=1e-5)  # measured: 1.4e-6
            labels = labels_from_masks(masks, target, background) + shift
            differing = (labels != arrays[f"{tag}/pred_{name}"]).sum()
            assert differing <= 14  # as many near ties there are; measured: 0
