"""TCL as three modules that compute the same with less work: what is traced into the graphs of a bundle.

tcl/model.py stays the readable reference; here stand the exact rewrites. Weights are folded in float64.

1. Self-only attention in the last block is one matrix: out_proj after v_proj, layer scale included.
2. Both branches share one trunk; the class token is dropped where the trunk ends.
3. Mean and std fold into the patch embedding, so that the graph takes bytes; tanh(gate) folds into its convolution;
   layer scales fold into the linear layer before them; attention's 1/sqrt(d) folds into the query.
4. The text tower takes texts cut to any length, for it is causal.
5. With no KP weight the KP branch is not there.

The decoder is written as it is; decoder_graph.py gives an exported graph another form.

Shapes: B batch, N prompts, M texts, L tokens, C width, K heads, D embedding, H W pixels, h w patches, s mask cells a
patch side.
"""

import copy
import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import LayerScale, QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from tclkit.runtime.errors import ExportError
from tclkit.tcl.batches import IMAGE_MEAN, IMAGE_STD
from tclkit.tcl.grounder import GatedConv, Grounder, UpsamplingBlock
from tclkit.tcl.model import TCL
from tclkit.tcl.vision import nearness, position_embedding

_M = TypeVar("_M", nn.Linear, nn.Conv2d)
_NORM_EPSILON = 1e-6  # the authors' smallest length in a normalisation
_KP_SCALE, _KP_SHIFT = 10.0, -2.5


class ImageGraph(nn.Module):
    """Bytes to normalised features, for one image size.

    Args:
        model: the model; it is not changed, and shares no folded weights.
        size: (H, W) pixels, multiples of the patch.
        with_kp: whether the KP branch is computed.
    """

    tokens: Tensor

    def __init__(self, model: TCL, size: tuple[int, int], *, with_kp: bool = True) -> None:
        super().__init__()
        visual, grounder = model.clip.visual, model.grounder
        patch = model.config.clip.patch_size
        self.size = size
        self.grid = (size[0] // patch, size[1] // patch)
        self.patches = _patch_embedding(visual)
        positions_LC = position_embedding(visual, *self.grid).detach()
        first_LC = F.pad(visual.class_embedding.detach()[None], (0, 0, 0, len(positions_LC) - 1))
        self.register_buffer("tokens", positions_LC + first_LC)  # (1 + hw, C) what every image starts from
        self.ln_pre = copy.deepcopy(visual.ln_pre)
        self.trunk = nn.Sequential(*(_Block(block) for block in visual.transformer.resblocks[:-1]))
        self.grounder = _Grounder(grounder)
        self.kp: _KeyPatches | _NeighbourPatches | None = None
        if with_kp:
            is_plain = model.kp_attention == "self"
            self.kp = _KeyPatches(visual) if is_plain else _NeighbourPatches(visual, *self.grid)
        self.eval().requires_grad_(False)

    def forward(self, image_BHWC: Tensor) -> tuple[Tensor, ...]:
        """Embed images.

        Args:
            image_BHWC: (B, H, W, 3) uint8 RGB.

        Returns:
            grounded (B, D, s·h, s·w) and, if asked for, kp (B, D, h, w), both float32 of length 1 over D.
        """
        return self.features(image_BHWC.float().permute(0, 3, 1, 2))

    def features(self, image_BCHW: Tensor) -> tuple[Tensor, ...]:
        """The same from a float image on the scale of 0 to 255, channels first."""
        patches_BLC = self.patches(image_BCHW).flatten(2).transpose(1, 2)
        # Room for the class token by padding: to expand it, the graph would ask for the shape of the bytes, which is
        # not in the table of what TensorRT 10.1 does with bytes.
        x_BLC = F.pad(patches_BLC, (0, 0, 1, 0)) + self.tokens
        x_BLC = self.trunk(self.ln_pre(x_BLC))[:, 1:]
        grounded = self.grounder(x_BLC, *self.grid)
        return (grounded,) if self.kp is None else (grounded, self.kp(x_BLC, *self.grid))


class MasksGraph(nn.Module):
    """Features and text embeddings to soft masks, for any number of images and prompts and any grid."""

    def __init__(self, model: TCL, *, with_kp: bool = True) -> None:
        super().__init__()
        mask = model.grounder.mask
        self.scale, self.shift = mask.scale.item(), mask.shift.item()
        self.mask_scale = model.config.mask_scale
        self.with_kp = with_kp
        self.eval()

    def forward(self, grounded: Tensor, text: Tensor, kp: Tensor | None = None, kp_w: Tensor | None = None) -> Tensor:
        """Compare features with texts.

        Args:
            grounded: (B, D, s·h, s·w) of length 1 over D.
            text: (N, D) of length 1.
            kp: (B, D, h, w) of length 1 over D, with a KP branch only.
            kp_w: scalar in 0..1, with a KP branch only.

        Returns:
            (B, N, s·h, s·w) soft masks in 0..1.
        """
        masks_BNhw = torch.sigmoid(_cosine(grounded, text) * self.scale + self.shift)
        if kp is None or kp_w is None:
            return masks_BNhw
        kp_BNhw = torch.sigmoid(_cosine(kp, text) * _KP_SCALE + _KP_SHIFT)
        factor = float(self.mask_scale)
        kp_BNhw = F.interpolate(kp_BNhw, scale_factor=factor, mode="bilinear", align_corners=False)
        return kp_w * kp_BNhw + (1 - kp_w) * masks_BNhw


class TextGraph(nn.Module):
    """Token ids to raw text embeddings, for any number of texts of any common length up to the context."""

    tokens: Tensor
    positions: Tensor
    causal: Tensor

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.register_buffer("tokens", clip.token_embedding.weight.detach())  # (V, C)
        self.register_buffer("positions", clip.positional_embedding.detach())  # (L, C)
        context = len(clip.positional_embedding)
        self.register_buffer("causal", torch.full((context, context), -math.inf).triu(1))
        self.blocks = nn.ModuleList(_Block(block) for block in clip.transformer.resblocks)
        self.ln_final = copy.deepcopy(clip.ln_final)
        self.projection = _linear(clip.text_projection.detach().T)
        self.eval().requires_grad_(False)

    def forward(self, token_ids_ML: Tensor) -> Tensor:
        """Embed texts.

        Args:
            token_ids_ML: (M, L) int64; the end-of-text id is the largest of the vocabulary.

        Returns:
            (M, D) float32, not normalised.
        """
        length = token_ids_ML.shape[1]
        x_MLC = F.embedding(token_ids_ML, self.tokens) + self.positions[:length]
        causal_LL = self.causal[:length, :length]
        for block in self.blocks:
            x_MLC = block(x_MLC, causal_LL)
        end_M = token_ids_ML.argmax(dim=1)  # the first of them
        end_M1C = end_M[:, None, None].expand(-1, 1, x_MLC.shape[2])
        embedding_MD: Tensor = self.projection(self.ln_final(x_MLC.gather(1, end_M1C)[:, 0]))
        return embedding_MD


class _Attention(nn.Module):
    """Multi-head self-attention written out: MatMul, Softmax, MatMul."""

    def __init__(self, block: ResidualAttentionBlock) -> None:
        super().__init__()
        attention = block.attn
        self.heads, self.head_width = attention.num_heads, attention.head_dim
        weight, bias = _double(attention.in_proj_weight), _double(attention.in_proj_bias)
        scale = torch.ones_like(bias)
        scale[: len(bias) // 3] = self.head_width**-0.5
        self.qkv = _linear(weight * scale[:, None], bias * scale)
        self.out = _scaled_linear(attention.out_proj, block.ls_1)

    def forward(self, x_BLC: Tensor, mask_LL: Tensor | None = None) -> Tensor:
        q_BKLd, k_BKLd, v_BKLd = (self._split(part) for part in self.qkv(x_BLC).chunk(3, dim=-1))
        scores_BKLL = q_BKLd @ k_BKLd.transpose(2, 3)
        if mask_LL is not None:
            scores_BKLL = scores_BKLL + mask_LL
        mixed_BKLd = scores_BKLL.softmax(dim=-1) @ v_BKLd
        y_BLC: Tensor = self.out(mixed_BKLd.transpose(1, 2).flatten(2))
        return y_BLC

    def _split(self, x_BLC: Tensor) -> Tensor:
        B, L, _ = x_BLC.shape
        return x_BLC.reshape(B, L, self.heads, self.head_width).transpose(1, 2)


class _Mlp(nn.Module):
    def __init__(self, block: ResidualAttentionBlock) -> None:
        super().__init__()
        self.up = copy.deepcopy(block.mlp.c_fc)
        self.is_quick = isinstance(block.mlp.gelu, QuickGELU)
        self.down = _scaled_linear(block.mlp.c_proj, block.ls_2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.is_quick else F.gelu(hidden)
        y: Tensor = self.down(hidden)
        return y


class _Block(nn.Module):
    """One residual block of a tower."""

    def __init__(self, block: ResidualAttentionBlock) -> None:
        super().__init__()
        self.ln_1, self.attention = copy.deepcopy(block.ln_1), _Attention(block)
        self.ln_2, self.mlp = copy.deepcopy(block.ln_2), _Mlp(block)

    def forward(self, x_BLC: Tensor, mask_LL: Tensor | None = None) -> Tensor:
        x_BLC = x_BLC + self.attention(self.ln_1(x_BLC), mask_LL)
        y_BLC: Tensor = x_BLC + self.mlp(self.ln_2(x_BLC))
        return y_BLC


class _SelfOnlyBlock(nn.Module):
    """One residual block whose tokens attend to themselves alone: value and output projections are one matrix."""

    def __init__(self, block: ResidualAttentionBlock) -> None:
        super().__init__()
        attention, width = block.attn, block.attn.embed_dim
        value_weight = _double(attention.in_proj_weight)[-width:]
        value_bias = _double(attention.in_proj_bias)[-width:]
        out_weight, out_bias = _double(attention.out_proj.weight), _double(attention.out_proj.bias)
        scale = _layer_scale(block.ls_1, width)
        weight = (out_weight @ value_weight) * scale[:, None]
        self.value_out = _linear(weight, (out_weight @ value_bias + out_bias) * scale)
        self.ln_1, self.ln_2, self.mlp = copy.deepcopy(block.ln_1), copy.deepcopy(block.ln_2), _Mlp(block)

    def forward(self, x_BLC: Tensor) -> Tensor:
        x_BLC = x_BLC + self.value_out(self.ln_1(x_BLC))
        y_BLC: Tensor = x_BLC + self.mlp(self.ln_2(x_BLC))
        return y_BLC


class _KeyPatches(nn.Module):
    """The KP branch: CLIP's own dense embedding."""

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.block = _SelfOnlyBlock(visual.transformer.resblocks[-1])
        self.ln = copy.deepcopy(visual.ln_post)
        self.projection = _linear(visual.proj.detach().T)

    def forward(self, x_BLC: Tensor, h: int, w: int) -> Tensor:
        embedding_BLD = self.projection(self.ln(self.block(x_BLC)))
        return _grid(_normalize(embedding_BLD), h, w)


class _NeighbourPatches(nn.Module):
    """The KP branch whose patches attend to their neighbours: keys with keys, no residual, no MLP."""

    nearness: Tensor

    def __init__(self, visual: VisionTransformer, h: int, w: int) -> None:
        super().__init__()
        block = visual.transformer.resblocks[-1]
        attention, width = block.attn, block.attn.embed_dim
        self.heads, self.head_width = attention.num_heads, attention.head_dim
        weight, bias = (_double(part)[width:] for part in (attention.in_proj_weight, attention.in_proj_bias))
        scale = torch.ones_like(bias)
        scale[:width] = self.head_width**-0.25  # keys meet keys: the root of the usual factor on either side
        self.kv = _linear(weight * scale[:, None], bias * scale)
        self.out = copy.deepcopy(attention.out_proj)
        self.ln_1, self.ln = copy.deepcopy(block.ln_1), copy.deepcopy(visual.ln_post)
        self.projection = _linear(visual.proj.detach().T)
        self.register_buffer("nearness", nearness(h, w))  # (hw, hw)

    def forward(self, x_BLC: Tensor, h: int, w: int) -> Tensor:
        k_BKLd, v_BKLd = (self._split(part) for part in self.kv(self.ln_1(x_BLC)).chunk(2, dim=-1))
        mixed_BKLd = (k_BKLd @ k_BKLd.transpose(2, 3) + self.nearness).softmax(dim=-1) @ v_BKLd
        embedding_BLD = self.projection(self.ln(self.out(mixed_BKLd.transpose(1, 2).flatten(2))))
        return _grid(_normalize(embedding_BLD), h, w)

    def _split(self, x_BLC: Tensor) -> Tensor:
        B, L, _ = x_BLC.shape
        return x_BLC.reshape(B, L, self.heads, self.head_width).transpose(1, 2)


class _Grounder(nn.Module):
    """The learned branch, on a grid that each decoder block doubles."""

    def __init__(self, grounder: Grounder) -> None:
        super().__init__()
        self.block = _SelfOnlyBlock(grounder.block)
        self.decoder = nn.Sequential(*(_UpsamplingBlock(block) for block in _blocks(grounder)))
        self.ln = copy.deepcopy(grounder.projection.ln)
        self.projection = _linear(grounder.projection.proj.detach().T)

    def forward(self, x_BLC: Tensor, h: int, w: int) -> Tensor:
        x_BhwC = self.decoder(self.block(x_BLC).unflatten(1, (h, w)))
        embedding_BhwD = self.projection(self.ln(x_BhwC))
        return _normalize(embedding_BhwD).permute(0, 3, 1, 2)


class _UpsamplingBlock(nn.Module):
    """One block of the decoder, for channels that stand last."""

    def __init__(self, block: UpsamplingBlock) -> None:
        super().__init__()
        self.conv1, self.conv2 = _Branch(block.conv1), _Branch(block.conv2)

    def forward(self, x_BhwC: Tensor) -> Tensor:
        x_BCHW = F.interpolate(x_BhwC.permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        x_BHWC = x_BHWC + self.conv1(x_BHWC)
        y_BHWC: Tensor = x_BHWC + self.conv2(x_BHWC)
        return y_BHWC


class _Branch(nn.Module):
    """A branch of such a block, its gate inside its convolution."""

    def __init__(self, branch: GatedConv) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(branch.norm.normalized_shape, eps=branch.norm.eps)
        self.norm.load_state_dict(branch.norm.state_dict())
        factor = branch.gate.gate.detach().double().tanh()
        inner = branch.conv
        conv = nn.Conv2d(inner.in_channels, inner.out_channels, kernel_size=3, padding=1, device="meta")
        self.conv = _with_weights(conv, _double(inner.weight) * factor, _double(inner.bias) * factor)

    def forward(self, x_BhwC: Tensor) -> Tensor:
        # GELU comes last: the quantiser balances channels right behind it, on the map that the convolution reads.
        y_BChw: Tensor = self.conv(F.gelu(self.norm(x_BhwC).permute(0, 3, 1, 2)))
        return y_BChw.permute(0, 2, 3, 1)


def _blocks(grounder: Grounder) -> list[UpsamplingBlock]:
    return [block for block in grounder.decoder if isinstance(block, UpsamplingBlock)]


def _patch_embedding(visual: VisionTransformer) -> nn.Conv2d:
    """The patch embedding for pixels on the scale of 0 to 255: w·(x - mean)/std + b."""
    weight = _double(visual.conv1.weight)  # (C, 3, patch, patch)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    bias = -(weight * mean / std).sum(dim=(1, 2, 3))
    if visual.conv1.bias is not None:
        bias = bias + _double(visual.conv1.bias)
    patch = weight.shape[-1]
    conv = nn.Conv2d(3, len(weight), kernel_size=patch, stride=patch, device="meta")
    return _with_weights(conv, weight / std, bias)


def _scaled_linear(linear: nn.Linear, layer_scale: nn.Module) -> nn.Linear:
    scale = _layer_scale(layer_scale, linear.out_features)
    return _linear(_double(linear.weight) * scale[:, None], _double(linear.bias) * scale)


def _layer_scale(module: nn.Module, width: int) -> Tensor:
    """Factors of open_clip's LayerScale in float64; ones for the Identity that stands where there is none."""
    if isinstance(module, nn.Identity):
        return torch.ones(width, dtype=torch.float64)
    if not isinstance(module, LayerScale):
        raise ExportError(f"a block scales its branch by {type(module).__name__}, which the exporter does not know")
    return _double(module.gamma)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    # Built on the meta device, so that no random weights are drawn: callers keep their random state.
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return _with_weights(linear, weight, bias)


def _with_weights(module: _M, weight: Tensor, bias: Tensor | None) -> _M:
    module.weight = _own(weight)
    if bias is not None:
        module.bias = _own(bias)
    return module


def _own(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(torch.float32, copy=True).contiguous())


def _double(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.detach().double()


def _grid(x_BLC: Tensor, h: int, w: int) -> Tensor:
    """Lay tokens out, (B, C, h, w)."""
    B, _, C = x_BLC.shape
    return x_BLC.transpose(1, 2).reshape(B, C, h, w)


def _normalize(x: Tensor) -> Tensor:
    """Scale the last axis to length 1."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp_min(_NORM_EPSILON)


def _cosine(features_BDhw: Tensor, text_ND: Tensor) -> Tensor:
    """(B, N, h, w) from vectors of length 1."""
    B, _, h, w = features_BDhw.shape
    return (text_ND @ features_BDhw.flatten(2)).reshape(B, text_ND.shape[0], h, w)  # len() would fix N
