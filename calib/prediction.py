"""One image of a data set through a Segmenter, counted against its truth."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tclkit.runtime.embedding import embed_texts
from tclkit.runtime.errors import InputError
from tclkit.runtime.manifest import Manifest
from tclkit.runtime.prompts import PromptSet
from tclkit.runtime.result import Segmentation
from tclkit.runtime.segmenter import Segmenter
from tclkit.runtime.tokenizer import Tokenizer

from .benchmarks import Benchmark
from .datasets import Dataset, Example
from .metrics import Counts, count_pixels

LabelNumbers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """How soft masks become labels in an evaluation.

    threshold: value of the background channel; None without a background.
    kp_w: share of the KP branch.
    pamr: whether masks are refined.
    fit: how images reach the model.
    contrast: more prompts, whose pixels are background.
    """

    threshold: float | None
    kp_w: float
    pamr: bool
    fit: str
    contrast: tuple[str, ...] = ()


def scoring_for(
    benchmark: Benchmark,
    manifest: Manifest,
    *,
    fit: str,
    pamr: bool,
    threshold: float | None,
    kp_w: float | None,
    contrast: tuple[str, ...] = (),
) -> Scoring:
    """What is given, else what the benchmark prescribes, else what the model recommends.

    Raises:
        InputError: a threshold or contrast prompts are given, but the benchmark has no background.
    """
    if contrast and not benchmark.background:
        raise InputError(f"{benchmark.title} has no background, which contrast prompts would stand for")
    if threshold is not None and not benchmark.background:
        raise InputError(f"{benchmark.title} has no background, so the threshold {threshold:g} would have no effect")
    model_threshold = manifest.thresholds.background_pamr if pamr else manifest.thresholds.background
    prescribed = benchmark.threshold_pamr if pamr else benchmark.threshold
    if not benchmark.background:
        chosen = None
    else:
        chosen = next(value for value in (threshold, prescribed, model_threshold) if value is not None)
    if not manifest.has_kp and kp_w is None:
        share = 0.0
    else:
        share = next(value for value in (kp_w, benchmark.kp_w, manifest.kp_w) if value is not None)
    return Scoring(threshold=chosen, kp_w=share, pamr=pamr, fit=fit, contrast=contrast)


def prompts_for(segmenter: Segmenter, benchmark: Benchmark, names: Sequence[str] | None = None) -> PromptSet:
    """Embed a benchmark's classes, or other names: in its own templates to the letter, or in the model's without."""
    names = benchmark.names if names is None else names
    if not benchmark.templates:
        return segmenter.prompts(names)
    return embed_texts(
        names,
        benchmark.texts(names),
        tokenizer=Tokenizer.from_bundle(segmenter.bundle),
        encode_text=segmenter.backend.encode_text,
        text_encoder_hash=segmenter.bundle.text_encoder_hash,
        cache=segmenter.cache,
    ).prompts


class Predictor:
    """Labels images with the classes of a data set.

    Args:
        segmenter: runs the model.
        dataset: gives the classes.
        scoring: how masks become labels.
    """

    def __init__(self, segmenter: Segmenter, dataset: Dataset, scoring: Scoring) -> None:
        self.segmenter, self._scoring = segmenter, scoring
        self._offset = int(dataset.benchmark.background)
        self._views = dataset.views
        self._every = prompts_for(segmenter, dataset.benchmark)
        self._contrast = prompts_for(segmenter, dataset.benchmark, scoring.contrast) if scoring.contrast else None

    def predict(self, example: Example) -> dict[str, tuple[LabelNumbers, float]]:
        """Class of every pixel, (H, W), and milliseconds, by view.

        The milliseconds go from the image in memory to its label map. Where there are several views, the image graph
        runs once, and its time counts in each.
        """
        options: dict[str, Any] = {
            "threshold": self._scoring.threshold,
            "background": self._scoring.threshold is not None,
            "kp_w": self._scoring.kp_w,
            "pamr": self._scoring.pamr,
            "contrast": self._contrast,
        }
        if len(self._views) == 1:
            (view,) = self._views
            start = time.perf_counter()
            result = self._asked(example, view, lambda prompts: self._whole(example, prompts, options))
            return {view: (result, _elapsed_ms(start))}
        start = time.perf_counter()
        features = self.segmenter.features(example.image_hwc, fit=self._scoring.fit)
        image_ms = _elapsed_ms(start)
        found = {}
        for view in self._views:
            start = time.perf_counter()
            result = self._asked(
                example,
                view,
                lambda prompts: self.segmenter.segment(features, prompts, **options),
            )
            found[view] = (result, image_ms + _elapsed_ms(start))
        return found

    def _whole(self, example: Example, prompts: PromptSet, options: Mapping[str, Any]) -> Segmentation:
        return self.segmenter(example.image_hwc, prompts, fit=self._scoring.fit, **options)

    def _asked(self, example: Example, view: str, segment: Callable[[PromptSet], Segmentation]) -> LabelNumbers:
        chosen = example.prompts[view]
        if chosen is None:
            return np.asarray(segment(self._every).label_map, np.int64) + self._offset
        if not chosen:  # nothing to ask for: all of it is background
            return np.zeros(example.truth.shape, np.int64)
        result = segment(_subset(self._every, chosen))
        class_of = np.array([*(index + self._offset for index in chosen), 0], np.int64)  # -1 takes the last
        return np.asarray(class_of[result.label_map])


def _subset(prompts: PromptSet, chosen: Sequence[int]) -> PromptSet:
    return PromptSet(
        names=tuple(prompts.names[index] for index in chosen),
        embeddings=np.ascontiguousarray(prompts.embeddings[list(chosen)]),
        key=prompts.key,
    )


def count_example(
    predicted: Mapping[str, Mapping[str, tuple[LabelNumbers, float]]], example: Example, benchmark: Benchmark
) -> dict[str, Any]:
    """What a journal keeps of one image, as plain numbers.

    Args:
        predicted: by precision, by view, from `Predictor.predict`; the first precision is what the others are compared
            with.
        example: the image.
        benchmark: its scoring.

    Returns:
        By precision, by view: "ms", "cells" (truth · K + prediction, count, ... of `count_pixels`), and "same", pixels
        labelled as the first precision labels them.
    """
    reference = next(iter(predicted.values()))
    return {
        precision: {
            view: {
                "ms": round(elapsed_ms, 3),
                "cells": _sparse(
                    count_pixels(
                        labels,
                        example.truth,
                        len(benchmark.classes),
                        reduce_zero_label=benchmark.reduce_zero_label,
                    )
                ),
                "same": int((labels == reference[view][0]).sum()),
                "pixels": int(labels.size),
            }
            for view, (labels, elapsed_ms) in views.items()
        }
        for precision, views in predicted.items()
    }


def counts_from_cells(cells: Sequence[int], classes: int) -> Counts:
    """The (K + 1, K) counts that `count_example` wrote as cells."""
    counts = np.zeros((classes + 1) * classes, np.int64)
    counts[list(cells[::2])] = cells[1::2]
    return counts.reshape(classes + 1, classes)


def _sparse(counts: Counts) -> list[int]:
    flat = counts.ravel()
    (places,) = np.nonzero(flat)
    return [int(number) for place in places for number in (place, flat[place])]


def _elapsed_ms(start: float) -> float:
    return (time.perf_counter() - start) * 1000
