"""TCL: masks equal to the authors', texts, shapes, refusals, what learns."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tclkit.runtime.errors import CheckpointError, ConfigError, InputError
from tclkit.tcl import TCL, ClipConfig, LossWeights, TCLConfig, build_clip
from tclkit.tcl.model import encode_text, normalize, pad_to_patch, similarity
from tclkit.tcl.vision import global_embedding, position_embedding, run_trunk

SIZES = ("64x64", "96x80", "75x90")


@pytest.mark.parametrize("size", SIZES)
def test_masks_are_the_authors(size, official_model, arrays, check):
    data = arrays(f"infer_{size}.npz")
    images, texts = torch.from_numpy(data["image"]), torch.from_numpy(arrays("text_tiny.npz")["text_embedding"])
    names = [name for name in data if name.startswith("mask_B")]
    assert len(names) == 8
    for name in names:
        _, batch, count, kp, pamr = name.split("_")
        masks = official_model.generate_masks(
            images[: int(batch[1:])], texts[: int(count[1:])], kp_w=float(kp[2:]), pamr=pamr == "pamr1"
        )
        check("masks", masks, data[name])


@pytest.mark.parametrize("size", SIZES)
def test_values_on_the_way_are_the_authors(size, official_model, arrays, check):
    data = arrays(f"infer_{size}.npz")
    texts = torch.from_numpy(arrays("text_tiny.npz")["text_embedding"])
    padded, (left, top) = pad_to_patch(torch.from_numpy(data["image"]), 16)
    assert (left, top) == tuple(data["pad_lrtb"][[0, 2]])
    features = official_model.image_features(padded)
    visual, (h, w) = official_model.clip.visual, features.kp_BDhw.shape[-2:]
    check("KP similarity map", similarity(features.kp_BDhw, texts), data["kp_simmap"])
    check("similarity map", similarity(features.grounded_BDhw, texts), data["simmap_B2_N5"])
    check("position embedding", position_embedding(visual, h, w), data["pos_emb_interpolated"])
    check("global image embedding", global_embedding(visual, run_trunk(visual, padded)), data["clip_global_image_emb"])


def test_texts_given_as_tokens(official_model, arrays, check):
    data = arrays("infer_64x64.npz")
    texts = normalize(official_model.encode_text(torch.from_numpy(data["tok_tokens"])), dim=-1)
    features = official_model.image_features(torch.from_numpy(data["image"]))
    check("similarity map", similarity(features.grounded_BDhw, texts), data["tok_simmap"])


def test_shut_gates(official_model, arrays, check):
    data = arrays("infer_64x64.npz")
    with torch.no_grad():
        for name, parameter in official_model.named_parameters():
            if name.endswith("gate"):
                parameter.zero_()
    texts = torch.from_numpy(arrays("text_tiny.npz")["text_embedding"])
    masks = official_model.generate_masks(torch.from_numpy(data["image"])[:1], texts[:2], kp_w=0.0)
    check("masks", masks, data["mask_gates0_B1_N2_kp0.0_pamr0"])


def test_text_embeddings_are_the_authors(official_model, arrays, check):
    data = arrays("text_tiny.npz")
    tokens = torch.from_numpy(data["tokens"])
    check("text embedding, raw", official_model.encode_text(tokens.flatten(0, 1)), data["text_encoder_raw"])
    check("text embedding, ensemble", official_model.build_text_embeddings(tokens), data["text_embedding"])


def test_tokens_after_the_end_change_nothing(tiny_model):
    tokens = torch.tensor([[38, 5, 39, 0, 0, 0], [38, 39, 0, 0, 0, 0]])
    noisy = tokens.clone()
    noisy[0, 3:] = torch.tensor([7, 39, 9])
    expected = tiny_model.encode_text(tokens)
    assert torch.allclose(tiny_model.encode_text(tokens[:, :3]), expected, atol=1e-6)
    assert torch.allclose(tiny_model.encode_text(noisy), expected, atol=1e-6)


def test_text_tower_agrees_with_open_clip(tiny_model):
    tokens = torch.randint(0, 39, (3, 12))
    tokens[:, -1] = 39
    assert torch.allclose(encode_text(tiny_model.clip, tokens), tiny_model.clip.encode_text(tokens), atol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (1, 13), (1, 0), (2, 2, 2)])
def test_wrong_token_shapes_are_refused(shape, tiny_model):
    with pytest.raises(InputError, match=r"token ids must be \(M, L\) with L in 1..12"):
        tiny_model.encode_text(torch.ones(shape, dtype=torch.int64))


def test_ensembles_need_three_dimensions(tiny_model):
    with pytest.raises(InputError, match=r"\(N, T, L\)"):
        tiny_model.build_text_embeddings(torch.ones((2, 3), dtype=torch.int64))


@pytest.mark.parametrize("patch_size", [8, 16, 32])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_any_patch_and_gelu(patch_size, quick_gelu, clip_config):
    config = clip_config(patch_size=patch_size, quick_gelu=quick_gelu)
    model = TCL(TCLConfig(clip=config, decoder_blocks=1))
    images = torch.randn(2, 3, 64, 64)
    visual = model.clip.visual
    assert torch.allclose(global_embedding(visual, run_trunk(visual, images)), visual(images), atol=1e-5)
    features = model.image_features(images)
    side = 64 // patch_size
    assert features.kp_BDhw.shape == (2, 24, side, side)
    assert features.grounded_BDhw.shape == (2, 24, 2 * side, 2 * side)
    masks = model.generate_masks(torch.randn(1, 3, 50, 70), torch.randn(3, 24), pamr=True)
    assert masks.shape == (1, 3, 50, 70)
    assert masks.min() >= 0
    assert masks.max() <= 1


def test_a_fresh_grounder_is_maskclip(clip_config):
    model = TCL(TCLConfig(clip=clip_config()))
    images, texts = torch.randn(1, 3, 64, 96), torch.randn(2, 24)
    features = model.image_features(images)
    upsampled = features.kp_BDhw.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert torch.allclose(features.grounded_BDhw, upsampled, atol=1e-5)
    assert model.generate_masks(images, texts).shape == (1, 2, 64, 96)


def test_one_layer_is_enough(clip_config):
    model = TCL(TCLConfig(clip=clip_config(vision_layers=1)))
    assert model.generate_masks(torch.randn(1, 3, 16, 16), torch.randn(1, 24)).shape == (1, 1, 16, 16)


def test_layer_scale_counts(clip_config):
    torch.manual_seed(0)
    model = TCL(TCLConfig(clip=clip_config(vision_layer_scale=0.5)))
    features = model.image_features(torch.randn(1, 3, 64, 64)).kp_BDhw
    with torch.no_grad():
        model.clip.visual.transformer.resblocks[-1].ls_1.gamma.zero_()
    images = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(model.image_features(images).kp_BDhw, features)


def test_prompts_do_not_disturb_each_other(tiny_model):
    images, texts = torch.randn(1, 3, 40, 56), torch.randn(5, 24)
    every = tiny_model.generate_masks(images, texts)
    alone = torch.cat([tiny_model.generate_masks(images, texts[i : i + 1]) for i in range(5)], dim=1)
    assert torch.allclose(every, alone, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "texts", "kp_w", "message"),
    [
        ((1, 4, 64, 64), (2, 24), 0.3, r"images must have shape \(≥1, 3, ≥1, ≥1\), not \(1, 4, 64, 64\)"),
        ((3, 64, 64), (2, 24), 0.3, "images must have shape"),
        ((1, 3, 64, 64), (2, 25), 0.3, r"text embeddings must have shape \(≥1, 24\), not \(2, 25\)"),
        ((1, 3, 64, 64), (24,), 0.3, "text embeddings must have shape"),
        ((1, 3, 64, 64), (2, 24), 1.5, "kp_w must be in 0..1, not 1.5"),
        ((1, 3, 0, 64), (2, 24), 0.3, "images must have shape"),
        ((0, 3, 64, 64), (2, 24), 0.3, "images must have shape"),
        ((1, 3, 64, 64), (0, 24), 0.3, r"text embeddings must have shape .*, not \(0, 24\)"),
    ],
)
def test_wrong_inputs_are_refused(images, texts, kp_w, message, tiny_model):
    with pytest.raises(InputError, match=message):
        tiny_model.generate_masks(torch.zeros(images), torch.zeros(texts), kp_w=kp_w)


def test_features_need_whole_patches(tiny_model):
    with pytest.raises(InputError, match=r"multiples of the patch \(16\), not 64x60; pad it"):
        tiny_model.image_features(torch.zeros(1, 3, 64, 60))


def test_padding_is_halved_rounding_down():
    padded, (left, top) = pad_to_patch(torch.ones(1, 1, 75, 90), 16)
    assert padded.shape == (1, 1, 80, 96)
    assert (left, top) == (3, 2)
    assert padded[0, 0, :2].sum() == 0
    assert padded[0, 0, 77:].sum() == 0
    assert padded[0, 0, 2:77, 3:93].min() == 1


def test_stages_choose_what_learns(tiny_model):
    def learning():
        return {name for name, parameter in tiny_model.named_parameters() if parameter.requires_grad}

    tiny_model.train_stage("decoder")
    decoder = learning()
    tiny_model.train_stage("full")
    extra = learning() - decoder
    assert len(extra) == 12
    assert all(name.startswith("grounder.block.") for name in extra)
    assert not any(name.startswith(("clip.", "grounder.block.")) for name in decoder)
    assert {"logit_scales.image", "logit_scales.feature", "grounder.mask.scale"} <= decoder
    with pytest.raises(ConfigError, match="unknown training stage 'ust'"):
        tiny_model.train_stage("ust")


def test_clip_stays_in_eval_mode(tiny_model):
    tiny_model.train()
    assert tiny_model.grounder.training
    assert not tiny_model.clip.training


def test_another_clip_is_refused(clip_config: Callable[..., ClipConfig]):
    with pytest.raises(CheckpointError, match=r"patch_size 8 \(expected 16\)"):
        TCL(TCLConfig(clip=clip_config()), build_clip(clip_config(patch_size=8)))


def test_config_round_trip(clip_config):
    config = TCLConfig(clip=clip_config(), decoder_blocks=3, kp_w=0.1)
    assert TCLConfig.from_dict(config.to_dict()) == config
    assert config.mask_scale == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_block": 2}, "unknown key 'decoder_block' in model; did you mean 'decoder_blocks'"),
        ({"decoder_blocks": 0}, "decoder_blocks must be a positive whole number"),
        ({"kp_w": -0.1}, "kp_w must be in 0..1"),
    ],
)
def test_wrong_configs_are_refused(changes, message, clip_config):
    with pytest.raises(ConfigError, match=message):
        TCLConfig.from_dict({**TCLConfig(clip=clip_config()).to_dict(), **changes})


@pytest.mark.parametrize(
    ("count", "tokens", "noise", "message"),
    [
        (1, 1, None, "at least two pairs"),
        (3, 2, None, "text embeddings must have shape"),
        (2, 2, (2, 2, 4, 4), r"noise must have shape \(2, 2, 16, 16\)"),
        (2, 2, (2, 4, 4), r"noise must have shape \(2, 16, 16\)"),
    ],
)
def test_wrong_batches_are_refused(count, tokens, noise, message, tiny_model):
    ids = torch.tensor([[38, 1, 39]]).repeat(tokens, 1)
    with pytest.raises(InputError, match=message):
        tiny_model(torch.zeros(count, 3, 64, 64), ids, noise_uniform=None if noise is None else torch.full(noise, 0.5))


def test_losses_follow_weights_and_noise(tiny_model):
    torch.manual_seed(1)
    images, ids = torch.randn(3, 3, 64, 64), torch.tensor([[38, i, 39] for i in range(3)])
    noise = torch.rand(3, 3, 16, 16)
    base = tiny_model(images, ids, noise_uniform=noise)
    own = noise[torch.arange(3), torch.arange(3)]
    double = tiny_model(images, ids, noise_uniform=own, weights=LossWeights(tcl=0.2, area=0.8, tv=2.0))
    assert set(base) == {"tcli_loss", "tclf_loss", "area_loss", "neg_area_loss", "tv_img_loss", "tv_mask_loss"}
    for name in base:
        assert torch.allclose(2 * base[name], double[name])
    torch.manual_seed(2)
    first = tiny_model(images, ids)["tcli_loss"]
    torch.manual_seed(2)
    assert tiny_model(images, ids)["tcli_loss"] == first
    prior = tiny_model(images, ids, noise_uniform=noise, weights=LossWeights(area_prior=0.0))
    assert np.isclose(float(prior["area_loss"].detach()), float(base["area_loss"].detach()), atol=0.4)
    assert prior["area_loss"] != base["area_loss"]
