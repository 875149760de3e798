"""Segmentation scores from exact pixel counts: confusion matrix, IoU per class, mIoU."""

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tclkit.runtime.errors import InputError

Counts = npt.NDArray[np.int64]


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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scores:
    """What the counts of a data set say; nan stands for a class that is neither in truth nor in prediction.

    iou: (K,) float64 in 0..1, intersection over union of each class.
    accuracy: (K,) float64 in 0..1, share of a class's pixels that were found; nan where it has none.
    pixel_accuracy: share of all pixels that were labelled right.
    miou: mean of the IoU of the classes that occur.
    mean_accuracy: mean of the accuracies that are numbers.
    """

    iou: npt.NDArray[np.float64]
    accuracy: npt.NDArray[np.float64]
    pixel_accuracy: float
    miou: float
    mean_accuracy: float

    @property
    def miou_percent(self) -> float:
        """The figure that is published: percent, rounded to two decimals; nan when nothing was counted."""
        return round(self.miou * 100, 2)


def count_pixels(
    predicted: npt.NDArray[np.integer],
    truth: npt.NDArray[np.integer],
    classes: int,
    *,
    ignore: int = 255,
    reduce_zero_label: bool = False,
) -> Counts:
    """Count the pixels of one image as mmsegmentation does, labels that name no class included.

    Args:
        predicted: (H, W) integers in 0..K-1.
        truth: (H, W) integers as the label file holds them.
        classes: number of classes K.
        ignore: pixels whose truth has this value do not count.
        reduce_zero_label: truth 0 does not count either, and 1 is class 0.

    Returns:
        (K + 1, K) int64; row = truth, column = prediction. The last row holds pixels whose truth is no class and is not
        ignored: they count for nobody, but against the class that was predicted there.

    Raises:
        InputError: shapes differ, or a prediction is outside 0..K-1.

    Source: mmsegmentation 0.27, `intersect_and_union`.
    """
    if predicted.shape != truth.shape:
        raise InputError(
            f"prediction is {predicted.shape} but truth is {truth.shape}; resize the prediction to the truth"
        )
    rows = truth.astype(np.int64)
    counted = rows != ignore
    if reduce_zero_label:
        counted &= rows != 0
        rows -= 1
    rows, columns = rows[counted], predicted[counted].astype(np.int64)
    if columns.size and not 0 <= columns.min() <= columns.max() < classes:
        raise InputError(f"prediction holds labels {columns.min()}..{columns.max()}; expected 0..{classes - 1}")
    rows[(rows < 0) | (rows >= classes)] = classes
    return np.bincount(rows * classes + columns, minlength=(classes + 1) * classes).reshape(classes + 1, classes)


def scores_from_counts(counts: Counts) -> Scores:
    """Turn the (K + 1, K) counts of `count_pixels`, of one image or summed over many, into scores."""
    hits = np.diagonal(counts).astype(np.float64)
    of_class, as_class = counts[:-1].sum(1), counts.sum(0)
    iou = _ratio(hits, of_class + as_class - hits)
    accuracy = _ratio(hits, of_class.astype(np.float64))
    pixels = int(of_class.sum())
    return Scores(
        iou=iou,
        accuracy=accuracy,
        pixel_accuracy=float(hits.sum() / pixels) if pixels else float("nan"),
        miou=_mean_of_numbers(iou),
        mean_accuracy=_mean_of_numbers(accuracy),
    )


def figure_or_none(value: float) -> float | None:
    """A figure as results.json holds it: six decimals, None for nan."""
    return None if np.isnan(value) else round(float(value), 6)


def _ratio(part: npt.NDArray[np.float64], whole: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    ratio: npt.NDArray[np.float64] = np.full_like(part, np.nan)
    np.divide(part, whole, out=ratio, where=whole > 0)
    return ratio


def _mean_of_numbers(values: npt.NDArray[np.float64]) -> float:
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if numbers.size else float("nan")
