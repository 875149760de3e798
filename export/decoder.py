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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tclkit.runtime.errors import ConfigError
from tclkit.tcl.grounder import GatedConv, UpsamplingBlock

DecoderForm = Literal["direct", "phases", "differences", "winograd2", "winograd4"]
DECODER_FORMS: tuple[DecoderForm, ...] = get_args(DecoderForm)
DEFAULT_DECODER: DecoderForm = "direct"  # GPUs have kernels for it; processors gain by winograd4

_Rows = tuple[tuple[float, ...], ...]
_Grid = list[list[Tensor]]


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

    sums: tuple[_Rows, ...]
    reads: tuple[int, ...]
    taps: _Rows
    outputs: tuple[_Rows, ...]
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


def upsampling_block(block: UpsamplingBlock, form: DecoderForm) -> nn.Module:
    """Rewrite a block, from (B, h, w, C) to (B, 2h, 2w, C), in float64; it shares no weights with the block.

    Raises:
        ConfigError: unknown form.
    """
    require_known_form(form)
    if form == "direct":
        return _DirectBlock(block)
    first: nn.Module = _Phases(block.conv1) if form == "phases" else _TiledConv(block.conv1, DIFFERENCES)
    schemes = {"winograd2": WINOGRAD2, "winograd4": WINOGRAD4}
    second = _TiledConv(block.conv2, schemes[form]) if form in schemes else _PlainConv(block.conv2)
    return _RewrittenBlock(_channel_norm(block.conv1), first, _channel_norm(block.conv2), second)


def require_known_form(form: str) -> None:
    """Check the name of a form.

    Raises:
        ConfigError: it is none of `DECODER_FORMS`.
    """
    if form not in DECODER_FORMS:
        raise ConfigError(f"unknown form of the decoder {form!r}; choose {', '.join(DECODER_FORMS)}", key="decoder")


class _DirectBlock(nn.Module):
    """As tcl/grounder.py has it."""

    def __init__(self, block: UpsamplingBlock) -> None:
        super().__init__()
        self.norm1, self.conv1 = _channel_norm(block.conv1), _PlainConv(block.conv1)
        self.norm2, self.conv2 = _channel_norm(block.conv2), _PlainConv(block.conv2)

    def forward(self, x_BhwC: Tensor) -> Tensor:
        x_BHWC = _repeat(x_BhwC)
        x_BHWC = x_BHWC + self.conv1(F.gelu(self.norm1(x_BHWC)))
        y_BHWC: Tensor = x_BHWC + self.conv2(F.gelu(self.norm2(x_BHWC)))
        return y_BHWC


class _RewrittenBlock(nn.Module):
    """The first branch's norm and GELU before the repetition; its convolution repeats and adds the residual itself."""

    def __init__(self, norm1: nn.Module, conv1: nn.Module, norm2: nn.Module, conv2: nn.Module) -> None:
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = norm1, conv1, norm2, conv2

    def forward(self, x_BhwC: Tensor) -> Tensor:
        x_BHWC = self.conv1(F.gelu(self.norm1(x_BhwC)), x_BhwC)
        y_BHWC: Tensor = x_BHWC + self.conv2(F.gelu(self.norm2(x_BHWC)))
        return y_BHWC


class _PlainConv(nn.Module):
    """A branch's 3x3 convolution for channels that stand last."""

    def __init__(self, branch: GatedConv) -> None:
        super().__init__()
        self.conv = _conv_with(*folded_weights(branch), padding=1)

    def forward(self, x_BhwC: Tensor) -> Tensor:
        y_BChw: Tensor = self.conv(x_BhwC.permute(0, 3, 1, 2))
        return y_BChw.permute(0, 2, 3, 1)


class _Phases(nn.Module):
    """The 3x3 convolution of a repeated map as one 2x2 convolution of the map, to four channels in place of each.

    At the corner between four pixels it computes the four repeated pixels around the corner. Of taps w0 w1 w2 the
    later pixel of a pair sees (w0 + w1, w2), the earlier one of the next pair (w0, w1 + w2).
    """

    def __init__(self, branch: GatedConv) -> None:
        super().__init__()
        weight_OIkk, bias_O = folded_weights(branch)
        pairs_p2k = weight_OIkk.new_tensor([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [0, 1, 1]]])
        phases = torch.einsum("pai,ocij,qbj->pqocab", pairs_p2k, weight_OIkk, pairs_p2k)
        self.width = len(bias_O)
        self.conv = _conv_with(phases.flatten(0, 2), bias_O.repeat(4), padding=1)

    def forward(self, x_BhwC: Tensor, residual_BhwC: Tensor) -> Tensor:
        y_BKhw = self.conv(x_BhwC.permute(0, 3, 1, 2))  # K = 4C, on the corners: one more a column and a row
        h, w = y_BKhw.shape[2:]
        y_BhpwqC = y_BKhw.reshape(-1, 2, 2, self.width, h, w).permute(0, 4, 1, 5, 2, 3)
        y_BHWC: Tensor = y_BhpwqC.reshape(-1, 2 * h, 2 * w, self.width)[:, 1:-1, 1:-1]
        return y_BHWC + _repeat(residual_BhwC)


class _TiledConv(nn.Module):
    """A branch's 3x3 convolution by a scheme: slices of the map, sums of them, products, sums of those, interleaved.

    Each product is a matrix of its own: no runtime has to stack the slices, and INT8 has a scale for each.
    """

    def __init__(self, branch: GatedConv, scheme: TileScheme) -> None:
        super().__init__()
        weight_OIkk, bias_O = folded_weights(branch)
        taps = weight_OIkk.new_tensor(scheme.taps)
        factors_abIO = torch.einsum("ai,ocij,bj->abco", taps, weight_OIkk, taps)
        self.scheme = scheme
        self.products = nn.ModuleList(_Product(factor_IO) for factor_IO in factors_abIO.flatten(0, 1))
        self.bias = nn.Parameter(bias_O.clone())

    def forward(self, x_BhwC: Tensor, residual_BhwC: Tensor | None = None) -> Tensor:
        """Convolve (B, h, w, C); with repetition the result is twice as fine, and the repeated residual is added."""
        scheme, (h, w) = self.scheme, x_BhwC.shape[1:3]
        values = _transformed(self._windows(x_BhwC), scheme.sums)
        many = len(scheme.reads)
        products = [
            [self.products[a * many + b](values[scheme.reads[a]][scheme.reads[b]]) for b in range(many)]
            for a in range(many)
        ]
        products[scheme.steady][scheme.steady] = products[scheme.steady][scheme.steady] + self.bias
        outputs = _transformed(products, scheme.outputs)
        if residual_BhwC is not None:
            windows, places = self._windows(residual_BhwC), scheme.repeats
            outputs = [
                [y + windows[a][b] for y, b in zip(row, places, strict=True)]
                for row, a in zip(outputs, places, strict=True)
            ]
        y_BHWC, finer = _interleaved(outputs), scheme.size // scheme.stride
        top = scheme.lead
        bottom, right = top + finer * h, top + finer * w
        if (top, bottom, right) == (0, *y_BHWC.shape[1:3]):
            return y_BHWC
        return y_BHWC[:, top:bottom, top:right]

    def _windows(self, x_BhwC: Tensor) -> _Grid:
        """The map's cells at every place of the window: window x window maps (B, T, T, C) with zeros around."""
        scheme, (h, w) = self.scheme, x_BhwC.shape[1:3]
        spans = [scheme.stride * (scheme.count_tiles(length) - 1) + 1 for length in (h, w)]
        more_h, more_w = (span + scheme.window - 2 - length for span, length in zip(spans, (h, w), strict=True))
        padded = F.pad(x_BhwC, (0, 0, 1, more_w, 1, more_h))
        return [
            [
                padded[:, k : k + spans[0] : scheme.stride, j : j + spans[1] : scheme.stride]
                for j in range(scheme.window)
            ]
            for k in range(scheme.window)
        ]


class _Product(nn.Module):
    """A matrix behind every cell. Its name ends in "weight", by which the quantiser knows its place."""

    def __init__(self, weight_IO: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_IO.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x @ self.weight
        return y


def folded_weights(branch: GatedConv) -> tuple[Tensor, Tensor]:
    """A branch's convolution with tanh(gate) inside: (O, I, 3, 3) and (O,), in float64."""
    factor = branch.gate.gate.detach().double().tanh()
    bias = branch.conv.bias
    assert bias is not None
    return branch.conv.weight.detach().double() * factor, bias.detach().double() * factor


def _channel_norm(branch: GatedConv) -> nn.LayerNorm:
    norm = nn.LayerNorm(branch.norm.normalized_shape, eps=branch.norm.eps)
    norm.load_state_dict(branch.norm.state_dict())
    return norm.double()


def _conv_with(weight_OIkk: Tensor, bias_O: Tensor, *, padding: int) -> nn.Conv2d:
    # Built on the meta device, so that no random weights are drawn: callers keep their random state.
    outputs, inputs, side, _ = weight_OIkk.shape
    conv = nn.Conv2d(inputs, outputs, side, padding=padding, device="meta")
    conv.weight, conv.bias = nn.Parameter(weight_OIkk.contiguous()), nn.Parameter(bias_O.contiguous())
    return conv


def _repeat(x_BhwC: Tensor) -> Tensor:
    """Repeat every cell twice on both axes."""
    x_BCHW: Tensor = F.interpolate(x_BhwC.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
    return x_BCHW.permute(0, 2, 3, 1)


def _transformed(grid: _Grid, steps: Sequence[_Rows]) -> _Grid:
    """Apply matrices to a grid of maps, down its columns and then along its rows."""
    columns = [_combined(column, steps) for column in zip(*grid, strict=True)]
    return [_combined(row, steps) for row in zip(*columns, strict=True)]


def _combined(maps: Sequence[Tensor], steps: Sequence[_Rows]) -> list[Tensor]:
    for rows in steps:
        maps = [_weighted_sum(maps, row) for row in rows]
    return list(maps)


def _weighted_sum(maps: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Sum of maps times factors, with no product by 1 and no sign change on its own: every one is a pass of memory."""
    terms = sorted(((f, x) for f, x in zip(factors, maps, strict=True) if f), key=lambda term: term[0] < 0)
    factor, total = terms[0]
    assert factor > 0
    total = total if factor == 1 else total * factor
    for factor, x in terms[1:]:
        scaled = x if abs(factor) == 1 else x * abs(factor)
        total = total + scaled if factor > 0 else total - scaled
    return total


def _interleaved(outputs: _Grid) -> Tensor:
    """Lay tiles out: m x m maps (B, T, T, C) of one place of the tile each to (B, mT, mT, C)."""
    m, (rows, columns, width) = len(outputs), outputs[0][0].shape[1:]
    lines = [torch.cat(line, -1).reshape(-1, rows, 1, m * columns, width) for line in outputs]
    return torch.cat(lines, 2).reshape(-1, m * rows, m * columns, width)
