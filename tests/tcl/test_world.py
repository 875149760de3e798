import itertools
import re

import cv2
import numpy as np
import pytest

from tclkit.runtime.errors import ConfigError, InputError
from tclkit.tcl.world import (
    BACKGROUND,
    COLOURS,
    OBJECT_NAMES,
    PALETTE,
    SHAPES,
    TEMPLATES,
    Palette,
    WorldConfig,
    every_wording,
    scene,
    scenes,
)


def test_eight_shapes_in_eight_colours() -> None:
    assert len(SHAPES) >= 8
    assert len(COLOURS) >= 8
    assert len(set(OBJECT_NAMES)) == len(SHAPES) * len(COLOURS)


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    one, again = scene(WorldConfig(seed=3), 17), scene(WorldConfig(seed=3), 17)
    np.testing.assert_array_equal(one.image, again.image)
    np.testing.assert_array_equal(one.label_map, again.label_map)
    assert one.caption == again.caption
    assert (scene(WorldConfig(seed=4), 17).image != one.image).any()


def test_a_stream_can_start_anywhere() -> None:
    config = WorldConfig(size=32)
    late = list(scenes(config, start=5, count=2))
    early = list(itertools.islice(scenes(config), 7))
    np.testing.assert_array_equal(late[0].image, early[5].image)
    assert [s.caption for s in late] == [s.caption for s in early[5:]]


@pytest.mark.parametrize("size", [16, 64, 100])
def test_shapes_and_types_hold_at_any_size(size: int) -> None:
    drawn = scene(WorldConfig(size=size), 0)
    assert drawn.image.shape == (size, size, 3)
    assert drawn.image.dtype == np.uint8
    assert drawn.label_map.shape == (size, size)
    assert drawn.label_map.dtype == np.int16
    assert set(drawn.present) == set(np.unique(drawn.label_map)) - {BACKGROUND}


def test_labels_lie_where_the_colour_is() -> None:
    """Pixels of a label have nearly the colour in its name, and no background pixel of these scenes does."""
    for drawn in scenes(WorldConfig(size=96, seed=1), count=20):
        for name_index in drawn.present:
            tint = np.array(COLOURS[OBJECT_NAMES[name_index].split()[0]])
            pixels = drawn.image[drawn.label_map == name_index].astype(int)
            assert np.abs(np.median(pixels, 0) - tint).max() < 45, OBJECT_NAMES[name_index]


def test_captions_name_only_what_is_there_and_sometimes_not_all() -> None:
    complete = partial = 0
    for drawn in scenes(WorldConfig(seed=2), count=200):
        named = {i for i, name in enumerate(OBJECT_NAMES) if re.search(rf"\b{name}\b", drawn.caption)}
        assert named, drawn.caption
        assert named <= set(drawn.present), drawn.caption
        complete += named == set(drawn.present)
        partial += named < set(drawn.present)
    assert complete > 80
    assert partial > 30


def test_objects_are_hidden_in_part_at_most() -> None:
    hidden = 0
    for drawn in scenes(WorldConfig(seed=6, min_objects=3, max_objects=3), count=60):
        areas = np.bincount(drawn.label_map[drawn.label_map >= 0])
        assert areas[list(drawn.present)].min() > 8
        hidden += len(drawn.present) < 3
    assert hidden < 30


def test_objects_cover_about_a_fifth() -> None:
    cover = np.mean([(drawn.label_map != BACKGROUND).mean() for drawn in scenes(WorldConfig(), count=300)])
    assert 0.15 < cover < 0.35


def test_every_word_of_captions_and_templates_is_known() -> None:
    known = set(re.findall(r"\w+|[.,]", " ".join(every_wording())))
    texts = [drawn.caption for drawn in scenes(WorldConfig(seed=8, size=16), count=400)]
    texts += [template.format(name) for template in TEMPLATES for name in OBJECT_NAMES]
    assert {word for text in texts for word in re.findall(r"\w+|[.,]", text)} <= known


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"size": 8}, "shapes need at least 16"),
        ({"min_objects": 3, "max_objects": 2}, "objects in a scene"),
        ({"min_radius": 0.0}, "radii"),
        (
            {"size": 16, "min_radius": 0.01, "max_radius": 0.01},
            "0.16 pixels of 16 .* min_radius must be 0.03125 or more",
        ),
        ({"sibling": 1.5}, "sibling is 1.5"),
    ],
)
def test_impossible_worlds_are_refused(values: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        WorldConfig(**values)  # type: ignore[arg-type]


def test_the_smallest_objects_are_seen() -> None:
    config = WorldConfig(size=16, min_radius=0.5 / 16, max_radius=0.5 / 16)
    assert all(drawn.present for drawn in scenes(config, count=500))


def test_negative_index_is_refused() -> None:
    with pytest.raises(InputError, match="counted from 0"):
        scene(WorldConfig(), -1)


NEW = Palette(colours=tuple((name, (i * 20, 255 - i * 20, 128)) for i, name in enumerate("abcdefgh")))


def test_another_palette_changes_colours_and_names_alone() -> None:
    for one, other in zip(scenes(WorldConfig(), count=30), scenes(WorldConfig(), count=30, palette=NEW), strict=True):
        np.testing.assert_array_equal(one.label_map, other.label_map)
        assert one.present == other.present
        expected = one.caption
        for colour, letter in zip(COLOURS, "abcdefgh", strict=True):
            expected = re.sub(rf"\b{colour}\b", letter, expected)
        assert re.sub(r"\ban\b", "a", expected) == re.sub(r"\ban\b", "a", other.caption)
        background = one.label_map == BACKGROUND
        assert (one.image[~background] != other.image[~background]).any()
        far = cv2.erode(background.astype(np.uint8), np.ones((5, 5))).astype(bool)  # anti-aliased edges aside
        np.testing.assert_array_equal(one.image[far], other.image[far])


def test_labels_lie_where_the_colour_of_a_palette_is() -> None:
    palette = Palette(colours=(("light pink", (250, 120, 180)), ("cyan", (0, 220, 230)), ("olive", (90, 100, 10))))
    assert len(palette.names) == 24
    assert palette.names[8] == "cyan circle"
    for drawn in scenes(WorldConfig(size=96, seed=1), count=12, palette=palette):
        assert any(palette.names[i] in drawn.caption for i in drawn.present)
        for index in drawn.present:
            tint = np.array(palette.colours[index // len(SHAPES)][1])
            pixels = drawn.image[drawn.label_map == index].astype(int)
            assert np.abs(np.median(pixels, 0) - tint).max() < 45, palette.names[index]


def test_the_wording_of_a_palette_is_known() -> None:
    known = set(re.findall(r"\w+|[.,]", " ".join(every_wording(NEW))))
    for drawn in scenes(WorldConfig(seed=8, size=16), count=100, palette=NEW):
        assert set(re.findall(r"\w+|[.,]", drawn.caption)) <= known


def test_the_default_palette_is_the_world_as_it_was() -> None:
    assert PALETTE.names == OBJECT_NAMES
    assert dict(PALETTE.colours) == COLOURS
    np.testing.assert_array_equal(scene(WorldConfig(), 3, palette=PALETTE).image, scene(WorldConfig(), 3).image)


@pytest.mark.parametrize(
    ("colours", "text"),
    [
        ([], "1 to 31 colours"),
        ([(f"{a}{b}", (0, 0, 0)) for a in "abcdefgh" for b in "abcd"], "not 32"),
        ([("Pink", (0, 0, 0))], "'Pink' is no name of a colour"),
        ([("", (0, 0, 0))], "'' is no name"),
        ([("pink", (0, 0, 0)), ("pink", (9, 9, 9))], "pink is there twice"),
        ([("pink", (0, 0, 256))], r"pink is \(0, 0, 256\)"),
        ([("pink", (0, 0))], "needs red, green and blue"),
    ],
)
def test_impossible_palettes_are_refused(colours: list[tuple[str, tuple[int, ...]]], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Palette(colours=tuple(colours))  # type: ignore[arg-type]


def test_more_objects_than_names_are_refused() -> None:
    with pytest.raises(InputError, match="may hold 9 objects, but 1 colours make 8 names"):
        scene(WorldConfig(max_objects=9), 0, palette=Palette(colours=(("pink", (250, 120, 180)),)))
