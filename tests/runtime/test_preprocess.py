from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tclkit.runtime.errors import InputError
from tclkit.runtime.preprocess import check_image, plan_fit, plan_scales, rescaled_size, resize_image

GREY = (124, 116, 104)
SQUARE = [(448, 448)]


@pytest.mark.parametrize("case", range(4))
def test_resizing_equals_the_reference(golden: Path, case: int) -> None:
    arrays = np.load(golden / "preprocess.npz")
    image = arrays[f"rgb_in_{case}"]
    long, short = arrays[f"scale_wh_long_short_{case}"].tolist()
    size = rescaled_size(*image.shape[:2], short=short, long=long)
    np.testing.assert_array_equal(resize_image(image, size), arrays[f"rgb_resized_u8_{case}"])


def test_sizes_equal_the_reference(golden: Path) -> None:
    for height, width, *expected in np.load(golden / "preprocess.npz")["rescaled_size_cases_hw_to_hw"].tolist():
        assert rescaled_size(height, width) == tuple(expected)


def test_resize_takes_views() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resize_image(image[..., ::-1], (40, 50)), resize_image(image, (40, 50))[..., ::-1])
    assert resize_image(image, (20, 30)) is image


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5), np.uint8), r"uint8 of shape \(4, 5\): grey images take np.stack"),
        (np.zeros((4, 5, 1), np.uint8), "grey images take np.repeat"),
        (np.zeros((4, 5, 4), np.uint8), r"drop the alpha channel, image\[..., :3\]"),
        (np.zeros((4, 5, 2), np.uint8), "needs 3 colours"),
        (np.zeros((3, 4, 5), np.uint8), r"colours come last, image.transpose\(1, 2, 0\)"),
        (np.zeros((2, 4, 5, 3), np.uint8), "one image at a time"),
        (np.zeros(60, np.uint8), "not a flat buffer"),
        (np.zeros((0, 5, 3), np.uint8), "has no pixels"),
        (np.zeros((4, 5, 3), np.float32), r"float32 of shape \(4, 5, 3\): floats in 0..1 take"),
        (np.zeros((4, 5, 3), np.uint16), "16-bit values take"),
        (np.zeros((4, 5, 3), np.int64), r"take image.astype\(np.uint8\)"),
        ("cat.jpg", r"this is str: read the file with load_image\(path\) first"),
        (Path("cat.jpg"), "load_image"),
        (Image.new("RGB", (4, 5)), r"this is Image: take np.asarray\(image.convert\('RGB'\)\)"),
        ([[0]], "make it a numpy array"),
        (None, "the camera or file gave no frame"),
    ],
)
def test_what_is_no_image_is_told_the_remedy(image: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_image(image)


def test_an_image_passes_uncopied() -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    assert np.shares_memory(check_image(image), image)


@pytest.mark.parametrize(
    ("source", "resized"),
    [((448, 448), (448, 448)), ((480, 640), (336, 448)), ((1, 1), (448, 448)), ((4000, 1000), (448, 112))],
)
def test_whole_fits_inside(source: tuple[int, int], resized: tuple[int, int]) -> None:
    plan = plan_fit(source, SQUARE)
    assert plan.resized_size == resized
    assert plan.windows == ((0, resized[0], 0, resized[1]),)


def test_whole_pads_with_the_mean_and_crops_it_off_again() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 63, 3), dtype=np.uint8)
    plan = plan_fit((30, 63), [(64, 64)], patch_size=16)
    assert plan.resized_size == (30, 64)
    (padded,) = plan.inputs(image, GREY)
    assert padded.shape == (64, 64, 3)
    np.testing.assert_array_equal(padded[17:47], resize_image(image, (30, 64)))
    assert (padded[:17] == GREY).all()
    assert (padded[47:] == GREY).all()
    masks = np.zeros((2, 64, 64), np.float32)
    masks[:, 17:47] = 1
    assert (plan.join(iter([masks]), 2).array() == 1).all()


def test_an_odd_pixel_of_padding_goes_right_and_below() -> None:
    plan = plan_fit((64, 33), [(64, 64)])
    (padded,) = plan.inputs(np.zeros((64, 33, 3), np.uint8), GREY)
    assert (padded[:, 15:48] == 0).all()
    assert (padded[:, :15] == GREY).all()
    assert (padded[:, 48:] == GREY).all()


def test_the_graph_of_the_nearest_aspect_is_taken() -> None:
    sizes = [(448, 448), (448, 896), (896, 448), (672, 672)]
    assert plan_fit((480, 640), sizes).graph_size == (448, 448)
    assert plan_fit((720, 1280), sizes).graph_size == (448, 896)
    assert plan_fit((1280, 720), sizes, "stretch").graph_size == (896, 448)
    assert plan_fit((720, 1280), sizes, "slide").graph_size == (448, 448)
    assert plan_fit((720, 1280), [(448, 896)], "slide").graph_size == (448, 896)


def test_scales_are_sizes_of_one_aspect_the_finest_first() -> None:
    sizes = [(448, 448), (224, 448), (672, 672), (448, 880), (224, 224)]

    def planned(source: tuple[int, int], fit: str = "whole") -> list[tuple[int, int]]:
        return [plan.graph_size for plan in plan_scales(source, sizes, fit)]

    assert planned((480, 640)) == planned((720, 1280), "slide") == [(672, 672), (448, 448), (224, 224)]
    assert planned((720, 1280)) == planned((720, 1280), "stretch") == [(448, 880), (224, 448)]
    assert [plan.resized_size for plan in plan_scales((300, 400), sizes)] == [(504, 672), (336, 448), (168, 224)]
    with pytest.raises(
        InputError,
        match=r"found 448x448, 224x448\. .*: tclkit export CHECKPOINT -o FOLDER --size 448x448 --size 896x896",
    ):
        plan_scales((480, 640), sizes[:2])
    with pytest.raises(InputError, match="unknown fit 'crop'"):
        plan_scales((480, 640), sizes, "crop")


def test_stretch_distorts() -> None:
    plan = plan_fit((10, 1000), SQUARE, "stretch")
    assert plan.resized_size == (448, 448)
    (stretched,) = plan.inputs(np.zeros((10, 1000, 3), np.uint8), GREY)
    assert (stretched == 0).all()


def test_slide_covers_the_image_as_the_protocol_does() -> None:
    plan = plan_fit((375, 500), SQUARE, "slide")
    assert plan.resized_size == (448, 597)
    assert [window.left for window in plan.windows] == [0, 149]
    image = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)
    first, second = plan.inputs(image, GREY)
    resized = resize_image(image, (448, 597))
    np.testing.assert_array_equal(first, resized[:, :448])
    np.testing.assert_array_equal(second, resized[:, 149:])
    masks = np.linspace(0, 1, 597, dtype=np.float32)[None, None].repeat(448, axis=1)
    joined = plan.join(iter([masks[..., :448], masks[..., 149:]]), 1).array()
    np.testing.assert_allclose(joined, masks, atol=1e-6)


def test_slide_pads_what_is_smaller_than_the_window() -> None:
    plan = plan_fit((200, 3000), SQUARE, "slide")
    assert plan.resized_size == (137, 2048)
    inputs = list(plan.inputs(np.zeros((200, 3000, 3), np.uint8), GREY))
    assert len(inputs) == len(plan.windows) == 9
    assert (inputs[0][155:292] == 0).all()
    assert (inputs[0][:155] == GREY).all()


def test_masks_on_the_grid_are_brought_to_pixels() -> None:
    plan = plan_fit((448, 448), SQUARE)
    joined = plan.join(iter([np.full((3, 112, 112), 0.5, np.float32)]), 3).array()
    assert joined.shape == (3, 448, 448)
    assert (joined == 0.5).all()


@pytest.mark.parametrize(
    ("fit", "source", "message"),
    [
        (
            "whole",
            (40, 4000),
            r"4000 x 40 pixels; fitted \(whole\) it would be 448 x 4, thinner .* 'slide' or 'stretch'",
        ),
        (
            "whole",
            (20, 10000),
            r"448 x 1, thinner than one patch of 16\. Cut it into pieces, or use the fit 'stretch'$",
        ),
        ("whole", (10000, 1), "1 x 10000 pixels"),
        (
            "slide",
            (2, 10000),
            r"would be 2048 x 1, thinner than one patch of 16\. Cut it into pieces, or use the fit 'str",
        ),
    ],
)
def test_extreme_aspects_are_refused(fit: str, source: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_fit(source, SQUARE, fit)


def test_unknown_fit() -> None:
    with pytest.raises(InputError, match="unknown fit 'crop': it is one of whole, stretch, slide"):
        plan_fit((10, 10), SQUARE, "crop")
