"""Evaluation of a model on a data set: streaming, resumable, by one process or several, merged exactly.

Every image becomes pixel counts in a journal. Counts are integers and are summed by image, so neither the order, nor
the number of processes or ranks, nor an interruption changes a figure.
"""

import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from tclkit.runtime.backends import Backend, image_file
from tclkit.runtime.errors import InputError, TclkitError
from tclkit.runtime.manifest import RUN_PRECISIONS
from tclkit.runtime.processor import usable_cpus
from tclkit.runtime.segmenter import Segmenter

from .datasets import Dataset, Example
from .journal import Findings, Journal, LineCounter, read_journals
from .loading import loaded_examples
from .metrics import Counts, Scores, figure_or_none, scores_from_counts
from .prediction import Predictor, Scoring, count_example, counts_from_cells, scoring_for
from .progress import silent

Progress = Callable[[int, int], None]
_POLL_S = 0.5
_JOURNALS = "journal"


@dataclass(frozen=True, kw_only=True, slots=True)
class Contender:
    """Another implementation of a bundle's model, to be measured beside the bundle's own graphs.

    name: its row in the results.
    identity: changes with all that its figures depend on, the bundle aside.
    open: called as open(bundle, threads=...), None for its own choice; pickled for several workers.
    """

    name: str
    identity: str
    open: Callable[..., Backend]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """What is evaluated, and how.

    model: name of an installed bundle, or its folder.
    backend: "auto", or a backend's name.
    precisions: of the image graph, "auto" for the backend's choice; with several, each image goes through all in turn.
    pamr: refine masks.
    threshold: of the background; None takes the benchmark's, else the model's.
    kp_w: share of the KP branch; None takes the benchmark's, else the model's.
    limit: the first so many images only.
    windows_per_run: windows of one image that the image graph takes at once.
    flip: look at the mirrored image as well.
    scales: look at the image in several sizes of the bundle.
    contrast: more prompts, whose pixels are background.
    threads: CPU threads of one process; None shares the CPUs out among the workers.
    contenders: other implementations, which take their turn after the precisions.
    """

    model: str
    backend: str = "auto"
    precisions: tuple[str, ...] = ("auto",)
    pamr: bool = False
    threshold: float | None = None
    kp_w: float | None = None
    limit: int | None = None
    windows_per_run: int = 1
    flip: bool = False
    scales: bool = False
    contrast: tuple[str, ...] = ()
    threads: int | None = None
    contenders: tuple[Contender, ...] = ()

    def __post_init__(self) -> None:
        if not self.precisions or len(set(self.precisions)) != len(self.precisions):
            raise InputError(f"precisions should be one or more different ones, got {', '.join(self.precisions)}")
        names = [contender.name for contender in self.contenders]
        if len({*names, *RUN_PRECISIONS}) != len(names) + len(RUN_PRECISIONS):
            raise InputError(f"contenders should have different names, and none of a precision, got {', '.join(names)}")
        for name in ("limit", "windows_per_run", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} should be 1 or more, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Which part of the work this process has, and how it goes about it.

    rank, world_size: every world_size-th image, from `rank` on.
    workers: processes.
    loaders: threads of each process that read files.
    """

    rank: int = 0
    world_size: int = 1
    workers: int = 1
    loaders: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"rank is {self.rank}, but ranks of {self.world_size} are 0 to {self.world_size - 1}")
        if self.workers < 1 or self.loaders < 1:
            raise InputError(f"workers and loaders should be 1 or more, got {self.workers} and {self.loaders}")


_WHOLE = Share()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ViewResult:
    """Figures of one precision, or of a contender, in one view.

    scores: over all counted images.
    counts: (K + 1, K), see `count_pixels`.
    latency_ms: median over the images, from the image in memory to its label map; nan without images.
    agreement: share of pixels labelled as the first precision labels them.
    images: (index, mIoU of this image alone), ascending by index.
    """

    scores: Scores
    counts: Counts
    latency_ms: float
    agreement: float
    images: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Evaluation:
    """What an evaluation found.

    key, title, classes: of the benchmark.
    model, backend: what was evaluated, on what.
    scoring: threshold, KP share and so on that were used.
    results: by precision or contender, by view.
    total: images of the data set, or of the limit.
    counted: of these, how many the figures hold.
    from_journal: of those, how many an earlier run had counted; to_dict leaves it out, since no figure depends on it.
    left_out: (name, reason) of images that could not be used.
    pending: images that no process has come to yet; other ranks may.
    unknown_pixels: whose label names no class and is not ignored.
    published: mIoU in percent of the published model under this protocol; None where there is none.
    notes: what of the protocol was not followed.
    """

    key: str
    title: str
    classes: tuple[str, ...]
    model: str
    backend: str
    scoring: Scoring
    results: dict[str, dict[str, ViewResult]]
    total: int
    counted: int
    from_journal: int
    left_out: tuple[tuple[str, str], ...]
    pending: int
    unknown_pixels: int
    published: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything that the images decide but their own figures, ready for JSON; what is not a number is null."""
        return {
            "benchmark": self.key,
            "title": self.title,
            "model": self.model,
            "backend": self.backend,
            "scoring": asdict(self.scoring),
            "images": {"total": self.total, "counted": self.counted, "pending": self.pending},
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
            "unknown_pixels": self.unknown_pixels,
            "published_miou": self.published,
            "notes": list(self.notes),
            "results": {
                precision: {view: _result_dict(result, self.classes) for view, result in views.items()}
                for precision, views in self.results.items()
            },
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """What one process does; can be pickled."""

    dataset: Dataset
    settings: EvaluationSettings
    scoring: Scoring
    folder: Path
    key: str
    indices: tuple[int, ...]
    loaders: int


def evaluate(
    dataset: Dataset,
    settings: EvaluationSettings,
    *,
    folder: Path,
    share: Share = _WHOLE,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a model, or go on with an evaluation that was interrupted, or merge those of several ranks.

    Images that the journals in `folder` hold are not computed again, as long as model, settings, data and tclkit's
    version are the same. Images that could not be used are tried again.

    Args:
        dataset: the images; with several workers it is pickled.
        settings: what is evaluated, and how.
        folder: where journals are kept; ranks on several machines share it, or their journals are copied together.
        share: the part of the images that is computed here; the result holds all that the journals do.
        progress: called with (images done, images to do) of this rank.

    Raises:
        InputError: a setting that does not go with this data set.
        TclkitError: the model cannot be opened or run, or a worker ended before its work.
    """
    segmenters = _opened(settings, share.workers)
    try:
        return _evaluated(dataset, settings, segmenters, folder / _JOURNALS, share, progress or silent)
    finally:
        for segmenter in segmenters.values():
            segmenter.close()


def _evaluated(
    dataset: Dataset,
    settings: EvaluationSettings,
    segmenters: dict[str, Segmenter],
    journals: Path,
    share: Share,
    report: Progress,
) -> Evaluation:
    first = next(iter(segmenters.values()))
    scoring = scoring_for(
        dataset.benchmark,
        first.bundle.manifest,
        fit=dataset.fit,
        pamr=settings.pamr,
        threshold=settings.threshold,
        kp_w=settings.kp_w,
        contrast=settings.contrast,
    )
    key = _run_key(dataset, segmenters, scoring, {one.name: one.identity for one in settings.contenders})
    total = min(len(dataset), settings.limit or len(dataset))
    known = read_journals(journals, key).images
    indices = tuple(index for index in range(share.rank, total, share.world_size) if index not in known)
    job = _Job(
        dataset=dataset,
        settings=settings,
        scoring=scoring,
        folder=journals,
        key=key,
        indices=indices,
        loaders=share.loaders,
    )
    report(0, len(indices))
    if share.workers == 1 or len(indices) < 2:
        _run(job, segmenters, lambda done: report(done, len(indices)))
    else:
        _run_workers(job, min(share.workers, len(indices)), report)
    from_journal = sum(index < total for index in known)
    return _summary(dataset, segmenters, scoring, total, read_journals(journals, key), from_journal)


def _opened(settings: EvaluationSettings, workers: int) -> dict[str, Segmenter]:
    """A Segmenter for each precision, by the precision that its backend chose, and for each contender, by its name."""
    threads = settings.threads
    if threads is None and workers > 1:
        threads = max(1, usable_cpus() // workers)
    opened = (
        Segmenter.open(
            settings.model,
            backend=settings.backend,
            precision=precision,
            threads=threads,
            windows_per_run=settings.windows_per_run,
            flip=settings.flip,
            scales=settings.scales,
        )
        for precision in settings.precisions
    )
    segmenters = {segmenter.backend.precision: segmenter for segmenter in opened}
    bundle = next(iter(segmenters.values())).bundle
    for contender in settings.contenders:
        segmenters[contender.name] = Segmenter(
            bundle,
            contender.open(bundle, threads=threads),
            cache=None,  # it holds embeddings of the bundle's text graph; a contender embeds texts itself
            windows_per_run=settings.windows_per_run,
            flip=settings.flip,
            scales=settings.scales,
        )
    return segmenters


def _run_key(
    dataset: Dataset, segmenters: dict[str, Segmenter], scoring: Scoring, identities: Mapping[str, str]
) -> str:
    """Digest of all that a figure depends on, and of nothing else: neither paths, nor the limit, nor workers."""
    parts: list[Any] = [importlib.metadata.version("tclkit"), dataset.fingerprint(), asdict(scoring)]
    for name, segmenter in segmenters.items():
        manifest = segmenter.bundle.manifest
        found = (image_file(segmenter.bundle, segmenter.backend.name, name, image.size) for image in manifest.images)
        graphs = sorted(file for file in found if file is not None)
        hashes = [manifest.files[file].sha256 for file in (*graphs, manifest.masks)]
        parts += [
            name,
            identities.get(name),
            segmenter.flip,
            segmenter.scales,
            segmenter.backend.name,
            hashes,
            segmenter.bundle.text_encoder_hash,
            manifest.templates,
        ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _run(job: _Job, segmenters: dict[str, Segmenter], on_image: Callable[[int], None]) -> None:
    """Count every image of a job into a new journal."""
    if not job.indices:
        return
    predictors = {
        precision: Predictor(segmenter, job.dataset, job.scoring) for precision, segmenter in segmenters.items()
    }
    words = {**asdict(job.scoring), "benchmark": job.dataset.benchmark.key, "model": job.settings.model}
    is_warm = False
    with Journal(job.folder, job.key, words) as journal:
        examples = loaded_examples(job.dataset, job.indices, threads=job.loaders)
        for done, (index, example) in enumerate(examples, start=1):
            name = job.dataset.name(index)
            try:
                if isinstance(example, InputError):
                    raise example
                if not is_warm:  # the first run of a graph takes longer than any other
                    _predicted(predictors, example, 0)
                    is_warm = True
                counted = count_example(_predicted(predictors, example, index), example, job.dataset.benchmark)
            except InputError as error:
                journal.add_problem(index, name, error.message)
            else:
                journal.add_image(index, name, counted)
            on_image(done)


def _predicted(predictors: dict[str, Predictor], example: Example, turn: int) -> dict[str, Any]:
    """Predictions by precision; who begins changes from image to image, so that no precision has the warmer cache."""
    order = list(predictors)
    shift = turn % len(order)
    found = {precision: predictors[precision].predict(example) for precision in order[shift:] + order[:shift]}
    return {precision: found[precision] for precision in order}


def _run_workers(job: _Job, workers: int, report: Progress) -> None:
    """Share a job out among processes and wait for them; each writes a journal of its own."""
    context = multiprocessing.get_context("spawn")  # a fork would share the threads' locks of the runtimes
    lines = LineCounter(job.folder, job.key)
    processes: list[tuple[BaseProcess, Connection]] = []
    try:
        for number in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            share = {**_fields(job), "indices": job.indices[number::workers]}
            process: BaseProcess = context.Process(
                target=_work, args=(_Job(**share), workers, theirs, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            processes.append((process, ours))
        while any(process.is_alive() for process, _ in processes):
            for process, _ in processes:
                process.join(_POLL_S / len(processes))
            report(min(lines.count(), len(job.indices)), len(job.indices))
    finally:
        for process, _ in processes:
            process.terminate()
            process.join()
    for number, (process, connection) in enumerate(processes):
        _check_end(f"worker {number} of {workers}", process.exitcode, _last_words(connection))


def _check_end(worker: str, exit_code: int | None, message: str | None) -> None:
    if message is not None:
        raise TclkitError(f"{worker}: {message}")
    if exit_code != 0:
        raise TclkitError(
            f"{worker} ended with {_exit_text(exit_code)}; what was counted is kept, and the same command goes on",
            exit_code=exit_code,
        )


def _work(job: _Job, workers: int, connection: Connection, parent: int) -> None:
    """Body of a worker process. Ctrl-C is the parent's affair; a worker whose parent is gone ends by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def leave_when_orphaned(done: int) -> None:
        if os.getppid() != parent:
            os._exit(1)

    try:
        segmenters = _opened(job.settings, workers)
        _run(job, segmenters, leave_when_orphaned)
        for segmenter in segmenters.values():
            segmenter.close()
    except (TclkitError, OSError, MemoryError) as error:
        connection.send(str(error) or type(error).__name__)


def _last_words(connection: Connection) -> str | None:
    try:
        return str(connection.recv()) if connection.poll() else None
    except EOFError:
        return None
    finally:
        connection.close()


def _exit_text(exit_code: int | None) -> str:
    return f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"


def _fields(job: _Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in job.__dataclass_fields__}


def _summary(
    dataset: Dataset,
    segmenters: dict[str, Segmenter],
    scoring: Scoring,
    total: int,
    findings: Findings,
    from_journal: int,
) -> Evaluation:
    benchmark = dataset.benchmark
    first = next(iter(segmenters.values()))
    images = {index: counted for index, counted in sorted(findings.images.items()) if index < total}
    problems = {index: problem for index, problem in sorted(findings.problems.items()) if index < total}
    results = {
        precision: {
            view: _view_result([(index, one[precision][view]) for index, one in images.items()], len(benchmark.classes))
            for view in dataset.views
        }
        for precision in segmenters
    }
    any_counts = results[next(iter(results))][dataset.views[0]].counts
    return Evaluation(
        key=benchmark.key,
        title=benchmark.title,
        classes=benchmark.classes,
        model=first.model,
        backend=first.backend.name,
        scoring=scoring,
        results=results,
        total=total,
        counted=len(images),
        from_journal=from_journal,
        left_out=tuple(problems.values()),
        pending=total - len(images) - len(problems),
        unknown_pixels=int(any_counts[-1].sum()),
        published=benchmark.published(pamr=scoring.pamr),
        notes=tuple(_notes(dataset, first, scoring, total)),
    )


def _notes(dataset: Dataset, segmenter: Segmenter, scoring: Scoring, total: int) -> list[str]:
    """Why a figure does not compare with the published one; nothing for data that has none."""
    benchmark = dataset.benchmark
    if benchmark.published_miou is None:
        return []
    notes = benchmark.deviations(segmenter.bundle.manifest)
    prescribed = benchmark.threshold_pamr if scoring.pamr else benchmark.threshold
    if scoring.threshold != prescribed:
        notes.append(f"background threshold {scoring.threshold:g}, the protocol has {prescribed:g}")
    if segmenter.bundle.manifest.has_kp and scoring.kp_w != benchmark.kp_w:
        notes.append(f"KP share {scoring.kp_w:g}, the protocol has {benchmark.kp_w:g}")
    if scoring.contrast:
        notes.append(f"contrast prompts: {', '.join(scoring.contrast)}")
    if segmenter.flip:
        notes.append("masks are the mean over the image and its mirror image")
    if segmenter.scales:
        notes.append("masks are the mean over several sizes of the image")
    if total < len(dataset):
        notes.append(f"the first {total} of {len(dataset)} images")
    return notes


def _view_result(images: Sequence[tuple[int, dict[str, Any]]], classes: int) -> ViewResult:
    counts = np.zeros((classes + 1, classes), np.int64)
    by_image = []
    for index, one in images:
        of_image = counts_from_cells(one["cells"], classes)
        counts += of_image
        by_image.append((index, scores_from_counts(of_image).miou))
    pixels = sum(one["pixels"] for _, one in images)
    return ViewResult(
        scores=scores_from_counts(counts),
        counts=counts,
        latency_ms=float(np.median([one["ms"] for _, one in images])) if images else float("nan"),
        agreement=sum(one["same"] for _, one in images) / pixels if pixels else float("nan"),
        images=tuple(by_image),
    )


def _result_dict(result: ViewResult, classes: Sequence[str]) -> dict[str, Any]:
    scores = result.scores
    return {
        "miou_percent": figure_or_none(scores.miou_percent),
        "pixel_accuracy": figure_or_none(scores.pixel_accuracy),
        "mean_accuracy": figure_or_none(scores.mean_accuracy),
        "latency_ms": figure_or_none(result.latency_ms),
        "agreement": figure_or_none(result.agreement),
        "classes": [
            {"name": name, "iou": figure_or_none(iou), "accuracy": figure_or_none(accuracy)}
            for name, iou, accuracy in zip(classes, scores.iou, scores.accuracy, strict=True)
        ],
        "confusion": result.counts.tolist(),
    }
