from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from tclkit.runtime.errors import InputError
from tclkit.runtime.legend import PANEL_RGB, LegendRow, _wrapped, draw_legend, percent_text, printable_text

RED = (200, 30, 30)


@pytest.fixture(scope="module")
def font() -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(16)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@pytest.mark.parametrize(
    ("fraction", "text"), [(0, "0 %"), (1e-6, "<0.1 %"), (0.001, "0.1 %"), (0.12345, "12.3 %"), (1, "100.0 %")]
)
def test_percent(fraction: float, text: str) -> None:
    assert percent_text(fraction) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red circle (50%)", "a red circle (50%)"),
        ("café crème, Ærøskøbing", "cafe creme, AEroskobing"),
        ("a dog 🐶", "a dog :dog face:"),
        ("👩‍🚀️", ":woman::rocket:"),
        ("犬", "[U+72AC]"),
        ("“straße” – 3×4", '"strasse" - 3x4'),
        (" two\n lines\t", "two lines"),
        ("e\u0301", "e"),
        ("\u200b", "(no visible characters)"),
        ("\x00", "(no visible characters)"),
    ],
)
def test_what_the_font_lacks_is_spelled_out(text: str, shown: str, font: ImageFont.FreeTypeFont) -> None:
    assert printable_text(text, font).replace("“", '"').replace("”", '"') == shown


def test_long_names_are_wrapped_and_cut(font: ImageFont.FreeTypeFont) -> None:
    for text in ("word " * 400, "x" * 3000, "WWWWWWWW" * 40):
        lines = _wrapped(text.strip(), font, 200)
        assert len(lines) == 3
        assert lines[-1].endswith("...")
        assert all(font.getlength(line) <= 200 for line in lines)
    assert _wrapped("short", font, 200) == ["short"]
    assert _wrapped("a quick brown fox jumps over the dog", font, 150) == ["a quick brown fox", "jumps over the dog"]


def test_below_a_picture_it_is_as_wide_and_beside_as_high() -> None:
    rows = [LegendRow(colour=RED, name=f"prompt {i}", fraction=0.1) for i in range(5)]
    below = draw_legend(rows, font_px=16, width=600)
    assert below.shape[1] == 600
    beside = draw_legend(rows, font_px=16, height=500)
    assert beside.shape[0] == 500
    for panel in (below, beside):
        assert panel.dtype == np.uint8
        assert (panel[0] == PANEL_RGB).all()
        assert (panel == RED).all(axis=2).sum() >= 5 * 14 * 14  # the swatches
        assert (panel == (240, 240, 240)).all(axis=2).any()  # the text


def test_rows_that_do_not_fit_beside_make_it_higher() -> None:
    rows = [LegendRow(colour=RED, name=f"prompt {i}", fraction=0.1) for i in range(40)]
    panel = draw_legend(rows, font_px=16, height=100)
    assert panel.shape[0] > 400
    assert (panel == RED).all(axis=2).sum() >= 40 * 14 * 14


def test_narrow_and_empty_panels() -> None:
    assert draw_legend([], font_px=14, width=50).shape[1] == 50
    assert draw_legend([], font_px=14, height=50).shape[0] == 50
    rows = [LegendRow(colour=None, name="a long name on a narrow panel", fraction=0)] * 2
    assert draw_legend(rows, font_px=14, width=40).shape[1] == 40


def test_font_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "font.ttf"
    path.write_text("no font")
    with pytest.raises(InputError, match=r"font\.ttf cannot be read .* give a \.ttf, \.otf or \.ttc file"):
        draw_legend([], font_px=14, width=50, font=path)
