"""The authors' checkpoints: their names for our tensors, and what their config must say.

Source: kakaobrain/tcl, models/tcl.py and models/masks.py.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor

from tclkit.runtime.errors import CheckpointError

from .clip import ClipConfig, clip_from_state_dict
from .model import TCL, TCLConfig

_BLOCK = re.compile(r"masker\.image_encoder\.backbone\.transformer\.resblocks\.(\d+)\.(.+)")
_DECODER = re.compile(r"masker\.image_encoder\.decoder\.decoder\.net\.(\d+)\.conv(2?)\.(.+)")
_PROJECTION = "masker.image_encoder.decoder.image_proj."
_OTHER = {
    "masker.sim2mask.w": "grounder.mask.scale",
    "masker.sim2mask.b": "grounder.mask.shift",
    "tcli_loss.logit_scale": "logit_scales.image",
    "tclf_loss.logit_scale": "logit_scales.feature",
}
_OPTIONAL = {"logit_scales.image", "logit_scales.feature"}  # only training asks for them
_CLIP_PREFIXES = (
    ("clip_image_encoder.clip_proj.proj", "visual.proj"),
    ("clip_image_encoder.clip_proj.ln.", "visual.ln_post."),
    ("clip_image_encoder.clip_visual.", "visual."),
    ("clip_text_encoder.", ""),
)
_OPENAI_LOGIT_SCALE = math.log(100)  # of every CLIP that OpenAI published; the authors do not keep it
_RECIPE = {
    ("ie_ignore_last_attn",): True,
    ("masker", "decoder", "double"): True,
    ("masker", "decoder", "kernel_size"): 3,
    ("masker", "decoder", "act"): "gelu",
    ("masker", "decoder", "norm"): "ln",
}


def is_official(state: Mapping[str, Any]) -> bool:
    """Whether a state dict has the authors' names."""
    return any(isinstance(name, str) and name.startswith("masker.") for name in state)


def our_name(official_name: str) -> str | None:
    """Our name of one of the authors' learned tensors; None for what belongs to CLIP or is unknown."""
    if match := _BLOCK.fullmatch(official_name):
        return f"grounder.block.{match[2]}"
    if match := _DECODER.fullmatch(official_name):
        return f"grounder.decoder.{match[1]}.conv{match[2] or '1'}.{match[3]}"
    if official_name.startswith(_PROJECTION):
        return f"grounder.projection.{official_name.removeprefix(_PROJECTION)}"
    return _OTHER.get(official_name)


def clip_name(official_name: str) -> str | None:
    """Name in CLIP's state dict of one of the authors' frozen tensors; None for all others."""
    for prefix, ours in _CLIP_PREFIXES:
        if official_name.startswith(prefix):
            return ours + official_name.removeprefix(prefix)
    return None


def clip_from_official(state: Mapping[str, Tensor]) -> tuple[ClipConfig, CLIP] | None:
    """Build the CLIP that a full training checkpoint holds; None when it holds the learned parameters only.

    Raises:
        CheckpointError: some of CLIP's tensors are missing.
    """
    tensors = {ours: tensor for name, tensor in state.items() if (ours := clip_name(name)) is not None}
    if not tensors:
        return None
    tensors.setdefault("logit_scale", torch.tensor(_OPENAI_LOGIT_SCALE))
    return clip_from_state_dict(tensors, quick_gelu=True, where="the authors' checkpoint")


def model_from_official(
    state: Mapping[str, Tensor], config: Mapping[str, Any], clip: CLIP, clip_config: ClipConfig
) -> TCL:
    """Build our model around `clip` with the authors' learned tensors.

    Args:
        state: the authors' names -> tensors.
        config: their config as plain values; empty when the checkpoint has none.
        clip: CLIP with its weights.
        clip_config: its sizes.

    Raises:
        CheckpointError: trained by another recipe or with another CLIP, or tensors are missing, unknown or do not fit.
    """
    _require_recipe(config.get("model"))
    learned = _learned_tensors(state, clip_config)
    blocks = {name.split(".")[2] for name in learned if name.startswith("grounder.decoder.")}
    kp_w = _lookup(config, ("evaluate", "kp_w"), default=0.3)
    model = TCL(TCLConfig(clip=clip_config, decoder_blocks=max(1, len(blocks)), kp_w=float(kp_w)), clip)
    try:
        result = model.load_state_dict(learned, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's tensors do not fit this CLIP; was it another one? {error}") from error
    missing = [name for name in result.missing_keys if not name.startswith("clip.") and name not in _OPTIONAL]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"the authors' checkpoint is not as expected: missing {missing or 'nothing'}, "
            f"unknown {result.unexpected_keys or 'nothing'}.",
            missing=missing,
            unknown=list(result.unexpected_keys),
        )
    return model


def _learned_tensors(state: Mapping[str, Tensor], clip_config: ClipConfig) -> dict[str, Tensor]:
    learned: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = our_name(name)
        if ours is None and clip_name(name) is None:
            raise CheckpointError(f"unknown tensor {name!r}: this is not a TCL checkpoint of the authors.", name=name)
        match = _BLOCK.fullmatch(name)
        if match and int(match[1]) != clip_config.vision_layers - 1:
            raise CheckpointError(
                f"the checkpoint's grounder copies block {match[1]}, but this CLIP's last is "
                f"{clip_config.vision_layers - 1}; give the CLIP that it was trained with.",
            )
        if ours is not None:
            learned[ours] = tensor
    return learned


def _require_recipe(model_config: Any) -> None:
    """Refuse variants whose tensors look the same but are used otherwise."""
    for path, expected in _RECIPE.items():
        found = _lookup(model_config, path, default=expected)
        if found != expected:
            where = ".".join(("model", *path))
            raise CheckpointError(f"trained with {where} = {found!r}; only {expected!r} is supported.", key=where)


def _lookup(config: Any, path: tuple[str, ...], default: Any) -> Any:
    for key in path:
        if not isinstance(config, Mapping) or key not in config:
            return default
        config = config[key]
    return config
