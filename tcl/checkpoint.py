"""Checkpoints: ours, written whole and read without running code; and the authors', read the same way."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor

from tclkit.runtime.errors import CheckpointError
from tclkit.runtime.files import atomic_file

from ._torch_archive import DAMAGE, Inert, archive_root, is_torchscript, plain_from_inert, read_archive, require_whole
from .clip import ClipConfig, config_from_clip, load_clip
from .model import TCL, TCLConfig
from .official import clip_from_official, is_official, model_from_official

_FORMAT = "tclkit"
_FORMAT_VERSION = 1
_PLAIN = (str, int, float, bool, bytes, type(None), Tensor)


def save_checkpoint(path: str | Path, model: TCL, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write a model to one file that is never half written.

    Args:
        path: where; an older file there is replaced once the new one is complete.
        model: its config and every tensor are kept, CLIP included.
        extra: what else to keep: tensors, plain Python values, and dicts and lists of those.

    Raises:
        CheckpointError: `extra` holds anything else, or the file could not be written.
    """
    extra = dict(extra or {})
    _require_plain(extra, "extra")
    content = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "config": model.config.to_dict(),
        "model": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        "extra": extra,
    }
    try:
        with atomic_file(path) as temporary, temporary.open("wb") as stream:
            torch.save(content, stream)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"could not write {path}: {error}", path=str(path)) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, ours or the authors', to the CPU. No code that a file may contain is run.

    Returns:
        format: "tclkit" or "official"; model: name -> tensor; config: plain values (empty when the file has none);
        extra: what `save_checkpoint` was given, or the authors' step and metrics.

    Raises:
        CheckpointError: missing, damaged, written by a later tclkit, or no TCL checkpoint.
    """
    path = Path(path)
    content = _read(path)
    if content.get("format") == _FORMAT:
        return _checked_own(content, path)
    state = content.get("model", content)
    if isinstance(state, Mapping) and is_official(state):
        model = {name: tensor for name, tensor in state.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
        extra = {key: plain_from_inert(content[key]) for key in ("step", "metrics") if key in content}
        config = plain_from_inert(content.get("config"))
        return {
            "format": "official",
            "model": model,
            "config": config if isinstance(config, dict) else {},
            "extra": extra,
        }
    raise CheckpointError(
        f"{path} is no TCL checkpoint: it has no grounder. A CLIP file goes to --clip, beside a TCL checkpoint.",
        path=str(path),
    )


def load_model(checkpoint: str | Path | Mapping[str, Any], *, clip: str | Path | CLIP | None = None) -> TCL:
    """Build a TCL model with its weights: fp32, eval mode, on the CPU.

    Args:
        checkpoint: file of ours; or the authors' tcl.pth, with learned parameters only or from full training; or what
            `load_checkpoint` returned.
        clip: CLIP for a checkpoint that holds none: a file or name for `load_clip`, or a built model, which becomes
            part of the result. For a checkpoint that holds its own, leave it out; a different one is refused.

    Raises:
        CheckpointError: see `load_checkpoint`, `load_clip`; or CLIP is missing or is not the one trained with.
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else load_checkpoint(checkpoint)
    if content["format"] == _FORMAT:
        return _load_own(content, clip)
    given = None if clip is None else _given_clip(clip)
    own = clip_from_official(content["model"])
    if own is None and given is None:
        raise CheckpointError(
            "this checkpoint holds the learned parameters only; name the CLIP that it was trained with: for the"
            ' published tcl.pth clip="ViT-B-16" (fetched through open_clip), or the path of OpenAI\'s ViT-B-16.pt.'
        )
    if own is not None and given is not None:
        _require_equal_clip(own[1], given[1])
    clip_config, clip_model = own or given  # type: ignore[misc]
    return model_from_official(content["model"], content["config"], clip_model, clip_config)


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        why = f"{path} is a folder; give the checkpoint file in it." if path.is_dir() else f"there is no file {path}."
        raise CheckpointError(why, path=str(path))
    if archive_root(path) is None:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) was not written by torch.save, or it is cut short; fetch it again.",
            path=str(path),
        )
    if is_torchscript(path):
        raise CheckpointError(
            f"{path} is a TorchScript archive, as OpenAI ships CLIP; give it as --clip.", path=str(path)
        )
    try:
        require_whole(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        content = read_archive(path)  # the authors' config and metrics are no plain data
    except DAMAGE as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch it again.", path=str(path)) from error
    if not isinstance(content, Mapping):
        kind = content.name if isinstance(content, Inert) else type(content).__name__
        raise CheckpointError(f"{path} holds a {kind}, not the state dict of a TCL model.", path=str(path))
    return content


def _checked_own(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    version = content.get("format_version")
    if version != _FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version!r}, this tclkit reads {_FORMAT_VERSION}; update tclkit.",
            path=str(path),
        )
    missing = [key for key in ("config", "model", "extra") if not isinstance(content.get(key), Mapping)]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; it is damaged.", path=str(path))
    return dict(content)


def _load_own(content: Mapping[str, Any], clip: str | Path | CLIP | None) -> TCL:
    model = TCL(TCLConfig.from_dict(content["config"]))
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint's tensors do not fit its own config: {error}") from error
    if clip is not None:
        _require_equal_clip(model.clip, _given_clip(clip)[1])
    return model


def _given_clip(clip: str | Path | CLIP) -> tuple[ClipConfig, CLIP]:
    if isinstance(clip, (str, Path)):
        return load_clip(clip)
    return config_from_clip(clip), clip


def _require_equal_clip(own: CLIP, given: CLIP) -> None:
    wanted, found = own.state_dict(), given.state_dict()
    ignored = {"logit_scale"}  # not used by TCL, and not kept by the authors
    same = wanted.keys() == found.keys() and all(
        torch.equal(wanted[name], found[name].float()) for name in wanted.keys() - ignored
    )
    if not same:
        raise CheckpointError("the checkpoint holds its own CLIP, and clip= is a different one; leave clip= out.")


def _require_plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _require_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _require_plain(item, f"{where}[{index}]")
    elif type(value) not in _PLAIN:
        raise CheckpointError(f"{where} is a {type(value).__name__}; a checkpoint keeps tensors and plain values only.")
