"""CLIP: open_clip's ViT towers, built from a config or read from the files that OpenAI and open_clip publish.

Source: CLIP (Radford et al., ICML 2021); the towers are open_clip's `model.CLIP`.
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transformer import LayerScale, QuickGELU, VisionTransformer
from torch import nn

from tclkit.runtime.errors import CheckpointError, ConfigError, DownloadError

from ._strict import dataclass_from_dict
from ._torch_archive import is_torchscript, read_archive, state_dict_from_modules

_OPENAI_HEAD_WIDTH = 64  # every CLIP that OpenAI published
_TORCHSCRIPT_MARK = "is_torchscript"  # ours, for files in the form that only OpenAI ships
_OPENAI_MARKS = ("input_resolution", "context_length", "vocab_size", _TORCHSCRIPT_MARK)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """Sizes of one CLIP with a ViT image tower that has a class token.

    embed_dim: width of the shared image-text space.
    image_size: pixels a side of the square images that CLIP was trained on.
    patch_size: pixels a side of one patch.
    vision_width, vision_layers, vision_head_width: the image tower.
    context_length: tokens a prompt may have, both special ones counted.
    vocab_size: number of tokens.
    text_width, text_heads, text_layers: the text tower.
    quick_gelu: whether both towers use x·sigmoid(1.702x), as OpenAI's do, instead of the exact GELU.
    vision_mlp_ratio: hidden width of the image tower's MLPs over its width.
    vision_layer_scale: initial value of the image tower's layer scales; None when it has none.
    """

    embed_dim: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_head_width: int = 64
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int
    text_heads: int
    text_layers: int
    quick_gelu: bool
    vision_mlp_ratio: float = 4.0
    vision_layer_scale: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and (type(value) is not int or value < 1):
                raise ConfigError(f"clip.{field.name} must be a positive whole number, not {value!r}.", key=field.name)
        _require_multiple("image_size", self.image_size, "patch_size", self.patch_size)
        _require_multiple("vision_width", self.vision_width, "vision_head_width", self.vision_head_width)
        _require_multiple("text_width", self.text_width, "text_heads", self.text_heads)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ClipConfig":
        """Build from `to_dict`'s result; unknown or missing keys raise ConfigError."""
        return dataclass_from_dict(cls, values, "clip")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, one entry a field."""
        return dataclasses.asdict(self)


def _require_multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value % divisor:
        raise ConfigError(f"clip.{name} ({value}) must be a multiple of clip.{divisor_name} ({divisor}).", key=name)


def build_clip(config: ClipConfig) -> CLIP:
    """Build open_clip's CLIP with fresh random weights: fp32, on the CPU, in eval mode."""
    vision = CLIPVisionCfg(
        layers=config.vision_layers,
        width=config.vision_width,
        head_width=config.vision_head_width,
        mlp_ratio=config.vision_mlp_ratio,
        ls_init_value=config.vision_layer_scale,
        patch_size=config.patch_size,
        image_size=config.image_size,
    )
    text = CLIPTextCfg(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.text_width,
        heads=config.text_heads,
        layers=config.text_layers,
    )
    return CLIP(config.embed_dim, vision_cfg=vision, text_cfg=text, quick_gelu=config.quick_gelu).eval()


def load_clip(source: str | Path, *, quick_gelu: bool | None = None) -> tuple[ClipConfig, CLIP]:
    """Load a CLIP from a file or by its open_clip name.

    Args:
        source: a state dict file, a TorchScript archive (its tensors are read, its code is not run), or an open_clip
            name such as "ViT-B-16" (OpenAI's weights) or "ViT-B-16:laion2b_s34b_b88k".
        quick_gelu: which GELU the weights of a *file* were trained with, which no file says; open_clip knows it of its
            names. None: QuickGELU for OpenAI's weights (a TorchScript archive, an entry such as input_resolution, or
            half precision), else the exact GELU, which is announced as a warning in the log.

    Returns:
        The config, and the model in fp32, eval mode, on the CPU. OpenAI's weights are rounded to fp16 first, as in the
        authors' code; a no-op on the files OpenAI ships.

    Raises:
        CheckpointError: the file is missing, damaged, or no CLIP with a ViT image tower that has a class token.
        DownloadError: open_clip could not fetch the named weights.
    """
    require_clip(source)
    path = Path(source)
    if path.is_file():
        return clip_from_state_dict(_read_state_dict(path), quick_gelu=quick_gelu, where=str(path))
    name, _, tag = str(source).partition(":")
    return _load_named(name, tag or "openai")


def require_clip(source: str | Path) -> None:
    """Refuse what `load_clip` could not load whatever is in it, without loading anything.

    Raises:
        CheckpointError: neither a file nor the name of an open_clip model.
    """
    if not Path(source).is_file() and str(source).partition(":")[0] not in open_clip.list_models():
        raise CheckpointError(
            f"{source!r} is neither a file nor an open_clip model. Give an OpenAI CLIP file (a .pt with a ViT), "
            f"or a name such as ViT-B-16.",
            source=str(source),
        )


def clip_from_state_dict(
    state: Mapping[str, Any], *, quick_gelu: bool | None = None, where: str = "this state dict"
) -> tuple[ClipConfig, CLIP]:
    """Build a CLIP from tensors under OpenAI's names (open_clip's own names are the same).

    Args:
        state: name -> tensor. A training checkpoint's {"state_dict": ...} and a "module." prefix are unwrapped.
        quick_gelu: as in `load_clip`.
        where: what the tensors came from, for messages.

    Raises:
        CheckpointError: a ResNet, a tower without a class token, or tensors that are missing or do not fit.
    """
    tensors = _unwrap(state)
    _require_vit(tensors, where)
    is_openai = _is_openai(tensors)
    if quick_gelu is None:
        quick_gelu = is_openai
        if not is_openai:
            _LOG.warning(
                "%s does not say which GELU it was trained with; the exact one is assumed (quick_gelu=False)", where
            )
    config = _config_from_tensors(tensors, quick_gelu, where)
    clip = build_clip(config)
    weights = {name: tensor.float() for name, tensor in tensors.items() if name not in _OPENAI_MARKS}
    try:
        clip.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights of {where} do not fit the ViT that they describe: {error}") from error
    if is_openai:
        round_to_half(clip)
    return config, clip


def config_from_clip(clip: nn.Module) -> ClipConfig:
    """Read the config off a built CLIP.

    Raises:
        CheckpointError: the model is not an open_clip CLIP with a ViT image tower that pools its class token, or its
            text tower is not CLIP's causal one.
    """
    return _config_from_towers(_require_supported(clip))


def _config_from_towers(clip: Any) -> ClipConfig:
    visual, block = clip.visual, clip.visual.transformer.resblocks[0]
    scale = block.ls_1.gamma if isinstance(block.ls_1, LayerScale) else None
    return ClipConfig(
        embed_dim=int(visual.proj.shape[1]),
        image_size=int(visual.image_size[0]),
        patch_size=int(visual.patch_size[0]),
        vision_width=int(visual.conv1.out_channels),
        vision_layers=len(visual.transformer.resblocks),
        vision_head_width=int(block.attn.head_dim),
        context_length=int(clip.context_length),
        vocab_size=int(clip.vocab_size),
        text_width=int(clip.ln_final.weight.shape[0]),
        text_heads=int(clip.transformer.resblocks[0].attn.num_heads),
        text_layers=len(clip.transformer.resblocks),
        quick_gelu=isinstance(block.mlp.gelu, QuickGELU),
        vision_mlp_ratio=block.mlp.c_fc.out_features / visual.conv1.out_channels,
        vision_layer_scale=None if scale is None else scale[0].item(),
    )


@torch.no_grad()
def round_to_half(clip: CLIP) -> None:
    """Round in place what OpenAI stores in half precision: convolutions, linear layers, attention and both projections.

    Source: clip/model.py `convert_weights`, which the authors' loader runs before going back to fp32.
    """
    for module in clip.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            parameters = [module.weight, module.bias]
        elif isinstance(module, nn.MultiheadAttention):
            parameters = [module.in_proj_weight, module.in_proj_bias]
        else:
            continue
        for parameter in parameters:
            if parameter is not None:
                parameter.copy_(parameter.half())
    clip.visual.proj.copy_(clip.visual.proj.half())
    clip.text_projection.copy_(clip.text_projection.half())


def _read_state_dict(path: Path) -> Mapping[str, Any]:
    content = read_archive(path)
    if is_torchscript(path):
        content = {_TORCHSCRIPT_MARK: torch.tensor(True), **state_dict_from_modules(content)}
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds no state dict; give OpenAI's CLIP file, or an open_clip checkpoint.")
    return content


def _unwrap(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    inner = state.get("state_dict")
    state = inner if isinstance(inner, Mapping) else state
    tensors = {
        name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, torch.Tensor)
    }
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _is_openai(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(mark in tensors for mark in _OPENAI_MARKS) or tensors["visual.proj"].dtype == torch.float16


def _config_from_tensors(tensors: Mapping[str, torch.Tensor], quick_gelu: bool, where: str) -> ClipConfig:
    width, _, patch_size, _ = tensors["visual.conv1.weight"].shape
    patches = tensors["visual.positional_embedding"].shape[0] - 1
    grid = round(patches**0.5)
    if grid * grid != patches:
        raise CheckpointError(f"{where} has position embeddings for {patches} patches, which is no square grid.")
    text_width = tensors["ln_final.weight"].shape[0]
    return ClipConfig(
        embed_dim=tensors["text_projection"].shape[1],
        image_size=grid * patch_size,
        patch_size=patch_size,
        vision_width=width,
        vision_layers=_count_blocks(tensors, "visual.transformer.resblocks."),
        vision_head_width=min(_OPENAI_HEAD_WIDTH, width),
        context_length=tensors["positional_embedding"].shape[0],
        vocab_size=tensors["token_embedding.weight"].shape[0],
        text_width=text_width,
        text_heads=max(1, text_width // _OPENAI_HEAD_WIDTH),
        text_layers=_count_blocks(tensors, "transformer.resblocks."),
        quick_gelu=quick_gelu,
        vision_mlp_ratio=tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
        vision_layer_scale=1e-5 if "visual.transformer.resblocks.0.ls_1.gamma" in tensors else None,
    )


def _count_blocks(tensors: Mapping[str, torch.Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def _require_vit(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    if "visual.layer1.0.conv1.weight" in tensors:
        raise CheckpointError(f"{where} is a CLIP with a ResNet image tower; TCL needs a ViT, for example ViT-B-16.")
    if any(name.startswith(("visual.trunk.", "text.")) for name in tensors):
        raise CheckpointError(f"{where} has timm or custom text towers; TCL needs CLIP's own, for example ViT-B-16.")
    needed = (
        "visual.class_embedding",
        "visual.conv1.weight",
        "visual.positional_embedding",
        "visual.ln_pre.weight",
        "visual.ln_post.weight",
        "visual.proj",
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
        "positional_embedding",
        "token_embedding.weight",
        "ln_final.weight",
        "text_projection",
    )
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{where} is no CLIP with a ViT image tower: it lacks {', '.join(missing)}. Give OpenAI's ViT-B-16.pt, "
            "or an open_clip name such as ViT-B-16.",
            missing=missing,
        )
    if "visual.attn_pool.query" in tensors:
        raise CheckpointError(f"{where} pools patches by attention (CoCa); TCL needs a class token, as in ViT-B-16.")


def _require_supported(clip: nn.Module) -> CLIP:
    visual = getattr(clip, "visual", None)
    if not isinstance(clip, CLIP) or not isinstance(visual, VisionTransformer):
        towers = f"{type(clip).__name__} with image tower {type(visual).__name__}"
        raise CheckpointError(f"TCL needs open_clip's CLIP with a VisionTransformer, not {towers}; ViT-B-16 works.")
    faults = [message for message, wrong in _unsupported(clip) if wrong]
    if faults:
        raise CheckpointError(f"this CLIP cannot carry TCL: {'; '.join(faults)}. ViT-B-16 works.", faults=faults)
    return clip


def _unsupported(clip: CLIP) -> list[tuple[str, bool]]:
    visual = clip.visual
    blocks = [*visual.transformer.resblocks, *clip.transformer.resblocks]
    pool = getattr(visual, "pool_type", None) or ("avg" if getattr(visual, "global_average_pool", False) else "tok")
    return [
        ("its image tower pools by attention (CoCa)", getattr(visual, "attn_pool", None) is not None),
        (f"its image tower pools {pool!r}, not the class token", pool != "tok"),
        ("its image tower normalises after pooling", bool(getattr(visual, "final_ln_after_pool", False))),
        ("its image tower has no ln_pre", isinstance(visual.ln_pre, nn.Identity)),
        ("its image tower has no projection", getattr(visual, "proj", None) is None),
        ("its images are not square", visual.image_size[0] != visual.image_size[1]),
        ("its patches are not square", visual.patch_size[0] != visual.patch_size[1]),
        ("its attention is a custom one", any(not isinstance(block.attn, nn.MultiheadAttention) for block in blocks)),
        ("its text tower is not causal", getattr(clip, "attn_mask", None) is None),
        ("its text tower does not pool the end-of-text token", getattr(clip, "text_pool_type", "argmax") != "argmax"),
        ("its text projection is not a plain matrix", not isinstance(clip.text_projection, nn.Parameter)),
    ]


def _load_named(name: str, tag: str) -> tuple[ClipConfig, CLIP]:
    _require_named_vit(name)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        choice = (
            f"choose one of {', '.join(f'{name}:{known}' for known in tags)}" if tags else "it has no published weights"
        )
        raise CheckpointError(f"open_clip has no weights {tag!r} for {name}; {choice}.", name=name, tag=tag)
    is_openai = tag == "openai"
    # Since 3.0 open_clip builds the named architecture as it stands and only warns when the weights' GELU is another;
    # before, OpenAI's weights decided it themselves, and this table said nothing about the others.
    quick_gelu = is_openai or bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # a screenful of the hub's retries, which end in the one exception
    try:
        clip = open_clip.create_model(name, pretrained=tag, precision="fp32", device="cpu", force_quick_gelu=quick_gelu)
    except (OSError, RuntimeError) as error:
        why = str(error).rstrip(".")
        raise DownloadError(
            f"open_clip could not load {name}:{tag} ({why}). Fetch the file on a machine with network, "
            "and give its path instead of the name.",
            name=name,
            tag=tag,
        ) from error
    finally:
        logging.disable(before)
    config = config_from_clip(clip)
    clip.eval()
    if is_openai:
        round_to_half(clip)
    return config, clip


def _require_named_vit(name: str) -> None:
    """Refuse an unsuitable architecture by its config, before hundreds of megabytes are fetched."""
    described = open_clip.get_model_config(name) or {}
    vision, text = described.get("vision_cfg", {}), described.get("text_cfg", {})
    if isinstance(vision.get("layers"), (list, tuple)):
        raise CheckpointError(f"{name} is a CLIP with a ResNet image tower; TCL needs a ViT, for example ViT-B-16.")
    if "timm_model_name" in vision or "hf_model_name" in text or described.get("custom_text"):
        raise CheckpointError(f"{name} has timm, Hugging Face or custom towers; TCL needs CLIP's own, as in ViT-B-16.")
    if vision.get("pool_type", "tok") != "tok" or vision.get("attentional_pool") or vision.get("no_ln_pre"):
        raise CheckpointError(f"{name} does not pool a class token; TCL needs one, as in ViT-B-16.")
    if "hf_tokenizer_name" in text or text.get("pool_type", "argmax") != "argmax":
        raise CheckpointError(f"{name} does not use CLIP's tokenizer; TCL needs it, as in ViT-B-16.")
