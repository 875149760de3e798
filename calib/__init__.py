"""Looks at data to tune or judge a compiled model. Never imports torch."""

from .metrics import confusion_from_labels, iou_from_confusion, mean_iou

__all__ = ["confusion_from_labels", "iou_from_confusion", "mean_iou"]
