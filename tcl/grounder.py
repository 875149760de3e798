"""The grounder: TCL's learned part, from CLIP's tokens to embeddings four times finer than the patches.

Shapes: B batch, N texts, L tokens (class token first), C width, D embedding, h w grid.
Source: TCL (Cha et al., CVPR 2023), section 3.2 and appendix; the authors' `masker`.
"""

import copy

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from .vision import grid_from_tokens, run_self_only_block

_INITIAL_SCALE, _INITIAL_SHIFT = 10.0, -2.5  # sigmoid(10·(cos - 0.25)), the same map as the KP branch


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map, at every pixel for itself."""

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Normalise (B, C, h, w) over C."""
        y_BhwC: Tensor = super().forward(x_BChw.permute(0, 2, 3, 1))
        return y_BhwC.permute(0, 3, 1, 2)


class Gate(nn.Module):
    """A learned factor in -1..1 that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Scale x by tanh(gate)."""
        return self.gate.tanh() * x


class GatedConv(nn.Module):
    """A residual branch that starts switched off: tanh(gate) · conv3x3(gelu(norm(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(width)
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.gate = Gate()

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same shape."""
        y_BChw: Tensor = self.gate(self.conv(F.gelu(self.norm(x_BChw))))
        return y_BChw


class UpsamplingBlock(nn.Module):
    """Doubles the grid by repetition, then refines it with two gated convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = GatedConv(width)
        self.conv2 = GatedConv(width)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, 2h, 2w)."""
        x_BChw = F.interpolate(x_BChw, scale_factor=2.0, mode="nearest")
        x_BChw = x_BChw + self.conv1(x_BChw)
        y_BChw: Tensor = x_BChw + self.conv2(x_BChw)
        return y_BChw


class Projection(nn.Module):
    """CLIP's way into the shared space for every cell of a map: LayerNorm, then a matrix."""

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.proj = nn.Parameter(visual.proj.detach().clone())
        self.ln = nn.LayerNorm(self.proj.shape[0])
        self.ln.load_state_dict(visual.ln_post.state_dict())

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, D, h, w), not normalised."""
        x_BhwD: Tensor = self.ln(x_BChw.permute(0, 2, 3, 1)) @ self.proj
        return x_BhwD.permute(0, 3, 1, 2)


class SimilarityToMask(nn.Module):
    """The learned line that turns a cosine into a mask's logit."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(_INITIAL_SCALE))
        self.shift = nn.Parameter(torch.tensor(_INITIAL_SHIFT))

    def forward(self, cosine_BNhw: Tensor) -> Tensor:
        """Logits of the same shape."""
        return cosine_BNhw * self.scale + self.shift


class Grounder(nn.Module):
    """CLIP's last block again, a gated convolutional decoder, a projection into the shared space, the mask's line.

    It starts as a copy of CLIP's last block, ln_post and projection with every gate shut: as MaskCLIP, on a finer grid.
    """

    def __init__(self, visual: VisionTransformer, blocks: int) -> None:
        super().__init__()
        width = visual.conv1.out_channels
        self.block = copy.deepcopy(visual.transformer.resblocks[-1])
        self.decoder = nn.ModuleList(UpsamplingBlock(width) for _ in range(blocks))
        self.projection = Projection(visual)
        self.mask = SimilarityToMask()

    def open_gates(self, value: float) -> None:
        """Set every gate of the decoder; tanh(value) is the share of its convolution that passes."""
        for part in self.decoder.modules():
            if isinstance(part, Gate):
                nn.init.constant_(part.gate, value)

    def forward(self, trunk_BLC: Tensor, h: int, w: int) -> Tensor:
        """Embed every cell of the fine grid.

        Args:
            trunk_BLC: (B, 1 + hw, C) CLIP's tokens before its last block.
            h, w: patches a column, a row.

        Returns:
            (B, D, s·h, s·w) with s = 2 ** blocks, not normalised.
        """
        x_BChw = grid_from_tokens(run_self_only_block(self.block, trunk_BLC), h, w)
        for block in self.decoder:
            x_BChw = block(x_BChw)
        embedding_BDhw: Tensor = self.projection(x_BChw)
        return embedding_BDhw
