"""The image tower's additions, against open_clip's own attention."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import Transformer

from tclkit.runtime.errors import ConfigError
from tclkit.tcl.vision import (
    attend_to_neighbours,
    dense_embedding,
    grid_from_tokens,
    nearness,
    run_blocks,
    run_self_only_block,
    run_trunk,
)


def transformer(layers: int, *, batch_first: bool) -> Transformer:
    """open_clip's transformer in the layout of its newer versions (batch first), or of its older ones."""
    torch.manual_seed(0)
    made = Transformer(width=32, layers=layers, heads=2)
    made.batch_first = batch_first
    for block in made.resblocks:
        block.attn.batch_first = batch_first
    return made


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_only_attention_is_masked_attention(batch_first, check):
    """A mask that hides all other tokens gives the same numbers the long way."""
    made = transformer(1, batch_first=batch_first)
    x = torch.randn(2, 10, 32)
    alone = torch.full((10, 10), float("-inf")).fill_diagonal_(0)
    with torch.no_grad():
        expected = run_blocks(made, made.resblocks, x, attn_mask=alone)
        check("self-only attention", run_self_only_block(made.resblocks[0], x), expected)


def test_blocks_run_in_either_layout():
    newer, older = transformer(2, batch_first=True), transformer(2, batch_first=False)
    x = torch.randn(3, 7, 32)
    expected = newer.resblocks[1](newer.resblocks[0](x))
    for made in (newer, older):
        assert torch.allclose(run_blocks(made, made.resblocks, x), expected, atol=1e-6)


def test_grid_leaves_out_the_class_token():
    x = torch.arange(7.0).reshape(1, 7, 1)
    assert grid_from_tokens(x, 2, 3).tolist() == [[[[1, 2, 3], [4, 5, 6]]]]


def test_dense_embedding_of_a_tall_image(tiny_model):
    visual = tiny_model.clip.visual
    trunk = run_trunk(visual, torch.randn(1, 3, 48, 16))
    assert trunk.shape == (1, 4, 32)
    assert dense_embedding(visual, trunk, 3, 1).shape == (1, 24, 3, 1)


@pytest.mark.parametrize("grid", [(2, 5), (1, 1), (4, 3)])
def test_neighbours_attend_as_torchs_own_attention_does(grid, check):
    """Keys in the place of queries and the Gaussian as the mask, through torch's function."""
    block = transformer(1, batch_first=True).resblocks[0]
    h, w = grid
    patches = torch.randn(2, h * w, 32)
    with torch.no_grad():
        _, k, v = F.linear(block.ln_1(patches), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
        k, v = (part.reshape(2, h * w, 2, 16).transpose(1, 2) for part in (k, v))
        mixed = F.scaled_dot_product_attention(k, k, v, attn_mask=nearness(h, w))
        expected = block.attn.out_proj(mixed.transpose(1, 2).reshape(2, h * w, 32))
        check("self-only attention", attend_to_neighbours(block, patches, h, w), expected)


def test_nearness_falls_with_distance():
    weights = nearness(2, 3)
    assert torch.equal(weights, weights.T)
    assert torch.equal(weights.diagonal(), torch.ones(6))
    expected = torch.exp(torch.tensor([0.0, 1.0, 4.0, 1.0, 2.0, 5.0]) / -50)  # 5 patches are one standard deviation
    assert torch.allclose(weights[0], expected)


def test_the_way_of_attending_is_the_models_choice(tiny_model):
    images = torch.randn(1, 3, 32, 48)
    plain = tiny_model.image_features(images)
    tiny_model.use_kp_attention("neighbours")
    try:
        other = tiny_model.image_features(images)
    finally:
        tiny_model.use_kp_attention("self")
    assert torch.equal(plain.grounded_BDhw, other.grounded_BDhw)
    assert plain.kp_BDhw.shape == other.kp_BDhw.shape
    assert not torch.allclose(plain.kp_BDhw, other.kp_BDhw, atol=1e-2)
    assert torch.equal(plain.kp_BDhw, tiny_model.image_features(images).kp_BDhw)
    with pytest.raises(ConfigError, match="unknown KP attention 'far'; choose self or neighbours"):
        tiny_model.use_kp_attention("far")
