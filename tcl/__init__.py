"""The PyTorch side: the TCL model, its losses and data, training, checkpoints.

Names are imported when they are asked for, so that `tclkit.tcl.world` can be used without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_checkpoint, load_model, save_checkpoint
    from .clip import ClipConfig, build_clip, load_clip
    from .losses import LossWeights
    from .model import TCL, ImageFeatures, TCLConfig
    from .torch_backend import TorchBackend, open_torch_backend, random_torch_contender, torch_contender

__all__ = [
    "TCL",
    "ClipConfig",
    "ImageFeatures",
    "LossWeights",
    "TCLConfig",
    "TorchBackend",
    "build_clip",
    "load_checkpoint",
    "load_clip",
    "load_model",
    "open_torch_backend",
    "random_torch_contender",
    "save_checkpoint",
    "torch_contender",
]

_HOMES = {
    "TCL": "model",
    "TCLConfig": "model",
    "ImageFeatures": "model",
    "ClipConfig": "clip",
    "build_clip": "clip",
    "load_clip": "clip",
    "LossWeights": "losses",
    "load_checkpoint": "checkpoint",
    "load_model": "checkpoint",
    "save_checkpoint": "checkpoint",
    "TorchBackend": "torch_backend",
    "open_torch_backend": "torch_backend",
    "random_torch_contender": "torch_backend",
    "torch_contender": "torch_backend",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
