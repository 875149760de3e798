from pathlib import Path

import numpy as np
import pytest

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
