"""The image tower's additions, against open_clip's own attention."""

import pytest
import torch
from open_clip.transformer import Transformer

from tclkit.tcl.vision import dense_embedding, grid_from_tokens, run_blocks, run_self_only_block, run_trunk


def test_self_only_attention_is_masked_attention(check):
    """A mask that hides all other tokens gives the same numbers the long way."""
    torch.manual_seed(0)
    block = Transformer(width=32, layers=1, heads=2).resblocks[0]
    x = torch.randn(2, 10, 32)
    alone = torch.full((10, 10), float("-inf")).fill_diagonal_(0)
    with torch.no_grad():
        check("self-only attention", run_self_only_block(block, x), block(x, attn_mask=alone))


@pytest.mark.parametrize("batch_first", [True, False])
def test_blocks_run_in_either_layout(batch_first):
    torch.manual_seed(0)
    newer, other = Transformer(32, 2, 2), Transformer(32, 2, 2, batch_first=batch_first)
    other.load_state_dict(newer.state_dict())
    x = torch.randn(3, 7, 32)
    assert torch.allclose(run_blocks(other, other.resblocks, x), newer(x), atol=1e-6)


def test_grid_leaves_out_the_class_token():
    x = torch.arange(7.0).reshape(1, 7, 1)
    assert grid_from_tokens(x, 2, 3).tolist() == [[[[1, 2, 3], [4, 5, 6]]]]


def test_dense_embedding_of_a_tall_image(tiny_model):
    visual = tiny_model.clip.visual
    trunk = run_trunk(visual, torch.randn(1, 3, 48, 16))
    assert trunk.shape == (1, 4, 32)
    assert dense_embedding(visual, trunk, 3, 1).shape == (1, 24, 3, 1)
