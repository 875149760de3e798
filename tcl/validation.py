"""mIoU of a model while it learns, by the windows, prompts, labels and counts of `tclkit eval`.

Nothing is exported: torch runs where the graphs would. Over several processes each takes every R-th image, and integer
counts are summed.
"""

import hashlib
import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tclkit.calib.benchmarks import published_benchmarks
from tclkit.calib.datasets import Dataset, open_benchmark, open_own_data
from tclkit.calib.loading import loaded_examples
from tclkit.calib.metrics import Counts, Scores, count_pixels, figure_or_none, scores_from_counts
from tclkit.calib.prediction import Predictor, Scoring, scoring_for
from tclkit.runtime.bundle import Bundle
from tclkit.runtime.errors import InputError
from tclkit.runtime.manifest import FileRecord, ImageEntry, Manifest, ModelInfo, Preprocessing, Thresholds
from tclkit.runtime.prompts import PROTOCOL_TEMPLATES
from tclkit.runtime.segmenter import Segmenter

from .batches import IMAGE_MEAN, IMAGE_STD
from .distributed import current_place, gather_values
from .model import TCL
from .tokenizer_file import vocabulary_size
from .torch_backend import TorchBackend
from .world import EVALUATION_SEED, PALETTE, Palette, WorldConfig
from .world_dataset import WorldDataset

SHAPES_NAME = "shapes"
OWN_DATA_NAME = "folder"
DEFAULT_SCENES = 128
# That of the scenes which choose thresholds: what chooses a checkpoint must not be what the model is judged on at last.
VALIDATION_SEED = EVALUATION_SEED + 1

ValidationProgress = Callable[[int, int], None]
"""Called as progress(images done, images to do) of this process."""

_PUBLISHED_THRESHOLDS = Thresholds(background=0.5, background_pamr=0.4)
_TOKENIZER = "tokenizer.json"
_WEIGHTS = "weights"  # stands for the graphs' files, which there are none of


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ValidationScore:
    """What a validation found, the same on every process.

    key: of the data set.
    counts: by view, (K + 1, K); see `count_pixels`. The last view asks for every class.
    threshold, kp_w: background threshold (None without a background) and share of the KP branch that were used.
    total: images that were to be looked at. counted: those that the figures hold.
    left_out: (name, reason) of those that could not be used.
    seconds: of the slowest process.
    """

    key: str
    counts: dict[str, Counts]
    threshold: float | None
    kp_w: float
    total: int
    counted: int
    left_out: tuple[tuple[str, str], ...]
    seconds: float

    @property
    def scores(self) -> dict[str, Scores]:
        """Figures by view."""
        return {view: scores_from_counts(counts) for view, counts in self.counts.items()}

    @property
    def miou(self) -> float:
        """Percent, with every class asked for; nan when no image was counted."""
        return scores_from_counts(list(self.counts.values())[-1]).miou * 100

    @property
    def unknown_pixels(self) -> int:
        """Pixels whose label names no class and is not ignored."""
        return int(next(iter(self.counts.values()))[-1].sum())

    def to_dict(self) -> dict[str, Any]:
        """Everything but the counts, ready for JSON; what is not a number is null."""
        return {
            "benchmark": self.key,
            "miou": {view: figure_or_none(scores.miou * 100) for view, scores in self.scores.items()},
            "pixel_accuracy": {
                view: figure_or_none(scores.pixel_accuracy * 100) for view, scores in self.scores.items()
            },
            "threshold": self.threshold,
            "kp_w": self.kp_w,
            "images": {"total": self.total, "counted": self.counted},
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out],
            "unknown_pixels": self.unknown_pixels,
            "seconds": round(self.seconds, 3),
        }


def open_validation(
    name: str,
    data: Path | None = None,
    *,
    names: Path | None = None,
    world: WorldConfig | None = None,
    palette: Palette = PALETTE,
    scenes: int = DEFAULT_SCENES,
) -> Dataset:
    """Find a data set by the name that `tclkit eval --benchmark` knows it by.

    Args:
        name: "shapes", "folder", or a published benchmark.
        data: folder of the images; of shapes none.
        names: file of class names for "folder"; see `open_own_data`.
        world, palette: what shapes look like; scenes are drawn with a seed of their own, neither the world's nor that
            of the final evaluation.
        scenes: how many scenes there are.

    Raises:
        InputError: unknown name, data missing or not wanted, or the world trains on the very scenes.
    """
    if name == SHAPES_NAME:
        if data is not None:
            raise InputError(f"{SHAPES_NAME} draws its own images; for those in {data} name {OWN_DATA_NAME}")
        world = world or WorldConfig()
        if world.seed == VALIDATION_SEED:
            raise InputError(f"the world's seed {world.seed} is that of the validation; choose another for training")
        return WorldDataset(world=replace(world, seed=VALIDATION_SEED), count=scenes, palette=palette)
    if name != OWN_DATA_NAME and name not in published_benchmarks():
        known = ", ".join((SHAPES_NAME, OWN_DATA_NAME, *published_benchmarks()))
        raise InputError(f"no data set {name!r} to validate on; choose one of {known}")
    if data is None:
        raise InputError(f"validation on {name} needs the folder of its images and label maps")
    return open_own_data(data, names=names) if name == OWN_DATA_NAME else open_benchmark(name, data)


def validate(
    model: TCL,
    tokenizer_json: str,
    dataset: Dataset,
    *,
    image_size: int | tuple[int, int],
    templates: Sequence[str] = PROTOCOL_TEMPLATES,
    threshold: float | None = None,
    kp_w: float | None = None,
    pamr: bool = False,
    limit: int | None = None,
    windows_per_run: int = 1,
    loaders: int = 2,
    progress: ValidationProgress | None = None,
) -> ValidationScore:
    """Measure a model as `tclkit eval` would measure its exported bundle, in float32 on the device it lies on.

    The model is in eval mode meanwhile and afterwards as it was; no random number is drawn, so that training goes on as
    without. With several processes (torch.distributed) all must call this.

    Args:
        model: not its DistributedDataParallel wrapper.
        tokenizer_json: text of the tokenizer.json of its text encoder.
        dataset: from `open_validation`, for example.
        image_size: pixels of a side, or (H, W), of what the image encoder takes; multiples of the patch.
        templates: of prompts, where the benchmark prescribes none.
        threshold: of the background; None takes the benchmark's, else the published 0.5 (0.4 with PAMR).
        kp_w: share of the KP branch; None takes the benchmark's, else the model's.
        pamr: refine masks.
        limit: the first so many images only.
        windows_per_run: windows of one image that are computed at once.
        loaders: threads that read files.
        progress: called after every image.

    Raises:
        InputError: the tokenizer does not fit the model, or a setting is wrong. Images that cannot be used raise
            nothing: the score names them.
    """
    start = time.perf_counter()
    _check_settings(limit, threshold=threshold, kp_w=kp_w)
    place, total = current_place(), min(len(dataset), limit or len(dataset))
    device = next(model.parameters()).device.type
    with (
        tempfile.TemporaryDirectory(prefix="tclkit-validation-") as folder,
        _as_found(model),
        torch.autocast(device, enabled=False),
    ):
        bundle = _bundle_of(model, tokenizer_json, templates, image_size, Path(folder))
        scoring = scoring_for(
            dataset.benchmark, bundle.manifest, fit=dataset.fit, pamr=pamr, threshold=threshold, kp_w=kp_w
        )
        segmenter = Segmenter(bundle, TorchBackend(model, bundle), windows_per_run=windows_per_run)
        own = _count(segmenter, dataset, scoring, range(place.rank, total, place.count), loaders, progress)
    own.seconds = time.perf_counter() - start
    parts: list[_Part] = gather_values(own)
    return ValidationScore(
        key=dataset.benchmark.key,
        counts={view: np.sum([part.counts[view] for part in parts], axis=0) for view in dataset.views},
        threshold=scoring.threshold,
        kp_w=scoring.kp_w,
        total=total,
        counted=sum(part.counted for part in parts),
        left_out=tuple((name, reason) for _, name, reason in sorted(one for part in parts for one in part.left_out)),
        seconds=max(part.seconds for part in parts),
    )


def _check_settings(limit: int | None, **shares: float | None) -> None:
    """What is wrong with every image alike is no fault of the images, and is said at once."""
    if limit is not None and limit < 1:
        raise InputError(f"limit should be 1 or more, found {limit}")
    for name, share in shares.items():
        if share is not None and not 0 <= share <= 1:
            raise InputError(f"{name} should be in [0, 1], found {share}")


@dataclass(slots=True)
class _Part:
    """What one process found; can be pickled."""

    counts: dict[str, Counts]
    counted: int
    left_out: list[tuple[int, str, str]]
    seconds: float = 0.0


def _count(
    segmenter: Segmenter,
    dataset: Dataset,
    scoring: Scoring,
    indices: Sequence[int],
    loaders: int,
    progress: ValidationProgress | None,
) -> _Part:
    benchmark, predictor = dataset.benchmark, Predictor(segmenter, dataset, scoring)
    classes = len(benchmark.classes)
    part = _Part({view: np.zeros((classes + 1, classes), np.int64) for view in dataset.views}, 0, [])
    for done, (index, example) in enumerate(loaded_examples(dataset, indices, threads=loaders), start=1):
        try:
            if isinstance(example, InputError):
                raise example
            counted = {
                view: count_pixels(labels, example.truth, classes, reduce_zero_label=benchmark.reduce_zero_label)
                for view, (labels, _) in predictor.predict(example).items()
            }
        except InputError as error:
            part.left_out.append((index, dataset.name(index), error.message))
        else:
            part.counted += 1
            for view, counts in counted.items():
                part.counts[view] += counts
        if progress:
            progress(done, len(indices))
    return part


@contextmanager
def _as_found(model: TCL) -> Iterator[None]:
    """Leave every part of the model in the mode it was in."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _bundle_of(
    model: TCL, tokenizer_json: str, templates: Sequence[str], image_size: int | tuple[int, int], folder: Path
) -> Bundle:
    """What a Segmenter must know of the model; of the bundle's files only the tokenizer exists."""
    clip = model.config.clip
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < clip.patch_size or height % clip.patch_size or width % clip.patch_size:
        raise InputError(f"image_size {height}x{width} is no multiple of the model's patch, {clip.patch_size}")
    found = vocabulary_size(tokenizer_json)
    if found != clip.vocab_size:
        raise InputError(
            f"the tokenizer knows {found} tokens, but the model's text encoder has {clip.vocab_size}. Give the "
            "tokenizer that it was trained with",
            expected=clip.vocab_size,
            found=found,
        )
    content = tokenizer_json.encode()
    (folder / _TOKENIZER).write_bytes(content)
    manifest = Manifest(
        name="the model in training",
        description="",
        created="",
        tclkit_version=importlib.metadata.version("tclkit"),
        model=ModelInfo(
            architecture="custom",
            patch_size=clip.patch_size,
            embed_dim=clip.embed_dim,
            context_length=clip.context_length,
            vocab_size=clip.vocab_size,
            mask_scale=model.config.mask_scale,
        ),
        images=(ImageEntry(height=height, width=width, files={"fp32": _WEIGHTS}),),
        masks=_WEIGHTS,
        text=_WEIGHTS,
        tokenizer=_TOKENIZER,
        preprocessing=Preprocessing(mean=IMAGE_MEAN, std=IMAGE_STD, interpolation="bilinear-uint8"),
        templates=tuple(templates),
        kp_w=model.config.kp_w,
        thresholds=_PUBLISHED_THRESHOLDS,
        vocabulary=None,
        files={_TOKENIZER: _record(content), _WEIGHTS: _record(b"")},
        provenance={"kp_attention": model.kp_attention},
        checks={},
    )
    return Bundle(folder=folder, manifest=manifest)


def _record(content: bytes) -> FileRecord:
    return FileRecord(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
