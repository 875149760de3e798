"""A benchmark as one picture: where each contender's time goes, and how time grows with prompts, size and batch."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from tclkit.runtime.errors import InputError
from tclkit.runtime.legend import load_font, printable_text

from .bench_results import GRAPHS, STAGES, BenchResult, BenchRow
from .bench_tables import three_figures

_WIDTH = 1200
_SCALE = 2  # drawn twice as large and reduced: Pillow's lines have no soft edges
_MARGIN, _LINE = 28, 22
_BAR, _BAR_GAP = 30, 12
_PANEL_HEIGHT = 330
_PAPER, _INK, _SOFT, _GRID = (255, 255, 255), (30, 30, 30), (95, 95, 95), (222, 222, 222)
# Okabe and Ito (2008): told apart by the colour-blind, and by their lightness in grey.
_STAGE_COLOURS = {
    "decode": (153, 153, 153),
    "preprocess": (86, 180, 233),
    "image graph": (0, 114, 178),
    "mask graph": (230, 159, 0),
    "post-process": (0, 158, 115),
    "draw": (204, 121, 167),
}
_LINE_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (0, 0, 0))
_BY_ARITHMETIC = "growing as the arithmetic of both graphs does"
_Colour = tuple[int, int, int]
_Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sweep:
    """One panel: a quantity by one property of the work.

    title, axis: what is drawn, and by what.
    ticks: the property's values, ascending, as text.
    lines: by contender, (tick number, ms, what the arithmetic would make of the base's ms) of each of its rows.
    """

    title: str
    axis: str
    ticks: tuple[str, ...]
    lines: dict[str, tuple[tuple[int, float, float | None], ...]]


def draw_chart(result: BenchResult) -> npt.NDArray[np.uint8]:
    """Draw a benchmark.

    Returns:
        (H, 1200, 3) uint8 RGB.

    Raises:
        InputError: no contender ran.
    """
    if not result.rows:
        raise InputError("no contender ran, so there is nothing to draw")
    sweeps = _sweeps(result)
    bars_height = 3 * _LINE + 18 + len(result.contenders) * (_BAR + _BAR_GAP)
    styles = _line_styles(result)
    keys = _flowed([*styles, _BY_ARITHMETIC], 34 + 22) if sweeps else []
    panels_height = _LINE + len(keys) * _LINE + _PANEL_HEIGHT if sweeps else 0
    height = _MARGIN + 2 * _LINE + bars_height + panels_height + 2 * _LINE
    canvas = _Canvas(_WIDTH, height)
    top = _write_heading(canvas, result)
    top = _draw_bars(canvas, result, top)
    if sweeps:
        _write_line_legend(canvas, keys, styles, top + _LINE)
        _draw_sweeps(canvas, sweeps, styles, top + (1 + len(keys)) * _LINE + 8)
    canvas.text((_MARGIN, height - _LINE - 4), _footer(result), size=13, colour=_SOFT)
    return canvas.picture()


class _Canvas:
    """Drawing in the finished picture's pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self._image = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def text(self, at: _Point, text: str, *, size: int = 14, colour: _Colour = _INK, anchor: str = "la") -> None:
        font = load_font(None, size * _SCALE)
        self._draw.text(_scaled(at), printable_text(text, font), fill=colour, font=font, anchor=anchor)

    def box(self, corner: _Point, opposite: _Point, colour: _Colour) -> None:
        (left, top), (right, bottom) = _scaled(corner), _scaled(opposite)
        if right - left >= 1:
            self._draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)

    def line(self, points: Sequence[_Point], colour: _Colour, width: float = 1) -> None:
        scaled = [_scaled(point) for point in points]
        self._draw.line(scaled, fill=colour, width=max(1, round(width * _SCALE)), joint="curve")

    def dots(self, start: _Point, end: _Point, colour: _Colour) -> None:
        """A dotted line."""
        length = math.dist(start, end)
        for number in range(math.floor(length / 6) + 1):
            share = number * 6 / length if length else 0.0
            x, y = (a + (b - a) * share for a, b in zip(start, end, strict=True))
            self._draw.ellipse(_around((x, y), 1.0), fill=colour)

    def mark(self, at: _Point, shape: int, colour: _Colour) -> None:
        """A marker: circle, square, triangle or diamond, so that lines differ by more than their colour."""
        left, top, right, bottom = _around(at, 5.0)
        x, y = _scaled(at)
        if shape % 4 == 0:
            self._draw.ellipse((left, top, right, bottom), fill=colour, outline=_PAPER, width=_SCALE)
        elif shape % 4 == 1:
            self._draw.rectangle((left, top, right, bottom), fill=colour, outline=_PAPER, width=_SCALE)
        else:
            corners = [(x, top - 2), (right + 2, bottom), (left - 2, bottom)]
            if shape % 4 == 3:
                corners = [(x, top - 4), (right + 4, y), (x, bottom + 4), (left - 4, y)]
            self._draw.polygon(corners, fill=colour, outline=_PAPER, width=_SCALE)

    def picture(self) -> npt.NDArray[np.uint8]:
        small = self._image.resize((self.width, self._image.height // _SCALE), Image.Resampling.LANCZOS)
        return np.asarray(small)


def _scaled(point: _Point) -> _Point:
    return point[0] * _SCALE, point[1] * _SCALE


def _around(at: _Point, radius: float) -> tuple[float, float, float, float]:
    (x, y), r = _scaled(at), radius * _SCALE
    return x - r, y - r, x + r, y + r


def _write_heading(canvas: _Canvas, result: BenchResult) -> int:
    base = result.base_rows[0]
    count = f"{base.prompts} prompt{'' if base.prompts == 1 else 's'}"
    canvas.text((_MARGIN, _MARGIN), f"How fast is {result.model} here?", size=22)
    what = "from the file's bytes to the overlay" if base.batch == 1 else f"both graphs, {base.batch} images at once"
    work = f"One pass at {base.height}x{base.width} with {count}, {what}; median of {len(base.total.samples_ms)} runs"
    canvas.text((_MARGIN, _MARGIN + 32), work, colour=_SOFT)
    return _MARGIN + 32 + _LINE + 10


def _draw_bars(canvas: _Canvas, result: BenchResult, top: int) -> int:
    rows = {row.contender: row for row in result.base_rows}
    shown = [stage for stage in STAGES if any(stage in row.stages for row in rows.values())]
    _write_stage_legend(canvas, shown, top)
    top += _LINE + 12
    left = _MARGIN + max(_text_width(contender.name, 14) for contender in result.contenders) + 14
    right = canvas.width - _MARGIN - 150  # room for the figures behind the longest bar
    step, last = _linear_ticks(max(_stacked_ms(row) for row in rows.values()))
    bottom = top + len(result.contenders) * (_BAR + _BAR_GAP)
    for number in range(round(last / step) + 1):
        x = left + (right - left) * number * step / last
        canvas.line([(x, top), (x, bottom)], _GRID)
        canvas.text((x, bottom + 6), f"{number * step:g}", size=13, colour=_SOFT, anchor="ma")
    canvas.text(((left + right) / 2, bottom + 6 + 18), "milliseconds", size=13, colour=_SOFT, anchor="ma")
    for number, contender in enumerate(result.contenders):
        y = top + number * (_BAR + _BAR_GAP) + _BAR_GAP // 2
        middle = y + _BAR / 2
        canvas.text((left - 14, middle), contender.name, anchor="rm")
        if contender.name not in rows:
            reason = _shortened(f"did not run: {_public(contender.problem)}", canvas.width - _MARGIN - left - 8, 13)
            canvas.box((left + 4, y), (left + 12 + _text_width(reason, 13), y + _BAR), _PAPER)  # over the grid's lines
            canvas.text((left + 8, middle), reason, size=13, colour=_SOFT, anchor="lm")
            continue
        row, x = rows[contender.name], float(left)
        for stage in shown:
            width = (right - left) * row.stages[stage].median_ms / last
            canvas.box((x, y), (x + width, y + _BAR), _STAGE_COLOURS[stage])
            x += width
        figures = f"{three_figures(row.total.median_ms)} ms,  {three_figures(row.images_per_second)} img/s"
        canvas.text((x + 8, middle), figures, anchor="lm")
    return bottom + 6 + 2 * _LINE


def _public(problem: str) -> str:
    """What a problem is, for a picture that is shown to others: without its remedy, of paths the last part only."""
    words = problem.partition(". ")[0].split()
    return " ".join(word.rpartition("/")[2] if "/" in word else word for word in words)


def _stacked_ms(row: BenchRow) -> float:
    return sum(spread.median_ms for spread in row.stages.values())


def _write_stage_legend(canvas: _Canvas, stages: Sequence[str], top: int) -> None:
    x = float(_MARGIN)
    for stage in stages:
        canvas.box((x, top + 2), (x + 14, top + 16), _STAGE_COLOURS[stage])
        canvas.text((x + 20, top + 9), stage, size=13, anchor="lm")
        x += 20 + _text_width(stage, 13) + 22


def _line_styles(result: BenchResult) -> dict[str, tuple[int, _Colour]]:
    """Marker and colour of each contender that ran."""
    names = [contender.name for contender in result.contenders if not contender.problem]
    return {name: (number, _LINE_COLOURS[number % len(_LINE_COLOURS)]) for number, name in enumerate(names)}


def _flowed(names: Sequence[str], room: int) -> list[list[tuple[str, float]]]:
    """(name, x) of every name of a legend, row by row; `room` is for the sign before and the space behind it."""
    rows: list[list[tuple[str, float]]] = [[]]
    x = float(_MARGIN)
    for name in names:
        needed = room + _text_width(name, 13)
        if rows[-1] and x + needed > _WIDTH - _MARGIN:
            rows.append([])
            x = float(_MARGIN)
        rows[-1].append((name, x))
        x += needed
    return rows


def _write_line_legend(
    canvas: _Canvas, rows: Sequence[Sequence[tuple[str, float]]], styles: dict[str, tuple[int, _Colour]], top: int
) -> None:
    for number, row in enumerate(rows):
        y = top + number * _LINE + 9
        for name, x in row:
            if name in styles:
                shape, colour = styles[name]
                canvas.line([(x, y), (x + 26, y)], colour, 2)
                canvas.mark((x + 13, y), shape, colour)
            else:
                canvas.dots((x, y), (x + 26, y), _INK)
            canvas.text((x + 34, y), name, size=13, anchor="lm")


def _draw_sweeps(canvas: _Canvas, sweeps: Sequence[_Sweep], styles: dict[str, tuple[int, _Colour]], top: int) -> None:
    gap = 26
    width = (canvas.width - 2 * _MARGIN - gap * (len(sweeps) - 1)) / len(sweeps)
    for number, sweep in enumerate(sweeps):
        _draw_sweep(canvas, sweep, styles, (_MARGIN + number * (width + gap), top), width)


def _draw_sweep(
    canvas: _Canvas, sweep: _Sweep, styles: dict[str, tuple[int, _Colour]], corner: _Point, width: float
) -> None:
    left, top = corner[0] + 52, corner[1] + _LINE + 4
    right, bottom = corner[0] + width - 8, corner[1] + _PANEL_HEIGHT - 2 * _LINE - 8
    canvas.text(corner, sweep.title, size=14)
    values = [value for line in sweep.lines.values() for point in line for value in point[1:] if value is not None]
    ticks = _log_ticks(min(values), max(values))
    low, high = math.log(ticks[0]), math.log(ticks[-1])
    inner = (right - left) / len(sweep.ticks)

    def place(tick: int, value: float) -> _Point:
        return left + inner * (tick + 0.5), bottom - (bottom - top) * (math.log(value) - low) / (high - low)

    for tick in ticks:
        y = place(0, tick)[1]
        canvas.line([(left, y), (right, y)], _GRID)
        canvas.text((left - 8, y), f"{tick:g}", size=13, colour=_SOFT, anchor="rm")
    for number, label in enumerate(sweep.ticks):
        canvas.text((place(number, ticks[0])[0], bottom + 6), label, size=13, colour=_SOFT, anchor="ma")
    canvas.text(((left + right) / 2, bottom + 24), sweep.axis, size=13, colour=_SOFT, anchor="ma")
    for name, line in sweep.lines.items():
        shape, colour = styles[name]
        expected = [place(tick, by_arithmetic) for tick, _, by_arithmetic in line if by_arithmetic is not None]
        for start, end in itertools.pairwise(expected):
            canvas.dots(start, end, colour)
        points = [place(tick, value) for tick, value, _ in line]
        canvas.line(points, colour, 2)
        for point in points:
            canvas.mark(point, shape, colour)


def _sweeps(result: BenchResult) -> list[_Sweep]:
    """Panels of the properties that were varied."""
    found = [
        _sweep(
            result, "ms by prompts (logarithmic)", "prompts", lambda row: (row.prompts,), ("height", "width", "batch")
        ),
        _sweep(
            result,
            "ms by image size (logarithmic)",
            "pixels",
            lambda row: (row.height, row.width),
            ("batch", "prompts"),
        ),
        _sweep(
            result,
            "ms an image by batch, graphs alone (logarithmic)",
            "images at once",
            lambda row: (row.batch,),
            _BUT_BATCH,
        ),
    ]
    return [sweep for sweep in found if len(sweep.ticks) > 1]


_BUT_BATCH = ("height", "width", "prompts")


def _sweep(
    result: BenchResult,
    title: str,
    axis: str,
    key: Callable[[BenchRow], tuple[int, ...]],
    same: Sequence[str],
) -> _Sweep:
    """The rows that differ from their contender's base in nothing but the key."""
    kept: dict[str, list[BenchRow]] = {}
    bases = {row.contender: row for row in result.base_rows}
    for row in result.rows:
        if all(getattr(row, name) == getattr(bases[row.contender], name) for name in same):
            kept.setdefault(row.contender, []).append(row)
    keys = sorted({key(row) for rows in kept.values() for row in rows})
    by_batch = same is _BUT_BATCH
    lines = {}
    for name, rows in kept.items():
        base = bases[name]
        lines[name] = tuple(
            (keys.index(key(row)), _drawn_ms(row, by_batch), _expected_ms(row, base, by_batch))
            for row in sorted(rows, key=key)
        )
    return _Sweep(title=title, axis=axis, ticks=tuple("x".join(map(str, one)) for one in keys), lines=lines)


def _drawn_ms(row: BenchRow, by_batch: bool) -> float:
    if by_batch:
        return sum(row.stages[stage].median_ms for stage in GRAPHS) / row.batch
    return row.total.median_ms


def _expected_ms(row: BenchRow, base: BenchRow, by_batch: bool) -> float | None:
    """The base's time, grown as the arithmetic of both graphs grew."""
    if row.gflop is None or base.gflop is None:
        return None
    images = row.batch / base.batch if by_batch else 1
    return _drawn_ms(base, by_batch) * row.gflop / base.gflop / images


def _footer(result: BenchResult) -> str:
    machine = result.machine
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items() if name in _NAMED)
    quiet = "; NOT QUIET while measured" if machine.warnings() else ""
    line = f"{machine.processor}, {machine.usable_cpus} CPUs; {packages}; {result.picture}{quiet}"
    return _shortened(line, _WIDTH - 2 * _MARGIN, 13)


_NAMED = ("tclkit", "onnxruntime", "openvino", "tensorrt", "torch")


def _linear_ticks(highest: float) -> tuple[float, float]:
    """(step, last tick) of an axis from 0 with four to ten steps."""
    rough = highest / 6
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= rough)
    return step, step * math.ceil(highest / step - 1e-9)


def _log_ticks(lowest: float, highest: float) -> list[float]:
    """1, 2, 5, 10 and so on, from at most the lowest value to at least the highest; two or more."""
    first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    start = max(index for index, tick in enumerate(ticks) if tick <= lowest)
    stop = next(index for index, tick in enumerate(ticks) if tick >= highest and index > start)
    return ticks[start : stop + 1]


def _shortened(text: str, width: float, size: int) -> str:
    if _text_width(text, size) <= width:
        return text
    while text and _text_width(text + "...", size) > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _text_width(text: str, size: int) -> float:
    return load_font(None, size).getlength(text)
