"""CLIP from configs, files and names; what is refused."""

import logging
import warnings
from dataclasses import replace

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from tclkit.runtime.errors import CheckpointError, ConfigError, DownloadError
from tclkit.tcl import ClipConfig, build_clip, load_clip
from tclkit.tcl.clip import clip_from_state_dict, config_from_clip


@pytest.mark.parametrize("name", ["clip_micro.pt", "clip_micro_jit.pt"])
def test_files_of_both_kinds(name, golden, arrays, check):
    data = arrays("clip_micro_out.npz")
    config, clip = load_clip(golden / name)
    assert config.quick_gelu
    assert config.vocab_size == 128
    assert not clip.training
    check("CLIP image embedding", clip.encode_image(torch.from_numpy(data["image"])), data["image_features"])
    check("CLIP text embedding", clip.encode_text(torch.from_numpy(data["tokens"])), data["text_features"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_size": 8},
        {"patch_size": 32, "quick_gelu": True},
        {"vision_layers": 1, "text_layers": 1},
        {"vision_mlp_ratio": 4.3637, "vision_width": 48},
        {"vision_layer_scale": 0.25},
    ],
)
def test_configs_are_read_back(changes, clip_config):
    config = clip_config(**changes)
    clip = build_clip(config)
    assert next(clip.parameters()).dtype == torch.float32
    assert not clip.training
    found = config_from_clip(clip)
    assert found.vision_mlp_ratio == pytest.approx(config.vision_mlp_ratio, abs=0.03)
    assert ClipConfig.from_dict({**found.to_dict(), "vision_mlp_ratio": config.vision_mlp_ratio}) == config


def state_of(config: ClipConfig) -> dict[str, torch.Tensor]:
    return dict(build_clip(config).state_dict())


def openai_sizes(clip_config, **changes) -> ClipConfig:
    return clip_config(vision_width=64, vision_head_width=64, text_width=64, text_heads=1, **changes)


def test_open_clip_checkpoint(clip_config, tmp_path, caplog):
    """{"state_dict": {"module. ..."}}, as open_clip's training writes; its GELU is exact unless told otherwise."""
    state = state_of(openai_sizes(clip_config))
    path = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    with caplog.at_level(logging.WARNING):
        config, clip = load_clip(path)
    assert "the exact one is assumed" in caplog.text
    assert config == openai_sizes(clip_config)
    assert all(torch.equal(tensor, state[name]) for name, tensor in clip.state_dict().items())
    caplog.clear()
    assert load_clip(path, quick_gelu=True)[0].quick_gelu
    assert not caplog.text


def test_openai_weights_are_rounded_to_half(clip_config):
    state = state_of(openai_sizes(clip_config))
    config, clip = clip_from_state_dict({**state, "input_resolution": torch.tensor(64)})
    rounded = clip.state_dict()
    assert config.quick_gelu
    for name in (
        "visual.conv1.weight",
        "visual.proj",
        "text_projection",
        "transformer.resblocks.0.attn.in_proj_weight",
    ):
        assert torch.equal(rounded[name], state[name].half().float())
        assert not torch.equal(rounded[name], state[name])
    for name in ("visual.positional_embedding", "token_embedding.weight", "visual.ln_pre.weight"):
        assert torch.equal(rounded[name], state[name])


def test_half_precision_means_openai(clip_config):
    state = {name: tensor.half() for name, tensor in state_of(openai_sizes(clip_config)).items()}
    config, clip = clip_from_state_dict(state)
    assert config.quick_gelu
    assert next(clip.parameters()).dtype == torch.float32


def test_named_weights(clip_config, monkeypatch):
    asked = {}

    def create_model(name, **kwargs):
        asked.update(kwargs, name=name)
        return build_clip(clip_config(quick_gelu=True))

    monkeypatch.setattr(open_clip, "create_model", create_model)
    config, _ = load_clip("ViT-B-16")
    assert config.quick_gelu
    assert asked["name"] == "ViT-B-16"
    assert asked["pretrained"] == "openai"
    load_clip("ViT-L-14:laion2b_s32b_b82k")
    assert asked["pretrained"] == "laion2b_s32b_b82k"


@pytest.mark.parametrize(("tag", "quick_gelu"), [("openai", True), ("laion2b_s34b_b88k", False), ("its_own_tag", True)])
def test_named_weights_get_the_gelu_they_were_trained_with(tag, quick_gelu, clip_config, monkeypatch, tmp_path):
    """open_clip itself builds and loads; only the architecture's sizes and the download are ours."""
    config = openai_sizes(clip_config)
    described = {
        "embed_dim": config.embed_dim,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 40, "width": 64, "heads": 1, "layers": 2},
    }
    path = tmp_path / "fetched.pt"
    torch.save(state_of(config), path)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-16", described)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED["ViT-B-16"], "its_own_tag", {"quick_gelu": True})
    for module, name in (("factory", "download_pretrained"), ("openai", "download_pretrained_from_url")):
        monkeypatch.setattr(f"open_clip.{module}.{name}", lambda *_, **__: str(path), raising=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="QuickGELU mismatch")
        found, clip = load_clip(f"ViT-B-16:{tag}")
    assert found.quick_gelu is quick_gelu
    assert found == replace(config, quick_gelu=quick_gelu)
    weight = clip.visual.conv1.weight
    assert torch.equal(weight, weight.half().float()) is (tag == "openai")


def test_no_network(monkeypatch):
    def create_model(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(DownloadError, match=r"no route to host.*give its path instead of the name"):
        load_clip("ViT-B-16")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RN50", "ResNet image tower; TCL needs a ViT"),
        ("ViT-B-16-SigLIP", "timm, Hugging Face or custom towers"),
        ("EVA02-B-16", "timm, Hugging Face or custom towers"),
        ("coca_ViT-B-32", "custom towers"),
        ("ViT-H-14-CLIPA", "does not pool a class token"),
        ("ViT-L-14-worldwide", "does not use CLIP's tokenizer|neither a file"),  # older open_clip does not know it
        ("xlm-roberta-base-ViT-B-32", "Hugging Face"),
        ("ViT-B-16:nonsense", "no weights 'nonsense' for ViT-B-16; choose one of ViT-B-16:openai"),
        ("ViT-B-17", "neither a file nor an open_clip model"),
    ],
)
def test_unsuitable_names_are_refused_before_a_download(name, message, monkeypatch):
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(CheckpointError, match=message):
        load_clip(name)


def test_every_published_vit_of_clips_own_kind_is_accepted(monkeypatch):
    """By config only: nothing is built or fetched."""
    accepted = set()
    monkeypatch.setattr(open_clip, "create_model", lambda name, **_: accepted.add(name))
    monkeypatch.setattr("tclkit.tcl.clip.config_from_clip", lambda _: None)
    for name in (
        "ViT-B-16",
        "ViT-B-32",
        "ViT-L-14",
        "ViT-L-14-336",
        "ViT-B-32-256",
        "ViT-H-14",
        "ViT-g-14",
        "ViT-bigG-14",
    ):
        tag = open_clip.list_pretrained_tags_by_model(name)[0]
        with pytest.raises(AttributeError, match="eval"):  # the stand-in has no eval(); all checks are past by then
            load_clip(f"{name}:{tag}")
        assert name in accepted


@pytest.mark.parametrize(
    ("vision", "text", "message"),
    [
        ({"pool_type": "avg"}, {}, "pools 'avg', not the class token"),
        ({"attentional_pool": True}, {}, "pools by attention"),
        ({"no_ln_pre": True}, {}, "no ln_pre"),
        ({"final_ln_after_pool": True}, {}, "normalises after pooling"),
        ({"image_size": (64, 32)}, {}, "not square"),
        ({}, {"no_causal_mask": True}, "not causal"),
        ({}, {"pool_type": "last"}, "end-of-text"),
        ({}, {"proj_bias": True}, "not a plain matrix"),
        ({"layers": (1, 1, 1, 1), "width": 32}, {}, "not CLIP with image tower ModifiedResNet"),
    ],
)
def test_unsuitable_towers_are_refused(vision, text, message):
    sizes = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64}
    words = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 1, "layers": 1}
    clip = CLIP(16, vision_cfg=CLIPVisionCfg(**{**sizes, **vision}), text_cfg=CLIPTextCfg(**{**words, **text}))
    with pytest.raises(CheckpointError, match=message):
        config_from_clip(clip)


def test_custom_attention_is_refused(clip_config):
    clip = build_clip(clip_config())
    clip.visual.transformer.resblocks[0].attn = torch.nn.Identity()
    with pytest.raises(CheckpointError, match="attention is a custom one"):
        config_from_clip(clip)


def test_resnet_files_are_refused(tmp_path):
    clip = CLIP(
        16,
        vision_cfg=CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, image_size=64),
        text_cfg=CLIPTextCfg(context_length=8, vocab_size=20, width=64, heads=1, layers=1),
    )
    torch.save(clip.state_dict(), tmp_path / "rn.pt")
    with pytest.raises(CheckpointError, match=r"rn\.pt is a CLIP with a ResNet image tower"):
        load_clip(tmp_path / "rn.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("visual.class_embedding"), "lacks visual.class_embedding"),
        (lambda s: s.pop("ln_final.weight"), "lacks ln_final.weight"),
        (lambda s: s.pop("ln_final.bias"), "do not fit the ViT that they describe"),
        (
            lambda s: s.update({"visual.positional_embedding": torch.zeros(16, 64)}),
            "15 patches, which is no square grid",
        ),
        (lambda s: s.update({"visual.attn_pool.query": torch.zeros(1)}), "CoCa"),
        (lambda s: s.update({"visual.trunk.x": torch.zeros(1)}), "timm or custom text towers"),
        (lambda s: s.clear(), "no CLIP with a ViT image tower"),
    ],
)
def test_incomplete_files_are_refused(change, message, clip_config):
    state = state_of(openai_sizes(clip_config))
    change(state)
    with pytest.raises(CheckpointError, match=message):
        clip_from_state_dict(state, quick_gelu=False)


def test_a_list_is_no_state_dict(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds no state dict"):
        load_clip(tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 0}, "clip.embed_dim must be a positive whole number, not 0"),
        ({"vocab_size": 3.5}, "clip.vocab_size"),
        ({"image_size": 60}, r"clip.image_size \(60\) must be a multiple of clip.patch_size \(16\)"),
        ({"vision_head_width": 20}, "vision_width"),
        ({"text_heads": 3}, "text_width"),
    ],
)
def test_impossible_sizes_are_refused(changes, message, clip_config):
    with pytest.raises(ConfigError, match=message):
        clip_config(**changes)


def test_unknown_and_missing_keys_are_refused(clip_config):
    values = clip_config().to_dict()
    with pytest.raises(ConfigError, match="unknown key 'patchsize' in clip; did you mean 'patch_size'"):
        ClipConfig.from_dict({**values, "patchsize": 8})
    del values["embed_dim"]
    with pytest.raises(ConfigError, match="clip lacks embed_dim"):
        ClipConfig.from_dict(values)


def test_the_hub_s_log_lines_are_not_shown(monkeypatch, caplog):
    def create_model(*_, **__):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        logging.error("Failed to download weights")
        raise RuntimeError("Failed to download weights.")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(DownloadError, match=r"\(Failed to download weights\)\. Fetch the file"):
        load_clip("ViT-B-16")
    assert caplog.text == ""
    assert logging.getLogger("tclkit").isEnabledFor(logging.WARNING)
