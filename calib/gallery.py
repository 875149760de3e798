"""The best and the worst images of an evaluation, labelled again to be looked at."""

import math
from dataclasses import dataclass

from tclkit.runtime.errors import InputError
from tclkit.runtime.segmenter import Segmenter

from .datasets import Dataset
from .evaluation import Evaluation, EvaluationSettings
from .pictures import GalleryItem
from .prediction import Predictor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Extremes:
    """Images at both ends.

    best: highest mIoU first. worst: lowest first, none that is among the best.
    """

    best: tuple[GalleryItem, ...]
    worst: tuple[GalleryItem, ...]


def find_extremes(
    evaluation: Evaluation, dataset: Dataset, settings: EvaluationSettings, view: str, *, count: int = 4
) -> Extremes:
    """Label the images with the highest and lowest mIoU again, by the first precision.

    An image that can no longer be read is passed over.
    """
    precision = next(iter(evaluation.results))
    images = evaluation.results[precision][view].images
    ranked = sorted((image for image in images if not math.isnan(image[1])), key=lambda image: (-image[1], image[0]))
    best = ranked[: min(count, (len(ranked) + 1) // 2)]
    worst = ranked[len(best) :][::-1][:count]
    with Segmenter.open(
        settings.model,
        backend=settings.backend,
        precision=precision,
        threads=settings.threads,
        flip=settings.flip,
        scales=settings.scales,
    ) as segmenter:
        predictor = Predictor(segmenter, dataset, evaluation.scoring)
        return Extremes(
            best=_items(best, dataset, predictor, view),
            worst=_items(worst, dataset, predictor, view),
        )


def _items(
    images: list[tuple[int, float]], dataset: Dataset, predictor: Predictor, view: str
) -> tuple[GalleryItem, ...]:
    items = []
    for index, miou in images:
        try:
            example = dataset.load(index)
            predicted = predictor.predict(example)[view][0]
        except InputError:
            continue
        items.append(
            GalleryItem(
                caption=f"{dataset.name(index)}: mIoU {miou * 100:.1f} %",
                image_hwc=example.image_hwc,
                truth=example.truth,
                predicted=predicted,
            )
        )
    return tuple(items)
