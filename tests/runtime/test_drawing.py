import numpy as np
import pytest
from numpy.typing import NDArray

from tclkit.runtime.drawing import draw_overlay
from tclkit.runtime.errors import InputError
from tclkit.runtime.palette import label_colours

SIZES = [(1, 1), (2, 900), (900, 2), (64, 64), (300, 200), (480, 640), (40, 3000)]


def scene(height: int, width: int, value: int = 128) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """A grey picture whose left half is label 0."""
    image = np.full((height, width, 3), value, np.uint8)
    label_map = np.full((height, width), -1, np.int16)
    label_map[:, : (width + 1) // 2] = 0
    return image, label_map


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 30])
def test_any_size(size: tuple[int, int], count: int) -> None:
    image, label_map = scene(*size)
    names = [f"prompt {i}" for i in range(count)]
    overlay = draw_overlay(image, label_map, names)
    assert overlay.dtype == np.uint8
    assert overlay.shape[0] > size[0] or overlay.shape[1] > size[1]
    assert max(overlay.shape) >= 256  # there is room for text
    assert draw_overlay(image, label_map, names, legend=False).shape == image.shape


def test_tiny_pictures_are_magnified_by_whole_numbers() -> None:
    image, label_map = scene(64, 64)
    overlay = draw_overlay(image, label_map, ["a"])
    assert overlay.shape[0] == 512
    assert (overlay[:512, 300:512] == 128).all()
    assert overlay.shape[1] > 512


@pytest.mark.parametrize("value", [0, 128, 255])
def test_fill_outline_and_ground(value: int) -> None:
    image, label_map = scene(200, 300, value)
    overlay = draw_overlay(image, label_map, ["a"], legend=False)
    colour = np.array(label_colours(1)[0])
    np.testing.assert_allclose(overlay[100, 50], 0.6 * colour + 0.4 * value, atol=2)
    np.testing.assert_array_equal(overlay[100, 149], colour)  # outline inside
    np.testing.assert_array_equal(overlay[100, 150], [value // 4] * 3)  # dark line outside
    np.testing.assert_array_equal(overlay[:, 160:], image[:, 160:])


def test_the_colour_does_not_depend_on_the_pictures_hue() -> None:
    _, label_map = scene(100, 100)
    red = draw_overlay(np.full((100, 100, 3), (150, 0, 0), np.uint8), label_map, ["a"], legend=False)
    grey = draw_overlay(np.full((100, 100, 3), 45, np.uint8), label_map, ["a"], legend=False)
    np.testing.assert_allclose(red[50, 20].astype(int), grey[50, 20].astype(int), atol=1)


@pytest.mark.parametrize(("size", "axis"), [((300, 500), 1), ((100, 600), 0), ((600, 100), 1)])
def test_compare_puts_the_untouched_picture_first(size: tuple[int, int], axis: int) -> None:
    image, label_map = scene(*size)
    both = draw_overlay(image, label_map, ["a"], legend=False, compare=True)
    np.testing.assert_array_equal(both[: size[0], : size[1]], image)
    overlay = draw_overlay(image, label_map, ["a"], legend=False)
    np.testing.assert_array_equal(both[-size[0] :, -size[1] :], overlay)
    assert both.shape[1 - axis] == size[1 - axis]
    assert draw_overlay(image, label_map, ["a"], compare=True).size > both.size


def test_the_picture_is_not_changed_and_views_are_taken() -> None:
    image, label_map = scene(100, 100)
    overlay = draw_overlay(image[::-1, :, ::-1], label_map[::-1], ["a"])
    assert (image == 128).all()
    np.testing.assert_array_equal(overlay, draw_overlay(image, label_map, ["a"]))


def test_opacity() -> None:
    image, label_map = scene(100, 100)
    clear = draw_overlay(image, label_map, ["a"], opacity=0, legend=False)
    full = draw_overlay(image, label_map, ["a"], opacity=1, legend=False)
    assert (clear[50, 20] == 128).all()
    assert tuple(full[50, 20]) == label_colours(1)[0]
    with pytest.raises(InputError, match="opacity is a number from 0 to 1, got 60"):
        draw_overlay(image, label_map, ["a"], opacity=60)


def test_missing_prompts_are_listed_unless_there_are_very_many() -> None:
    image, label_map = scene(400, 600)
    few, many = (draw_overlay(image, label_map, [f"p{i}" for i in range(n)]).shape[0] for n in (20, 200))
    assert many < few


def test_outlines_of_very_many_prompts_have_their_colour() -> None:
    """Twice the number of prompts does not fit the label map's 16 bits."""
    image = np.full((64, 64, 3), 128, np.uint8)
    label_map = np.full((64, 64), -1, np.int16)
    label_map[8:56, 8:56] = 19_999
    overlay = draw_overlay(image, label_map, [f"p{i}" for i in range(20_000)], opacity=0, legend=False)
    assert tuple(overlay[8, 30]) == label_colours(20_000)[-1]


def test_prompts_in_any_script_do_not_crash() -> None:
    image, label_map = scene(100, 100)
    draw_overlay(image, label_map, ["犬🐶", "", "\x00", "Ω" * 500, "שלום"])


def test_wrong_label_maps() -> None:
    image, label_map = scene(10, 12)
    with pytest.raises(InputError, match=r"label map is int16 \(12, 10\), the image needs integers \(10, 12\)"):
        draw_overlay(image, label_map.T, ["a"])
    with pytest.raises(InputError, match="float64"):
        draw_overlay(image, label_map.astype(float), ["a"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="labels go from -1 to 0, but 0 names allow -1 to -1"):
        draw_overlay(image, label_map, [])
    with pytest.raises(InputError, match="grey images take"):
        draw_overlay(image[..., 0], label_map, ["a"])


def test_no_prompts_and_nothing_found() -> None:
    image, label_map = scene(100, 100)
    label_map[:] = -1
    for names in ([], ["a"]):
        overlay = draw_overlay(image, label_map, names)
        np.testing.assert_array_equal(overlay[:500, :500], 128)
