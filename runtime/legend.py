"""The legend of an overlay: a panel of its own beside or below the picture, so that no picture can hide it."""

import functools
import itertools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .errors import InputError
from .palette import RGB

PANEL_RGB: RGB = (27, 29, 33)
_TEXT_RGB: RGB = (240, 240, 240)
_DIM_RGB: RGB = (150, 153, 158)
_NAME_WIDTH_EM = 16.0  # a longer name is wrapped
_MAX_LINES = 3
_WITHOUT_DECOMPOSITION = str.maketrans(
    {"ß": "ss", "ø": "o", "Ø": "O", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D"}
    | {"–": "-", "—": "-", "−": "-", "’": "'", "‘": "'", "“": '"', "”": '"', "×": "x", "\u00a0": " "}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LegendRow:
    """One line of the legend.

    Attributes:
        colour: of the swatch; None draws an empty one.
        name: the text.
        fraction: of the image, in [0, 1].
    """

    colour: RGB | None
    name: str
    fraction: float


def draw_legend(
    rows: Sequence[LegendRow],
    *,
    font_px: int,
    width: int | None = None,
    height: int | None = None,
    font: str | Path | None = None,
) -> NDArray[np.uint8]:
    """Draw a legend as wide as a picture that it goes below, or as high as one that it goes beside.

    Args:
        rows: what to list.
        font_px: size of the text.
        width: of the panel in pixels; its height follows. Give this or `height`.
        height: of the panel in pixels, at least: rows that do not fit in two columns make it higher.
        font: a TrueType or OpenType file for scripts that the built-in font lacks.

    Returns:
        (H, W, 3) uint8.

    Raises:
        InputError: the font cannot be read.
    """
    writer = _Writer(rows, font_px, load_font(font, font_px))
    margin = writer.margin
    if width is not None:
        columns = max(1, min(len(rows), (width - margin) // writer.cell_width))
        cell_width = (width - margin) // columns if rows else 0
    else:
        columns = 1 if sum(writer.cell_heights) + 2 * margin <= (height or 0) else min(2, len(rows))
        width, cell_width = columns * writer.cell_width + margin, writer.cell_width
    lines = [writer.cell_heights[start : start + columns] for start in range(0, len(rows), max(1, columns))]
    tops = [margin, *itertools.accumulate((max(line) for line in lines), initial=margin)][1:]
    panel = Image.new("RGB", (width, max(height or 0, tops[-1] + margin)), PANEL_RGB)
    draw = ImageDraw.Draw(panel)
    for number in range(len(rows)):
        writer.draw_cell(draw, number, margin + number % columns * cell_width, tops[number // columns])
    return np.array(panel, np.uint8)


class _Writer:
    """Texts of the rows, laid out in cells of one width."""

    def __init__(self, rows: Sequence[LegendRow], font_px: int, font: ImageFont.FreeTypeFont) -> None:
        self._rows, self._font, self._font_px = rows, font, font_px
        name_width = _NAME_WIDTH_EM * font_px
        self._names = [_wrapped(printable_text(row.name, font), font, name_width) for row in rows]
        self._shares = [percent_text(row.fraction) for row in rows]
        longest_name = max((font.getlength(line) for lines in self._names for line in lines), default=0)
        longest_share = max((font.getlength(share) for share in self._shares), default=0)
        self.margin = max(6, round(0.8 * font_px))
        self._swatch = round(1.1 * font_px)
        self._gap = round(0.6 * font_px)
        self._line_height = round(1.25 * font_px)
        self._text_width = math.ceil(longest_name + self._gap + longest_share)
        self.cell_width = self._swatch + self._gap + self._text_width + self.margin
        self.cell_heights = [self._line_height * len(lines) + round(0.35 * font_px) for lines in self._names]

    def draw_cell(self, draw: ImageDraw.ImageDraw, number: int, left: int, top: int) -> None:
        row = self._rows[number]
        ink = _TEXT_RGB if row.fraction > 0 else _DIM_RGB
        middle = top + self._line_height // 2
        outline = max(1, self._font_px // 12)
        box = (left, middle - self._swatch // 2, left + self._swatch, middle - self._swatch // 2 + self._swatch)
        draw.rectangle(box, fill=row.colour, outline=_DIM_RGB if row.colour is None else _TEXT_RGB, width=outline)
        text_left = left + self._swatch + self._gap
        for line, text in enumerate(self._names[number]):
            draw.text((text_left, middle + line * self._line_height), text, fill=ink, font=self._font, anchor="lm")
        draw.text((text_left + self._text_width, middle), self._shares[number], fill=ink, font=self._font, anchor="rm")


def percent_text(fraction: float) -> str:
    """A fraction as percent with one decimal; what is there but rounds to nothing is "<0.1 %"."""
    if fraction <= 0:
        return "0 %"
    return "<0.1 %" if fraction < 0.0005 else f"{100 * fraction:.1f} %"


def printable_text(text: str, font: ImageFont.FreeTypeFont) -> str:
    """Replace what a font cannot show: letters lose their accents, emoji get their names, the rest code points.

    "café" becomes "cafe", a dog's face ":dog face:", and 犬 "[U+72AC]".
    """
    shown: list[str] = []
    for character in unicodedata.normalize("NFC", " ".join(text.split())):
        if _has_glyph(font, character):
            shown.append(character)
        elif unicodedata.category(character)[0] not in "CM":  # joiners and variation selectors say nothing alone
            shown.append(_spelled(character, font))
    return "".join(shown).strip() or "(no visible characters)"


def _spelled(character: str, font: ImageFont.FreeTypeFont) -> str:
    plain = unicodedata.normalize("NFKD", character.translate(_WITHOUT_DECOMPOSITION))
    letters = [part for part in plain if not unicodedata.combining(part)]
    if all(_has_glyph(font, part) for part in letters):
        return "".join(letters)
    if unicodedata.category(character) == "So":
        return f":{unicodedata.name(character, 'symbol').lower()}:"
    return f"[U+{ord(character):04X}]"


def _has_glyph(font: ImageFont.FreeTypeFont, character: str) -> bool:
    if " " <= character <= "~":
        return True
    return not character.isspace() and _bitmap(font, character) != _bitmap(font, "\U0010ffff")


def _bitmap(font: ImageFont.FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


@functools.lru_cache(maxsize=16)
def load_font(path: str | Path | None, size_px: int) -> ImageFont.FreeTypeFont:
    """Open a font file, or Pillow's own font without one.

    Raises:
        InputError: the file cannot be read, or this Pillow has no FreeType.
    """
    if path is None:
        font = ImageFont.load_default(size_px)
        if not isinstance(font, ImageFont.FreeTypeFont):
            raise InputError("this Pillow was built without FreeType, so no text can be drawn: pip install pillow")
        return font
    try:
        return ImageFont.truetype(str(path), size_px)
    except OSError as error:
        raise InputError(f"the font {path} cannot be read ({error}); give a .ttf, .otf or .ttc file") from error


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Break a text into a few lines no wider than `width`; what is left over is cut off with dots."""
    lines: list[str] = []
    rest = text
    while rest and len(lines) < _MAX_LINES:
        count = _fitting_characters(rest, font, width)
        if count < len(rest):
            space = rest.rfind(" ", 1, count + 1)
            count = space if space > 0 else count
        lines.append(rest[:count].strip())
        rest = rest[count:].strip()
    if rest:
        last = f"{lines[-1]} {rest}"
        while last and font.getlength(last + "...") > width:
            last = last[: _fitting_characters(last, font, width - font.getlength("...")) or -1]
        lines[-1] = last.rstrip() + "..."
    return lines or [""]


def _fitting_characters(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """How many characters fit, at least 1; by bisection, since prompts may be very long."""
    low, high = 1, min(len(text), 1 + int(width))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
