"""Looks at data to tune or judge a compiled model. Never imports torch."""

from .benchmarks import Benchmark, benchmark_named, benchmarks
from .metrics import Scores, confusion_from_labels, count_pixels, iou_from_confusion, mean_iou, scores_from_counts

__all__ = [
    "Benchmark",
    "Scores",
    "benchmark_named",
    "benchmarks",
    "confusion_from_labels",
    "count_pixels",
    "iou_from_confusion",
    "mean_iou",
    "scores_from_counts",
]
