"""What TCL asks of CLIP's image tower that open_clip does not offer: any image size, and self-only attention.

Shapes: B batch, L tokens (class token first), C width, D embedding, H W pixels, h w patches.
"""

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor

KP_ATTENTIONS = ("self", "neighbours")
"""Ways in which CLIP's last block attends in the KP branch: each patch to itself, or to its neighbours as well."""

_NEARNESS_PATCHES = 5.0  # standard deviation; NACLIP's


def run_trunk(visual: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """Tokens before the last block, (B, 1 + hw, C); the image's sides are multiples of the patch."""
    grid_BChw = visual.conv1(images_BCHW)
    h, w = grid_BChw.shape[-2:]
    patches_BLC = grid_BChw.flatten(2).transpose(1, 2)
    class_BLC = visual.class_embedding.to(patches_BLC.dtype).expand(patches_BLC.shape[0], 1, -1)
    x_BLC = torch.cat([class_BLC, patches_BLC], dim=1)
    x_BLC = visual.ln_pre(x_BLC + position_embedding(visual, h, w).to(x_BLC.dtype))
    return run_blocks(visual.transformer, visual.transformer.resblocks[:-1], x_BLC)


def run_blocks(transformer: torch.nn.Module, blocks: torch.nn.ModuleList, x_BLC: Tensor, **kwargs: Tensor) -> Tensor:
    """Residual blocks in order; older open_clip keeps tokens first inside its transformers, newer the batch."""
    batch_first = getattr(transformer, "batch_first", False)
    x = x_BLC if batch_first else x_BLC.transpose(0, 1)
    for block in blocks:
        x = block(x, **kwargs)
    return x if batch_first else x.transpose(0, 1)


def position_embedding(visual: VisionTransformer, h: int, w: int) -> Tensor:
    """Position embeddings for a grid of h x w patches, (1 + hw, C): bicubic from the trained grid.

    They are taken as they are only for the trained grid itself.
    """
    trained_LC: Tensor = visual.positional_embedding
    side = round((trained_LC.shape[0] - 1) ** 0.5)
    if h == w == side:
        return trained_LC
    grid = trained_LC[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # 1, C, side, side
    grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
    return torch.cat([trained_LC[:1], grid.flatten(2)[0].T])


def run_self_only_block(block: ResidualAttentionBlock, x_BLC: Tensor) -> Tensor:
    """One residual block in which every token attends to itself alone.

    A softmax over one element is 1, so attention is out_proj(v_proj(x)): no query, no key.
    Source: TCL's `ignore_last_attn`; the same mathematics as MaskCLIP (Zhou et al., ECCV 2022).
    """
    attention, width = block.attn, x_BLC.shape[-1]
    value_BLC = F.linear(block.ln_1(x_BLC), attention.in_proj_weight[-width:], attention.in_proj_bias[-width:])
    x_BLC = x_BLC + block.ls_1(attention.out_proj(value_BLC))
    y_BLC: Tensor = x_BLC + block.ls_2(block.mlp(block.ln_2(x_BLC)))
    return y_BLC


def grid_from_tokens(x_BLC: Tensor, h: int, w: int) -> Tensor:
    """Drop the class token and lay the patches out, (B, C, h, w)."""
    patches_BCL = x_BLC[:, 1:].transpose(1, 2)
    return patches_BCL.reshape(*patches_BCL.shape[:2], h, w)


def global_embedding(visual: VisionTransformer, trunk_BLC: Tensor) -> Tensor:
    """CLIP's own image embedding, (B, D), not normalised: the last block with ordinary attention, the class token."""
    last = visual.transformer.resblocks[-1:]
    x_BLC = run_blocks(visual.transformer, last, trunk_BLC)
    embedding_BD: Tensor = visual.ln_post(x_BLC[:, 0]) @ visual.proj
    return embedding_BD


def dense_embedding(visual: VisionTransformer, trunk_BLC: Tensor, h: int, w: int, attention: str = "self") -> Tensor:
    """CLIP's embedding of every patch, (B, D, h, w), not normalised: the KP branch.

    Args:
        visual: the image tower.
        trunk_BLC: (B, 1 + hw, C) tokens before the last block.
        h, w: the patch grid.
        attention: of the last block, one of `KP_ATTENTIONS`.
    """
    block = visual.transformer.resblocks[-1]
    if attention == "neighbours":
        embedding_BLD: Tensor = visual.ln_post(attend_to_neighbours(block, trunk_BLC[:, 1:], h, w)) @ visual.proj
        return embedding_BLD.transpose(1, 2).reshape(len(trunk_BLC), -1, h, w)
    x_BLC = run_self_only_block(block, trunk_BLC)
    return grid_from_tokens(visual.ln_post(x_BLC) @ visual.proj, h, w)


def attend_to_neighbours(block: ResidualAttentionBlock, patches_BLC: Tensor, h: int, w: int) -> Tensor:
    """Attention in which every patch looks for patches like itself, near ones before far ones; (B, hw, C).

    Keys are compared with keys, a Gaussian of the distance is added, and neither the residual nor the MLP takes part.
    Source: NACLIP (Hajimiri et al., WACV 2025), the reduced architecture; here the class token is not attended to.
    """
    attention, width = block.attn, patches_BLC.shape[-1]
    normed_BLC = block.ln_1(patches_BLC)
    both_BLC = F.linear(normed_BLC, attention.in_proj_weight[width:], attention.in_proj_bias[width:])
    shape = (*patches_BLC.shape[:2], attention.num_heads, attention.head_dim)
    k_BKLd, v_BKLd = (part.reshape(shape).transpose(1, 2) for part in both_BLC.chunk(2, dim=-1))
    scores_BKLL = k_BKLd @ k_BKLd.transpose(2, 3) * attention.head_dim**-0.5
    mixed_BKLd = (scores_BKLL + nearness(h, w).to(scores_BKLL)).softmax(dim=-1) @ v_BKLd
    attended_BLC: Tensor = attention.out_proj(mixed_BKLd.transpose(1, 2).flatten(2))
    return attended_BLC


def nearness(h: int, w: int) -> Tensor:
    """Gaussian of the distance between every two patches of a grid, 1 at no distance; (hw, hw)."""
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    places_L2 = torch.stack([rows.flatten(), columns.flatten()], dim=1).float()
    squares_LL = (places_L2[:, None] - places_L2).square().sum(dim=-1)
    return torch.exp(-squares_LL / (2 * _NEARNESS_PATCHES**2))
