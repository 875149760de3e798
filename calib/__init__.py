"""Looks at data to tune or judge a compiled model. Never imports torch.

Names are imported when they are asked for, so that `import tclkit.calib` costs next to nothing.
"""

from typing import TYPE_CHECKING

from tclkit.runtime.lazy_names import lazy_names

if TYPE_CHECKING:
    from .activations import absolute_maxima, activation_ranges, float_tensor_maxima
    from .bench import BenchSettings, run_bench
    from .bench_chart import draw_chart
    from .bench_results import BenchResult, BenchRow, ContenderReport, Spread
    from .benchmarks import Benchmark, benchmark_named, published_benchmarks
    from .calibration_images import CalibrationProgress, CalibrationSet, ImageBatches, select_images
    from .datasets import Dataset, Example, FolderDataset, missing_parts, open_benchmark, open_own_data
    from .evaluation import Contender, Evaluation, EvaluationSettings, Share, ViewResult, evaluate
    from .gallery import Extremes, find_extremes
    from .histograms import RANGE_METHODS, RangeMethod, entropy_limit, mse_limit, percentile_limit
    from .metrics import Scores, count_pixels, iou_from_confusion, mean_iou, scores_from_counts
    from .pictures import GalleryItem, draw_confusion, draw_gallery
    from .prepare import Prepared, prepare_labels

__all__ = [
    "RANGE_METHODS",
    "BenchResult",
    "BenchRow",
    "BenchSettings",
    "Benchmark",
    "CalibrationProgress",
    "CalibrationSet",
    "Contender",
    "ContenderReport",
    "Dataset",
    "Evaluation",
    "EvaluationSettings",
    "Example",
    "Extremes",
    "FolderDataset",
    "GalleryItem",
    "ImageBatches",
    "Prepared",
    "RangeMethod",
    "Scores",
    "Share",
    "Spread",
    "ViewResult",
    "absolute_maxima",
    "activation_ranges",
    "benchmark_named",
    "count_pixels",
    "draw_chart",
    "draw_confusion",
    "draw_gallery",
    "entropy_limit",
    "evaluate",
    "find_extremes",
    "float_tensor_maxima",
    "iou_from_confusion",
    "mean_iou",
    "missing_parts",
    "mse_limit",
    "open_benchmark",
    "open_own_data",
    "percentile_limit",
    "prepare_labels",
    "published_benchmarks",
    "run_bench",
    "scores_from_counts",
    "select_images",
]

_HOMES = {
    "activations": ("absolute_maxima", "activation_ranges", "float_tensor_maxima"),
    "bench": ("BenchSettings", "run_bench"),
    "bench_chart": ("draw_chart",),
    "bench_results": ("BenchResult", "BenchRow", "ContenderReport", "Spread"),
    "benchmarks": ("Benchmark", "benchmark_named", "published_benchmarks"),
    "calibration_images": ("CalibrationProgress", "CalibrationSet", "ImageBatches", "select_images"),
    "datasets": ("Dataset", "Example", "FolderDataset", "missing_parts", "open_benchmark", "open_own_data"),
    "evaluation": ("Contender", "Evaluation", "EvaluationSettings", "Share", "ViewResult", "evaluate"),
    "gallery": ("Extremes", "find_extremes"),
    "histograms": ("RANGE_METHODS", "RangeMethod", "entropy_limit", "mse_limit", "percentile_limit"),
    "metrics": (
        "Scores",
        "count_pixels",
        "iou_from_confusion",
        "mean_iou",
        "scores_from_counts",
    ),
    "pictures": ("GalleryItem", "draw_confusion", "draw_gallery"),
    "prepare": ("Prepared", "prepare_labels"),
}
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
