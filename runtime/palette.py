"""Colours that stay apart, for as many prompts as there are."""

import colorsys

RGB = tuple[int, int, int]

# The first seven are Okabe and Ito's colour-blind safe set ("Color Universal Design", 2008) without black. The others
# were added one by one, each as far as could be (CIELAB) from all before it in normal, protanopic and deuteranopic
# sight as simulated by Machado et al. (2009): no pair is nearer than 17 in any of the three, as among the first seven.
_CHOSEN: tuple[RGB, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (0, 0, 255),
    (238, 238, 187),
    (119, 102, 255),
    (153, 0, 34),
    (119, 255, 255),
    (153, 0, 102),
    (170, 238, 119),
    (0, 68, 170),
    (255, 34, 102),
    (102, 153, 255),
    (85, 17, 204),
    (238, 170, 170),
    (187, 0, 0),
)
_GOLDEN_RATIO = 0.6180339887498949


def label_colours(count: int) -> list[RGB]:
    """`count` RGB colours: twenty that colour-blind people can tell apart, then generated hues; always the same."""
    return [*_CHOSEN[:count], *(_generated(index) for index in range(count - len(_CHOSEN)))]


def _generated(index: int) -> RGB:
    hue = (0.05 + index * _GOLDEN_RATIO) % 1
    saturation, value = ((0.9, 0.95), (0.55, 0.8), (1.0, 0.6), (0.35, 1.0))[index % 4]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)
