"""The grounder's parts."""

import torch
from open_clip.transformer import VisionTransformer

from tclkit.tcl.grounder import ChannelLayerNorm, GatedConv, Grounder, UpsamplingBlock


def test_norm_works_at_every_pixel_for_itself():
    x = torch.randn(2, 8, 3, 4)
    normalised = ChannelLayerNorm(8)(x)
    assert torch.allclose(normalised.mean(dim=1), torch.zeros(2, 3, 4), atol=1e-6)
    assert torch.allclose(normalised[:, :, 1:2, 2:3], ChannelLayerNorm(8)(x[:, :, 1:2, 2:3]), atol=1e-6)


def test_a_shut_gate_adds_nothing():
    branch, x = GatedConv(4), torch.randn(1, 4, 5, 6)
    assert branch(x).abs().max() == 0
    branch.gate.gate.data.fill_(100.0)
    assert branch(x).abs().max() > 0


def test_a_block_doubles_the_grid():
    x = torch.randn(1, 4, 3, 5)
    assert torch.equal(UpsamplingBlock(4)(x), x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def test_the_copy_is_its_own():
    """Training the grounder must not touch CLIP."""
    visual = VisionTransformer(image_size=32, patch_size=16, width=32, layers=2, heads=2, mlp_ratio=4.0, output_dim=8)
    grounder = Grounder(visual, blocks=1)
    for parameter in grounder.parameters():
        parameter.data.add_(1.0)
    block = visual.transformer.resblocks[-1]
    assert not torch.equal(grounder.block.mlp.c_fc.weight, block.mlp.c_fc.weight)
    assert not torch.equal(grounder.projection.proj, visual.proj)
    assert not torch.equal(grounder.projection.ln.weight, visual.ln_post.weight)
    assert grounder(torch.randn(2, 7, 32), 2, 3).shape == (2, 8, 4, 6)
