"""Looks at data to tune or judge a compiled model. Never imports torch."""

from .benchmarks import Benchmark, benchmark_named, published_benchmarks
from .datasets import Dataset, Example, FolderDataset, missing_parts, open_benchmark, open_own_data
from .evaluation import Evaluation, EvaluationSettings, ViewResult, evaluate
from .metrics import Scores, confusion_from_labels, count_pixels, iou_from_confusion, mean_iou, scores_from_counts
from .prepare import Prepared, prepare_labels

__all__ = [
    "Benchmark",
    "Dataset",
    "Evaluation",
    "EvaluationSettings",
    "Example",
    "FolderDataset",
    "Prepared",
    "Scores",
    "ViewResult",
    "benchmark_named",
    "confusion_from_labels",
    "count_pixels",
    "evaluate",
    "iou_from_confusion",
    "mean_iou",
    "missing_parts",
    "open_benchmark",
    "open_own_data",
    "prepare_labels",
    "published_benchmarks",
    "scores_from_counts",
]
