"""The decoder's upsampling block in several forms that compute the same with fewer and fewer products.

A block doubles the grid by repetition, then adds two branches, each norm -> GELU -> 3x3 convolution. Norm and GELU work
at every pixel for itself, so the first branch's run before the repetition, on a quarter of the pixels. What is left of
its convolution is one of a repeated map, which needs few products; the second is a convolution like any other, which
the minimal filtering of Winograd makes cheaper. Products of C x C matrices for each pixel before the repetition:

| form | first convolution | second | together |
|---|---|---|---|
| direct | 36 | 36 | 72 |
| phases | 16: four 2x2 convolutions, one for each place of a pixel in its repetition | 36 | 52 |
| differences | 6.25: of differences of neighbours, in tiles of 4x4 | 36 | 42.25 |
| winograd2 | 6.25 | 16: F(2x2, 3x3) | 22.25 |
| winograd4 | 6.25 | 9: F(4x4, 3x3) | 15.25 |

All are exact in real numbers. In floating point winograd4 rounds coarser: its transforms have coefficients up to 8; all
others add and subtract only. Weights are folded in float64.

Shapes: B batch, C width, h w grid, H W grid twice as fine, T tiles.
Source: winograd2 and winograd4 are Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016), here
written as slices, sums and products of matrices. For the repeated map the same scheme loses products that are 0 and
ones that occur twice: on one axis the taps w0 w1 w2 over the repeated x give, around an even i, with S = w0 + w1 + w2,

    y[2i-1] = S x[i] - (w0 + w1) (x[i] - x[i-1])        y[2i+1] = S x[i] + w2 (x[i+1] - x[i])
    y[2i]   = S x[i] - w0 (x[i] - x[i-1])               y[2i+2] = S x[i] + (w1 + w2) (x[i+1] - x[i])

so 5 products for 4 outputs, and 25 for 16 on two axes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from tclkit.runtime.errors import ConfigError

DecoderForm = Literal["direct", "phases", "differences", "winograd2", "winograd4"]
DECODER_FORMS: tuple[DecoderForm, ...] = get_args(DecoderForm)
DEFAULT_DECODER: DecoderForm = "direct"  # GPUs have kernels for it; processors gain by winograd4

Rows = tuple[tuple[float, ...], ...]
"""A matrix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileScheme:
    """A convolution with three taps as sums, products and sums, on one axis; on two it is applied twice.

    sums: matrices from a window of inputs to what is multiplied, the first applied first; their product is B.
    reads: for each product, which of those values it multiplies.
    taps: (products, 3), from the three taps to the factors: G.
    outputs: matrices from the products to a tile of outputs, the first applied first; their product is A.
    steady: the product that every output of the tile holds once, where a bias belongs.
    stride: inputs from one tile to the next. lead: outputs of the first tile that lie before the map.
    repeats: for each output the place in the window that repetition would have put there; empty without repetition.
    """

    sums: tuple[Rows, ...]
    reads: tuple[int, ...]
    taps: Rows
    outputs: tuple[Rows, ...]
    steady: int
    stride: int
    lead: int = 0
    repeats: tuple[int, ...] = ()

    @property
    def window(self) -> int:
        """Inputs that a tile reads, the first of them one before the tile's place."""
        return len(self.sums[0][0])

    @property
    def size(self) -> int:
        """Outputs of a tile."""
        return len(self.outputs[-1])

    def count_tiles(self, length: int) -> int:
        """Tiles that cover an axis of so many inputs."""
        return -(-(length * self.size // self.stride + self.lead) // self.size)


DIFFERENCES = TileScheme(
    sums=(((-1, 1, 0), (0, 1, 0), (0, -1, 1)),),
    reads=(0, 0, 1, 2, 2),
    taps=((-1, -1, 0), (-1, 0, 0), (1, 1, 1), (0, 0, 1), (0, 1, 1)),
    outputs=(((1, 0, 1, 0, 0), (0, 1, 1, 0, 0), (0, 0, 1, 1, 0), (0, 0, 1, 0, 1)),),
    steady=2,
    stride=2,
    lead=1,
    repeats=(0, 1, 1, 2),
)
"""Of a repeated map: 5 products for 4 outputs."""

WINOGRAD2 = TileScheme(
    sums=(((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, -1, 0, 1)),),
    reads=(0, 1, 2, 3),
    taps=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    outputs=(((1, 1, 1, 0), (0, 1, -1, 1)),),
    steady=1,
    stride=2,
)
"""F(2, 3): 4 products for 2 outputs."""

# Both transforms in two steps, for their rows come in pairs a + b, a - b: 17 sums and products for 6 values, not 27.
WINOGRAD4 = TileScheme(
    sums=(
        (
            (0, 0, -1, 0, 1, 0),
            (1, 0, -1, 0, 0, 0),
            (0, 0, -4, 0, 1, 0),
            (0, -4, 0, 1, 0, 0),
            (0, -1, 0, 1, 0, 0),
            (0, 0, 0, -1, 0, 1),
        ),
        (
            (1, 4, 0, 0, 0, 0),
            (0, 0, 1, 1, 0, 0),
            (0, 0, 1, -1, 0, 0),
            (1, 0, 0, 0, 2, 0),
            (1, 0, 0, 0, -2, 0),
            (0, 0, 0, 0, -4, 1),
        ),
    ),
    reads=(0, 1, 2, 3, 4, 5),
    taps=(
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    outputs=(
        (
            (1, 0, 0, 0, 0, 0),
            (0, 1, 1, 0, 0, 0),
            (0, 1, -1, 0, 0, 0),
            (0, 0, 0, 1, 1, 0),
            (0, 0, 0, 1, -1, 0),
            (0, 0, 0, 0, 0, 1),
        ),
        ((1, 1, 0, 1, 0, 0), (0, 0, 1, 0, 2, 0), (0, 1, 0, 4, 0, 0), (0, 0, 1, 0, 8, 1)),
    ),
    steady=1,
    stride=4,
)
"""F(4, 3): 6 products for 4 outputs."""

WINOGRAD: Mapping[DecoderForm, TileScheme] = {"winograd2": WINOGRAD2, "winograd4": WINOGRAD4}
"""Of the second convolution, in the forms that tile it."""


def require_known_form(form: str) -> None:
    """Check the name of a form.

    Raises:
        ConfigError: it is none of `DECODER_FORMS`.
    """
    if form not in DECODER_FORMS:
        raise ConfigError(f"unknown form of the decoder {form!r}; choose {', '.join(DECODER_FORMS)}", key="decoder")
