"""The PyTorch side: the TCL model, its losses and data, training, checkpoints.

Names are imported when they are asked for, so that `tclkit.tcl.world` can be used without torch.
"""

from typing import TYPE_CHECKING

from tclkit.runtime.lazy_names import lazy_names

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
    "model": ("TCL", "TCLConfig", "ImageFeatures"),
    "clip": ("ClipConfig", "build_clip", "load_clip"),
    "losses": ("LossWeights",),
    "checkpoint": ("load_checkpoint", "load_model", "save_checkpoint"),
    "torch_backend": ("TorchBackend", "open_torch_backend", "random_torch_contender", "torch_contender"),
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
