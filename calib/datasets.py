"""Images with label maps: the published benchmarks in the folders that mmsegmentation 0.27 knows, and a user's own."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from tclkit.runtime.errors import InputError
from tclkit.runtime.image_suffixes import IMAGE_SUFFIXES
from tclkit.runtime.images import load_image

from .benchmarks import BACKGROUND_NAME, IGNORED, PREPARED, Benchmark, benchmark_named
from .label_files import LabelMap, read_label_map

ALL_PROMPTS: Final = "all"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Example:
    """One image with its truth.

    image_hwc: (H, W, 3) uint8 RGB.
    truth: (H, W) integers as `count_pixels` takes them.
    prompts: what to ask for in each view of the data set, as indices of its names, ascending; None asks for all.
    """

    image_hwc: npt.NDArray[np.uint8]
    truth: LabelMap
    prompts: Mapping[str, tuple[int, ...] | None]


class Dataset(Protocol):
    """Images with label maps, in a fixed order, read when they are asked for. Can be pickled."""

    @property
    def benchmark(self) -> Benchmark:
        """Classes, prompts and scoring."""
        ...

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the ways in which each image is asked; "all" is the one of the published benchmarks."""
        ...

    @property
    def fit(self) -> str:
        """How images reach the model; see `Segmenter`."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of an image, for people."""
        ...

    def load(self, index: int) -> Example:
        """Read one image with its truth.

        Raises:
            InputError: a file is missing or cannot be used; names it.
        """
        ...

    def fingerprint(self) -> str:
        """Hex digest of what the figures depend on: classes, scoring, and the images with their truth.

        Reads every label map, so ask once.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImage:
    """Where one image and its label map lie.

    name: the image's path below the images folder, without the suffix.
    image, label: the two files; whether they exist shows when they are read.
    """

    name: str
    image: Path
    label: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderDataset:
    """A `Dataset` of files.

    benchmark: classes, prompts and scoring.
    samples: the images, in order.
    fit: how images reach the model.
    """

    benchmark: Benchmark
    samples: tuple[LabelledImage, ...]
    fit: str = "slide"
    views: tuple[str, ...] = field(default=(ALL_PROMPTS,), init=False)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """Name of an image."""
        return self.samples[index].name

    def load(self, index: int) -> Example:
        """Read one image with its truth; see `Dataset.load`."""
        sample = self.samples[index]
        image, truth = load_image(sample.image), read_label_map(sample.label)
        if image.shape[:2] != truth.shape:
            raise InputError(
                f"{sample.label} is {truth.shape[1]} x {truth.shape[0]} pixels, but {sample.image} is "
                f"{image.shape[1]} x {image.shape[0]}",
                path=str(sample.label),
            )
        return Example(image_hwc=image, truth=truth, prompts={ALL_PROMPTS: None})

    def fingerprint(self) -> str:
        """Hex digest of benchmark, names, images' sizes and label maps' bytes; see `Dataset.fingerprint`."""
        identity = [(sample.name, _size_of(sample.image), _digest_of(sample.label)) for sample in self.samples]
        return fingerprint_from(self.benchmark, self.fit, identity)


def _size_of(path: Path) -> int | None:
    """Bytes of a file; None where there is none, which shows when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _digest_of(path: Path) -> str | None:
    """Hex digest of a file's bytes; None where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def fingerprint_from(benchmark: Benchmark, fit: str, identity: object) -> str:
    """Hex digest of a benchmark's classes and scoring, and of what tells its images apart."""
    scored = [benchmark.names, benchmark.background, benchmark.reduce_zero_label, benchmark.templates]
    return hashlib.sha256(json.dumps([benchmark.key, scored, fit, identity]).encode()).hexdigest()


def open_benchmark(key: str, folder: Path) -> FolderDataset:
    """Find the files of a published benchmark.

    Args:
        key: of the benchmark.
        folder: its own root (the one that holds JPEGImages, images, leftImg8bit ...), or a folder of data sets in which
            that root lies as the authors lay it (VOCdevkit/VOC2012, coco_stuff164k, cityscapes, ade ...).

    Raises:
        InputError: unknown benchmark, or files are not where they are expected; says what is missing where, and how to
            make it.
    """
    benchmark = benchmark_named(key)
    missing = missing_parts(benchmark, folder)
    if missing:
        raise InputError(f"{benchmark.title} is not complete: " + "; ".join(missing), key=key, missing=missing)
    root = benchmark_root(benchmark, folder)
    samples = _split_samples(benchmark, root) if benchmark.split else _folder_samples(benchmark, root)
    return FolderDataset(benchmark=benchmark, samples=tuple(samples))


def benchmark_root(benchmark: Benchmark, folder: Path) -> Path:
    """The benchmark's root: the first of `folder`/root and `folder` that holds its images, else the first."""
    nested = folder / benchmark.root
    short = folder / Path(benchmark.root).name
    for root in (nested, short, folder):
        if (root / benchmark.images).is_dir():
            return root
    return nested


def missing_parts(benchmark: Benchmark, folder: Path) -> list[str]:
    """What of a benchmark's files is not there: what it is, where it is expected, how to get it. Empty when complete.

    Label files are looked for one by one, so that a conversion that broke off shows.
    """
    if not folder.is_dir():
        return [f"{folder} is no folder"]
    root = benchmark_root(benchmark, folder)
    if not (root / benchmark.images).is_dir():
        return [f"no images: expected the folder {root / benchmark.images} (or {folder / benchmark.images})"]
    missing = []
    if benchmark.split and not (root / benchmark.split).is_file():
        missing.append(f"no split file: expected {root / benchmark.split}{_prepared_by(benchmark)}")
    if not (root / benchmark.labels).is_dir():
        missing.append(f"no label maps: expected the folder {root / benchmark.labels}{_prepared_by(benchmark)}")
    if missing:
        return missing
    samples = _split_samples(benchmark, root) if benchmark.split else _folder_samples(benchmark, root)
    if not samples:
        where = root / (benchmark.split or benchmark.images)
        return [f"no images named in {where}" if benchmark.split else f"no *{benchmark.image_suffix} below {where}"]
    labels = _names_below(root / benchmark.labels)
    if not any(sample.label.relative_to(root / benchmark.labels).as_posix() in labels for sample in samples):
        return [
            f"no label maps *{benchmark.label_suffix} in {root / benchmark.labels}, the first expected is "
            f"{samples[0].label}{_prepared_by(benchmark)}"
        ]
    return []


def missing_files(dataset: FolderDataset) -> list[Path]:
    """Images and label maps of a data set that do not exist."""
    return [path for sample in dataset.samples for path in (sample.image, sample.label) if not path.is_file()]


def _prepared_by(benchmark: Benchmark) -> str:
    return f" (tclkit data prepare {benchmark.key} --root DIR makes it)" if benchmark.key in PREPARED else ""


def _split_samples(benchmark: Benchmark, root: Path) -> list[LabelledImage]:
    path = root / str(benchmark.split)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}", path=str(path)) from error
    return [_sample(benchmark, root, line.strip()) for line in lines if line.strip()]


def _folder_samples(benchmark: Benchmark, root: Path) -> list[LabelledImage]:
    suffix = benchmark.image_suffix
    names = sorted(name.removesuffix(suffix) for name in _names_below(root / benchmark.images) if name.endswith(suffix))
    return [_sample(benchmark, root, name) for name in names]


def _sample(benchmark: Benchmark, root: Path, name: str) -> LabelledImage:
    image = root / benchmark.images / f"{name}{benchmark.image_suffix}"
    return LabelledImage(name=name, image=image, label=root / benchmark.labels / f"{name}{benchmark.label_suffix}")


def _names_below(folder: Path) -> set[str]:
    """Files of a folder and its subfolders, as posix paths below it; links to a folder round it are left out."""
    found: set[str] = set()
    above = {os.fspath(folder): {os.path.realpath(folder)}}  # real folders that lead to a folder, itself too
    for place, folders, files in os.walk(folder, followlinks=True):
        for name in list(folders):
            path = os.path.join(place, name)  # noqa: PTH118 (the names of os.walk)
            real = os.path.realpath(path)
            if real in above[place]:
                folders.remove(name)
            else:
                above[path] = above[place] | {real}
        below = Path(place).relative_to(folder).as_posix()
        found.update(name if below == "." else f"{below}/{name}" for name in files)
    return found


def open_own_data(folder: Path, *, names: Path | None = None) -> FolderDataset:
    """Open a user's own data: `folder`/images, `folder`/labels (PNG, the same names) and a file of class names.

    The names file has one class a line; the line number, from 0, is the class's value in the label maps; 255 is
    ignored, so that there are 255 classes at most. When the first line is "background", label 0 is none of the others.

    Args:
        folder: holds images and labels.
        names: the names file; `folder`/names.txt by default.

    Raises:
        InputError: a folder or file is missing, there are no images, or the names are empty, repeated or too many.
    """
    images, labels = folder / "images", folder / "labels"
    for part in (images, labels):
        if not part.is_dir():
            raise InputError(f"{part} is no folder; own data are DIR/images, DIR/labels and DIR/names.txt")
    classes = _class_names(names or folder / "names.txt")
    background = classes[0].lower() == BACKGROUND_NAME
    benchmark = Benchmark(
        key="folder",
        title=folder.name or str(folder),
        root="",
        images="images",
        labels="labels",
        split=None,
        image_suffix="",
        label_suffix=".png",
        names=classes[1:] if background else classes,
        background=background,
        reduce_zero_label=False,
        threshold=None,
        threshold_pamr=None,
        kp_w=None,
        short_side=448,
        long_side=2048,
        window=448,
        stride=224,
        published_miou=None,
        published_miou_pamr=None,
        templates=(),
    )
    files = sorted(name for name in _names_below(images) if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"no images below {images} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})", path=str(images))
    samples = [
        LabelledImage(
            name=Path(file).with_suffix("").as_posix(),
            image=images / file,
            label=labels / Path(file).with_suffix(".png"),
        )
        for file in files
    ]
    return FolderDataset(benchmark=benchmark, samples=tuple(samples))


def _class_names(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: write one class name a line, line 0 names label 0") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}", path=str(path)) from error
    while lines and not lines[-1].strip():
        lines.pop()
    classes = tuple(" ".join(line.split()) for line in lines)
    if not classes or (len(classes) == 1 and classes[0].lower() == BACKGROUND_NAME):
        raise InputError(f"{path} names no class: write one name a line, line 0 names label 0", path=str(path))
    if len(classes) > IGNORED:
        raise InputError(
            f"{path} names {len(classes)} classes, but {IGNORED} is the most: label {IGNORED} stands for pixels that "
            "do not count. Leave some out, or evaluate them in parts",
            path=str(path),
        )
    for number, name in enumerate(classes):
        if not name:
            raise InputError(f"{path}, line {number + 1} is empty, but it names label {number}", path=str(path))
        if name.lower() in (other.lower() for other in classes[:number]):
            raise InputError(f"{path}, line {number + 1}: {name!r} is there twice; name each class once")
    return classes
