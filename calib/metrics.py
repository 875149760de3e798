"""Segmentation scores from exact pixel counts: confusion matrix, IoU per class, mIoU."""

import warnings

import numpy as np
import numpy.typing as npt

from tclkit.runtime.errors import InputError

Counts = npt.NDArray[np.int64]


def confusion_from_labels(
    predicted: npt.NDArray[np.integer], truth: npt.NDArray[np.integer], classes: int, *, ignore: int | None = None
) -> Counts:
    """Count pixels by true and predicted class.

    Args:
        predicted, truth: integer arrays of one shape, values in 0..classes-1.
        classes: number of classes K.
        ignore: pixels whose truth has this value are left out.

    Returns:
        (K, K) int64; row = truth, column = prediction. Sums over images are again confusion matrices.

    Raises:
        InputError: shapes differ, or a value is outside 0..classes-1.
    """
    if predicted.shape != truth.shape:
        raise InputError(
            f"prediction is {predicted.shape} but truth is {truth.shape}; resize the prediction to the truth"
        )
    kept = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    rows, columns = truth[kept].astype(np.int64), predicted[kept].astype(np.int64)
    for name, values in (("truth", rows), ("prediction", columns)):
        if values.size and not 0 <= values.min() <= values.max() < classes:
            raise InputError(f"{name} holds labels {values.min()}..{values.max()}; expected 0..{classes - 1}")
    return np.bincount(rows * classes + columns, minlength=classes * classes).reshape(classes, classes)


def iou_from_confusion(confusion: Counts) -> npt.NDArray[np.float64]:
    """Intersection over union per class, in 0..1.

    Args:
        confusion: (..., K, K), row = truth, column = prediction.

    Returns:
        (..., K) float64; nan for a class that is neither in truth nor in prediction.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).astype(np.float64)
    union = confusion.sum(-1) + confusion.sum(-2) - hits
    iou: npt.NDArray[np.float64] = np.full_like(hits, np.nan)
    np.divide(hits, union, out=iou, where=union > 0)
    return iou


def mean_iou(confusion: Counts) -> npt.NDArray[np.float64]:
    """Mean of the IoU of all classes that occur, in 0..1; (..., K, K) -> (...)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)  # no class at all: nan is the answer
        return np.asarray(np.nanmean(iou_from_confusion(confusion), axis=-1))
