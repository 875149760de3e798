"""Looks at data to tune or judge a compiled model. Never imports torch.

Names are imported when they are asked for, so that `import tclkit.calib` costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activations import absolute_maxima, activation_ranges, float_tensor_maxima
    from .calibration_images import CalibrationProgress, CalibrationSet, ImageBatches, select_images
    from .histograms import RANGE_METHODS, RangeMethod, entropy_limit, percentile_limit
    from .metrics import confusion_from_labels, iou_from_confusion, mean_iou

__all__ = [
    "RANGE_METHODS",
    "CalibrationProgress",
    "CalibrationSet",
    "ImageBatches",
    "RangeMethod",
    "absolute_maxima",
    "activation_ranges",
    "confusion_from_labels",
    "entropy_limit",
    "float_tensor_maxima",
    "iou_from_confusion",
    "mean_iou",
    "percentile_limit",
    "select_images",
]

_HOMES = {
    "activations": ("absolute_maxima", "activation_ranges", "float_tensor_maxima"),
    "calibration_images": ("CalibrationProgress", "CalibrationSet", "ImageBatches", "select_images"),
    "histograms": ("RANGE_METHODS", "RangeMethod", "entropy_limit", "percentile_limit"),
    "metrics": ("confusion_from_labels", "iou_from_confusion", "mean_iou"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value  # the next access costs nothing
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
