import numpy as np
import pytest
from numpy.typing import NDArray

from tclkit.runtime.palette import label_colours

# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
XYZ_FROM_RGB = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def lab_from_rgb(colours: list[tuple[int, int, int]], sight: NDArray[np.float64]) -> NDArray[np.float64]:
    rgb = np.array(colours) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ sight.T, 0, 1) @ np.array(XYZ_FROM_RGB).T / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


@pytest.mark.parametrize("sight", [np.eye(3), PROTANOPIA, DEUTERANOPIA], ids=["normal", "protanopia", "deuteranopia"])
def test_twenty_colours_can_be_told_apart(sight: object) -> None:
    lab = lab_from_rgb(label_colours(20), np.array(sight))
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=2)[~np.eye(20, dtype=bool)]
    assert distances.min() > 16.9


def test_any_number_of_colours() -> None:
    assert label_colours(0) == []
    many = label_colours(300)
    assert len(set(many)) == 300
    assert many[:7] == label_colours(7)
    assert all(0 <= value <= 255 for colour in many for value in colour)
