import copy
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tclkit.runtime.errors import InputError
from tclkit.runtime.result import Segmentation, segmentation_from_masks

NAMES = ("left", "right", "nowhere")


@pytest.fixture
def result() -> Segmentation:
    """A 60 x 80 picture seen at 30 x 40: label 0 in the left quarter, label 1 in the right half."""
    masks = np.zeros((3, 30, 40), np.float32)
    masks[0, :, :10] = 0.8
    masks[1, :, 20:] = 0.9
    masks[2] = 0.3
    image = np.full((60, 80, 3), 90, np.uint8)
    return segmentation_from_masks(
        image, NAMES, masks, 0.5, settings={"fit": "whole", "kp_w": 0.3}, model="m", backend="b",
        timings_ms={"image": 1.23456}, counters={"images": 1},
    )  # fmt: skip


def test_areas_scores_and_peaks(result: Segmentation) -> None:
    assert result.size == (60, 80)
    assert result.areas == {"left": 0.25, "right": 0.5, "nowhere": 0.0}
    assert result.scores == pytest.approx({"left": 0.8, "right": 0.9, "nowhere": 0}, abs=0.02)
    assert result.peaks == pytest.approx({"left": 0.8, "right": 0.9, "nowhere": 0.3})


def test_soft_masks_agree_with_the_label_map(result: Segmentation) -> None:
    assert result.soft_masks.shape == (3, 60, 80)
    assert result.soft_masks.dtype == np.float32
    assert result.soft_masks is result.soft_masks
    background = np.full((1, 60, 80), 0.5, np.float32)
    np.testing.assert_array_equal(np.concatenate([background, result.soft_masks]).argmax(axis=0) - 1, result.label_map)
    np.testing.assert_array_equal(result.soft_mask("right"), result.soft_masks[1])
    np.testing.assert_array_equal(result.mask("right"), result.label_map == 1)
    with pytest.raises(InputError, match="'up' is none of the prompts: left, right, nowhere"):
        result.soft_mask("up")


def test_regions(result: Segmentation) -> None:
    assert [(region.name, region.box) for region in result.regions()] == [
        ("left", (0, 0, 20, 60)),
        ("right", (40, 0, 80, 60)),
    ]
    assert [region.name for region in result.regions(min_area_fraction=0.3)] == ["right"]


def test_regions_are_counted_without_being_traced(result: Segmentation, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = Counter(region.name for region in result.regions())
    monkeypatch.setattr("tclkit.runtime.regions.rings_from_mask", None)
    assert result.region_counts() == {"left": 1, "right": 1, "nowhere": 0} == {name: traced[name] for name in NAMES}
    assert result.region_counts(min_area_fraction=0.3) == {"left": 0, "right": 1, "nowhere": 0}


def test_dict_is_json(result: Segmentation) -> None:
    described = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert described["image"] == {"height": 60, "width": 80}
    assert described["settings"] == {"threshold": 0.5, "fit": "whole", "kp_w": 0.3}
    left, _, nowhere = described["prompts"]
    assert left["regions"] == [
        {"area_px": 1200, "box": [0, 0, 20, 60], "polygon": [[0, 0], [20, 0], [20, 60], [0, 60]], "holes": []}
    ]
    assert nowhere == {"name": "nowhere", "area_fraction": 0, "score": 0, "peak": pytest.approx(0.3), "regions": []}
    assert described["background_fraction"] == pytest.approx(0.25)
    assert described["timings_ms"] == {"image": 1.235}
    assert described["counters"] == {"images": 1}
    assert "polygon" not in result.to_dict(polygons=False)["prompts"][0]["regions"][0]


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff"])
def test_overlay_is_saved(result: Segmentation, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "deep" / f"overlay{suffix}"
    assert result.save_overlay(path) == path
    with Image.open(path) as image:
        saved = np.asarray(image.convert("RGB"))
    assert saved.shape == result.overlay().shape
    if suffix == ".png":
        np.testing.assert_array_equal(saved, result.overlay())
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_overlay_that_cannot_be_saved(result: Segmentation, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"overlay should end in one of \.png, \.jpg"):
        result.save_overlay(tmp_path / "overlay")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"overlay\.png cannot be written: (File exists|Not a directory)"):
        result.save_overlay(tmp_path / "file" / "overlay.png")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_failed_write_leaves_the_old_file(
    result: Segmentation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"overlay{suffix}"
    path.write_text("old")

    def full_disk(where: Path, *_: object) -> None:
        with where.open("wb") as stream:
            stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    monkeypatch.setattr(Image.Image, "save", lambda _, where, *options, **more: full_disk(where))
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        result.save_overlay(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_areas_scores_and_masks_are_made_when_they_are_asked_for(result: Segmentation) -> None:
    made = {"areas", "scores", "peaks", "fitted_masks", "soft_masks"}
    assert not made & set(vars(result))
    assert result.areas is result.areas
    assert made & set(vars(result)) == {"areas"}
    result.to_dict()
    assert "soft_masks" not in vars(result)


@pytest.mark.parametrize(("suffix", "most"), [(".webp", 16383), (".jpg", 65500), (".jpeg", 65500)])
def test_size_that_a_format_cannot_hold(tmp_path: Path, suffix: str, most: int) -> None:
    masks = np.zeros((1, 1, 100), np.float32)
    path = tmp_path / f"wide{suffix}"
    segmentation_from_masks(np.zeros((1, most, 3), np.uint8), ["a"], masks, None).save_overlay(path, legend=False)
    path.unlink()
    wider = segmentation_from_masks(np.zeros((1, most + 1, 3), np.uint8), ["a"], masks, None)
    expected = rf"wide{suffix} cannot be written: \w+ holds at most {most} pixels a side, found {most + 1}x1; use .png"
    with pytest.raises(InputError, match=expected):
        wider.save_overlay(path, legend=False)
    assert list(tmp_path.iterdir()) == []
    wider.save_overlay(tmp_path / "wide.png", legend=False)


def test_without_a_background_every_pixel_has_a_prompt() -> None:
    masks = np.array([[[0.2]], [[0.1]]], np.float32)
    result = segmentation_from_masks(np.zeros((3, 4, 3), np.uint8), ["a", "b"], masks, None)
    assert (result.label_map == 0).all()
    assert result.to_dict()["background_fraction"] == 0
    assert result.to_dict()["settings"] == {"threshold": None}


def test_a_result_can_be_sent_to_another_process_before_and_after_it_was_read(result: Segmentation) -> None:
    for _ in range(2):
        for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
            assert again.areas == {"left": 0.25, "right": 0.5, "nowhere": 0.0}
            np.testing.assert_array_equal(again.label_map, result.label_map)
        assert json.loads(json.dumps(result.areas)) == result.areas
        assert result.scores.keys() == result.peaks.keys()
