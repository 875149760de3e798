"""The authors' names, and what else is asked of their checkpoints."""

import pytest
import torch

from tclkit.runtime.errors import CheckpointError
from tclkit.tcl import load_checkpoint, load_model
from tclkit.tcl.official import clip_name, our_name


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            "masker.image_encoder.backbone.transformer.resblocks.11.attn.in_proj_weight",
            "grounder.block.attn.in_proj_weight",
        ),
        ("masker.image_encoder.decoder.decoder.net.1.conv.norm.bias", "grounder.decoder.1.conv1.norm.bias"),
        ("masker.image_encoder.decoder.decoder.net.0.conv2.gate.gate", "grounder.decoder.0.conv2.gate.gate"),
        ("masker.image_encoder.decoder.image_proj.ln.weight", "grounder.projection.ln.weight"),
        ("masker.sim2mask.w", "grounder.mask.scale"),
        ("tclf_loss.logit_scale", "logit_scales.feature"),
        ("clip_text_encoder.ln_final.bias", None),
        ("something.else", None),
    ],
)
def test_names(theirs, ours):
    assert our_name(theirs) == ours


def test_clip_names():
    assert clip_name("clip_image_encoder.clip_proj.ln.weight") == "visual.ln_post.weight"
    assert clip_name("clip_image_encoder.clip_visual.conv1.weight") == "visual.conv1.weight"
    assert clip_name("clip_text_encoder.transformer.resblocks.0.ln_1.bias") == "transformer.resblocks.0.ln_1.bias"
    assert clip_name("masker.sim2mask.w") is None


@pytest.fixture
def content(golden):
    return load_checkpoint(golden / "official_learned.pth")


@pytest.fixture
def clip(golden):
    return golden / "clip_tiny.pt"


def test_the_losses_temperatures_may_be_missing(content, clip):
    for name in ("tcli_loss.logit_scale", "tclf_loss.logit_scale"):
        del content["model"][name]
    model = load_model(content, clip=clip)
    assert model.logit_scales["image"].item() == pytest.approx(2.6593, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("masker.sim2mask.b"), r"missing \['grounder.mask.shift'\]"),
        (lambda m: m.update({"masker.other": torch.zeros(1)}), "unknown tensor 'masker.other'"),
        (lambda m: m.update({"masker.sim2mask.w": torch.zeros(3)}), "do not fit this CLIP"),
        (lambda m: m.update({"clip_text_encoder.ln_final.bias": torch.zeros(3)}), "authors' checkpoint is no CLIP"),
    ],
)
def test_changed_checkpoints_are_refused(change, message, content, clip):
    change(content["model"])
    with pytest.raises(CheckpointError, match=message):
        load_model(content, clip=clip)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"ie_ignore_last_attn": False}, "ie_ignore_last_attn = False; only True"),
        ({"masker": {"decoder": {"act": "relu"}}}, "model.masker.decoder.act = 'relu'; only 'gelu'"),
        ({"masker": {"decoder": {"double": False}}}, "double"),
    ],
)
def test_other_recipes_are_refused(config, message, content, clip):
    with pytest.raises(CheckpointError, match=message):
        load_model({**content, "config": {"model": config}}, clip=clip)


def test_kp_weight_comes_from_the_config(content, clip):
    assert load_model({**content, "config": {"evaluate": {"kp_w": 0.15}}}, clip=clip).config.kp_w == 0.15
    assert load_model(content, clip=clip).config.kp_w == 0.3
