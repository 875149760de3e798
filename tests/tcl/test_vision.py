"""The image tower's additions, against open_clip's own attention."""

import pytest
import torch
from open_clip.transformer import Transformer

from tclkit.tcl.vision import dense_embedding, grid_from_tokens, run_blocks, run_self_only_block, run_trunk


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
