"""A synthetic world of coloured shapes: scenes, captions in varied wording, and exact label maps.

Ground truth is exact here, so it is where the training stack, the exporter and the runtime are judged without any
download. A scene is a function of (seed, index) alone: a stream can start anywhere, and workers need no shared state.
Needs numpy and OpenCV only.
"""

import cmath
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from tclkit.runtime.errors import ConfigError, InputError

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (246, 222, 50),
    "green": (50, 160, 66),
    "blue": (40, 84, 214),
    "purple": (132, 50, 168),
    "white": (244, 244, 244),
    "black": (18, 18, 18),
}
"""Colour name to sRGB."""

SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")

_MAX_COLOURS: Final = 254 // len(SHAPES)  # 0 is the background in a label file, 255 what does not count
_COLOUR_NAME: Final = re.compile(r"[a-z]+( [a-z]+)*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Palette:
    """The colours of a world's objects; with the shapes they make the names.

    colours: (name, sRGB) of 1 to 31 colours, no name twice; a name is lower-case words.
    names: every colour with every shape; a label map's value i stands for names[i].
    """

    colours: tuple[tuple[str, tuple[int, int, int]], ...]
    names: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= len(self.colours) <= _MAX_COLOURS:
            raise ConfigError(
                f"a palette has 1 to {_MAX_COLOURS} colours, whose names fit one byte of a label map, "
                f"not {len(self.colours)}",
                key="colours",
            )
        for number, (name, rgb) in enumerate(self.colours):
            if not _COLOUR_NAME.fullmatch(name):
                raise ConfigError(f"{name!r} is no name of a colour: lower-case words, such as light blue", key=name)
            if name in (other for other, _ in self.colours[:number]):
                raise ConfigError(f"the colour {name} is there twice; give each one name", key=name)
            if len(rgb) != 3 or any(not 0 <= value <= 255 for value in rgb):
                raise ConfigError(f"the colour {name} is {rgb}; it needs red, green and blue in 0..255", key=name)
        names = tuple(f"{colour} {shape}" for colour, _ in self.colours for shape in SHAPES)
        object.__setattr__(self, "names", names)  # frozen: this is the one way to set a value that follows


PALETTE: Final = Palette(colours=tuple(COLOURS.items()))
"""The eight colours that every world has unless it is given others."""

OBJECT_NAMES: Final = PALETTE.names
"""The 64 names of the default palette; a label map's value i stands for OBJECT_NAMES[i]."""

BACKGROUND: Final = -1
"""Label of every pixel that no object covers."""

EVALUATION_SEED: Final = 1_000_003
"""Seed of the world on which models are judged; training may not draw from it."""

TEMPLATES: Final = ("a {}.", "a picture of a {}.", "there is a {}.")
"""Prompt templates in the wording of the captions."""

_FRAMES: Final = (
    "{}",
    "{}.",
    "a picture of {}.",
    "a drawing of {}.",
    "there is {}.",
    "an image with {}.",
    "we see {}.",
)
_JOINS: Final = (" and ", " next to ", " with ", " beside ")
_SUB_PIXEL_BITS: Final = 4
_SMALLEST_RADIUS_PX: Final = 0.5  # tried: from 0.3 on every shape covers a pixel, wherever it lies inside the picture


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig:
    """What scenes look like.

    size: pixels of a side; scenes are square.
    seed: two worlds of different seeds share no scene.
    min_objects, max_objects: objects in a scene; each number is equally likely.
    min_radius, max_radius: of an object, as a fraction of the side; half a pixel is the least.
    max_overlap: an object may hide at most this fraction of another.
    partial_caption: probability that a caption leaves out at least one object (of scenes with several).
    sibling: probability that an object shares its colour or its shape with one already in the scene.
    """

    size: int = 64
    seed: int = 0
    min_objects: int = 1
    max_objects: int = 3
    min_radius: float = 0.14
    max_radius: float = 0.3
    max_overlap: float = 0.3
    partial_caption: float = 0.4
    sibling: float = 0.35

    def __post_init__(self) -> None:
        if self.size < 16:
            raise ConfigError(f"world size is {self.size} pixels; shapes need at least 16")
        if not 1 <= self.min_objects <= self.max_objects <= len(OBJECT_NAMES):
            raise ConfigError(f"objects in a scene: 1 <= {self.min_objects} <= {self.max_objects} <= 64 does not hold")
        if not 0 < self.min_radius <= self.max_radius <= 0.5:
            raise ConfigError(f"radii must satisfy 0 < {self.min_radius} <= {self.max_radius} <= 0.5")
        if self.min_radius * self.size < _SMALLEST_RADIUS_PX:
            raise ConfigError(
                f"objects of radius {self.min_radius} are {self.min_radius * self.size:g} pixels of {self.size} and "
                f"may not show; min_radius must be {_SMALLEST_RADIUS_PX / self.size:g} or more",
                key="min_radius",
            )
        for name in ("max_overlap", "partial_caption", "sibling"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, a fraction in [0, 1] is needed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One picture with everything that is known about it.

    image: (S, S, 3) uint8 RGB.
    label_map: (S, S) int16, index into the palette's names (OBJECT_NAMES) or BACKGROUND.
    caption: names one, some or all of the objects.
    present: indices into the palette's names of objects with visible pixels, ascending.
    """

    image: npt.NDArray[np.uint8]
    label_map: npt.NDArray[np.int16]
    caption: str
    present: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Placed:
    name_index: int
    x: float
    y: float
    radius: float
    angle: float


def _arc(centre: complex, radius: float, start: float, stop: float, steps: int) -> list[complex]:
    return [centre + radius * complex(math.cos(a), math.sin(a)) for a in np.linspace(start, stop, steps)]


def _outlines() -> dict[str, list[npt.NDArray[np.float64]]]:
    """Outlines of the shapes, (K, 2) x and y in units of the radius, y down; a second outline is a hole."""
    turn = 2 * math.pi
    heart = [
        complex(
            16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        )
        / 17
        for t in np.linspace(0, turn, 40, endpoint=False)
    ]
    star = [
        (1.08 if k % 2 == 0 else 0.45) * complex(math.sin(k * turn / 10), -math.cos(k * turn / 10)) for k in range(10)
    ]
    bar = 0.34
    cross = [complex(x, y) for x, y in [
        (-bar, -1), (bar, -1), (bar, -bar), (1, -bar), (1, bar), (bar, bar),
        (bar, 1), (-bar, 1), (-bar, bar), (-1, bar), (-1, -bar), (-bar, -bar),
    ]]  # fmt: skip
    bite_x, bite_radius = 0.5, 0.8
    tip = complex((1 - bite_radius**2 + bite_x**2) / (2 * bite_x), 0)
    tip += 1j * math.sqrt(1 - tip.real**2)
    outer, inner = cmath.phase(tip), cmath.phase(tip - bite_x)
    moon = _arc(0.2, 1.0, outer, turn - outer, 36) + _arc(0.2 + bite_x, bite_radius, turn - inner, inner, 24)
    shapes: dict[str, list[list[complex]]] = {
        "circle": [_arc(0j, 0.95, 0, turn * 39 / 40, 40)],
        "square": [[complex(x, y) * 0.84 for x, y in [(-1, -1), (1, -1), (1, 1), (-1, 1)]]],
        "triangle": [[complex(0, -1.0), complex(0.98, 0.75), complex(-0.98, 0.75)]],
        "star": [star],
        "heart": [heart],
        "cross": [cross],
        "ring": [_arc(0j, 1.0, 0, turn * 39 / 40, 40), _arc(0j, 0.52, 0, turn * 39 / 40, 40)],
        "moon": [moon],
    }
    return {name: [np.array([(z.real, z.imag) for z in line]) for line in lines] for name, lines in shapes.items()}


_OUTLINES: Final = _outlines()


def _coverage(placed: _Placed, size: int) -> tuple[slice, slice, npt.NDArray[np.uint8]]:
    """Rows and columns that one object may touch, and its anti-aliased cover there: uint8, 255 inside."""
    cos, sin = math.cos(placed.angle), math.sin(placed.angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    scale = placed.radius * size
    offset = np.array([placed.x, placed.y]) * size - 0.5
    outlines = _OUTLINES[SHAPES[placed.name_index % len(SHAPES)]]
    points = [np.rint((o @ turn * scale + offset) * (1 << _SUB_PIXEL_BITS)).astype(np.int32) for o in outlines]
    cover = np.zeros((size, size), np.uint8)
    cv2.fillPoly(
        cover, points, 255, lineType=cv2.LINE_AA, shift=_SUB_PIXEL_BITS
    )  # even-odd: the ring's hole stays open
    x, y, width, height = cv2.boundingRect(cover)
    rows, columns = slice(y, y + height), slice(x, x + width)
    return rows, columns, cover[rows, columns]


def _background(rng: np.random.Generator, size: int) -> npt.NDArray[np.float32]:
    """Smooth, muted texture, (S, S, 3) float32 in 0..255: no colour of an object is likely in it."""
    grey = rng.uniform(80, 180)
    cells = int(rng.integers(2, 7))
    coarse = rng.normal(0, 12, (cells, cells, 3)) * 0.45 + rng.normal(0, 18, (cells, cells, 1)) + grey
    smooth = np.asarray(cv2.resize(coarse.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC), np.float32)
    if rng.random() < 0.3:
        angle, period = rng.uniform(0, math.pi), rng.uniform(0.06, 0.25)
        along = np.arange(size, dtype=np.float32) / size * np.float32(2 * math.pi / period)
        wave = np.sin(along[None, :] * np.float32(math.cos(angle)) + along[:, None] * np.float32(math.sin(angle)))
        smooth += wave[..., None] * np.float32(rng.uniform(4, 12))
    return smooth


def _pick_name(rng: np.random.Generator, names: int, taken: list[int], sibling: float) -> int:
    """An object not yet in the scene; siblings of one that is make colour and shape both matter."""
    while True:
        name = int(rng.integers(names))
        if taken and rng.random() < sibling:
            other = taken[int(rng.integers(len(taken)))]
            shapes = len(SHAPES)
            colour, shape = divmod(name, shapes)
            name = other // shapes * shapes + shape if rng.random() < 0.5 else colour * shapes + other % shapes
        if name not in taken:
            return name


def _colour(name_index: int) -> int:
    """Number of a name's colour in the palette."""
    return name_index // len(SHAPES)


def _overlap(one: _Placed, other: _Placed) -> float:
    """Fraction of the smaller object's circle that the two circles share, approximately."""
    distance = math.hypot(one.x - other.x, one.y - other.y)
    small, large = sorted((one.radius, other.radius))
    return min(1.0, max(0.0, (small + large - distance) / (2 * small)))


def _allowed_overlap(one: _Placed, other: _Placed, config: WorldConfig) -> float:
    """Objects of one colour do not touch: nothing could tell where one ends."""
    return 0.0 if _colour(one.name_index) == _colour(other.name_index) else config.max_overlap


def _place(rng: np.random.Generator, config: WorldConfig, names: int) -> list[_Placed]:
    """Objects of one scene, back to front; one that finds no room after a few tries is left out."""
    count = int(rng.integers(config.min_objects, config.max_objects + 1))
    placed: list[_Placed] = []
    for _ in range(count):
        name = _pick_name(rng, names, [p.name_index for p in placed], config.sibling)
        for _ in range(12):
            radius = rng.uniform(config.min_radius, config.max_radius)
            x, y = rng.uniform(radius * 0.9, 1 - radius * 0.9, 2)
            candidate = _Placed(name, float(x), float(y), float(radius), float(rng.uniform(-0.35, 0.35)))
            if all(_overlap(candidate, p) <= _allowed_overlap(candidate, p, config) for p in placed):
                placed.append(candidate)
                break
    return placed


def _with_article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def _caption(rng: np.random.Generator, names: list[str], partial: float) -> str:
    rng.shuffle(names)
    if len(names) > 1 and rng.random() < partial:
        names = names[: int(rng.integers(1, len(names)))]
    if rng.random() < 0.8:
        names = [_with_article(name) for name in names]
    join = _JOINS[int(rng.integers(len(_JOINS)))]
    phrase = join.join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    return _FRAMES[int(rng.integers(len(_FRAMES)))].format(phrase)


def scene(config: WorldConfig, index: int, *, palette: Palette = PALETTE) -> Scene:
    """Draw scene number `index` of a world; the same arguments always give the same bytes.

    A palette of as many colours changes these alone: places, shapes and wording stay.

    Raises:
        InputError: index is negative, or a scene may hold more objects than the palette has names.
    """
    if index < 0:
        raise InputError(f"scene index is {index}; scenes are counted from 0")
    if config.max_objects > len(palette.names):
        raise InputError(
            f"a scene may hold {config.max_objects} objects, but {len(palette.colours)} colours make "
            f"{len(palette.names)} names; lower max_objects, or add colours"
        )
    rng = np.random.default_rng((config.seed, index))
    canvas = _background(rng, config.size)
    label_map = np.full((config.size, config.size), BACKGROUND, np.int16)
    for placed in _place(rng, config, len(palette.names)):
        rows, columns, cover = _coverage(placed, config.size)
        _, rgb = palette.colours[_colour(placed.name_index)]
        tint = np.array(rgb, np.float32)
        tint = tint + rng.normal(0, 8, 3).astype(np.float32)
        alpha = cover[..., None].astype(np.float32) / 255
        canvas[rows, columns] += (tint - canvas[rows, columns]) * alpha
        label_map[rows, columns][cover > 127] = placed.name_index
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(2, 8))
    present = [int(i) for i in np.unique(label_map) if i != BACKGROUND]
    return Scene(
        image=np.clip(canvas, 0, 255).astype(np.uint8),
        label_map=label_map,
        caption=_caption(rng, [palette.names[i] for i in present], config.partial_caption),
        present=tuple(present),
    )


def scenes(
    config: WorldConfig, *, start: int = 0, count: int | None = None, palette: Palette = PALETTE
) -> Iterator[Scene]:
    """Stream scenes start, start + 1, ... of a world; without `count` the stream does not end."""
    index = start
    while count is None or index < start + count:
        yield scene(config, index, palette=palette)
        index += 1


def every_wording(palette: Palette = PALETTE) -> list[str]:
    """Texts that together hold every word a caption or template can use: what a tokenizer must know."""
    objects = [_with_article(name) for name in palette.names]
    wordings = [frame.format(name) for frame in _FRAMES for name in objects[:1]]
    wordings += [template.format(name) for template in TEMPLATES for name in palette.names[:1]]
    wordings += [join.join(objects[:2]) for join in _JOINS]
    return [*objects, *palette.names, *wordings, "one, two"]
