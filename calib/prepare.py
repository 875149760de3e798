"""Label maps as the benchmarks expect them, made from what their publishers ship.

| benchmark | is made from | becomes |
|---|---|---|
| coco_stuff | annotations/val2017/ID.png (stuffthingmaps) | annotations/val2017/ID_labelTrainIds.png |
| coco_object | the same, or annotations/instances_val2017.json | annotations/val2017/ID_instanceTrainIds.png |
| context, context59 | trainval_merged.json (PASCAL in Detail) | SegmentationClassContext/ID.png and the split files |
| cityscapes | gtFine/val/CITY/ID_gtFine_labelIds.png | gtFine/val/CITY/ID_gtFine_labelTrainIds.png |

Every file is written whole or not at all, and what is there already stays: a conversion that was interrupted goes on
where it stopped. What COCO-Object was made from is noted beside its label maps, so that two sources are not mixed.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tclkit.runtime.errors import InputError
from tclkit.runtime.files import atomic_file
from tclkit.runtime.images import DEFAULT_MAX_PIXELS

from .benchmarks import IGNORED, Benchmark, benchmark_named
from .coco_masks import mask_from_segmentation
from .datasets import benchmark_root
from .json_stream import stream_arrays
from .label_files import LabelMap, read_label_map, write_label_map
from .progress import silent

SOURCES: Final = ("auto", "pixelmaps", "instances")
"""What COCO-Object is made from."""

Progress = Callable[[str, int, int], None]
_INSTANCES = "annotations/instances_val2017.json"
_DETAIL = "trainval_merged.json"
_SOURCE_NOTE = "instanceTrainIds.source"  # beside COCO-Object's label maps: what they were made from

_UNKNOWN = "a source that is not noted"

# COCO numbers its things 1..90 and its stuff 92..182; eleven of these numbers were never used. Pixel maps hold the
# number less one.
_UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
_COCO_IDS = tuple(number for number in range(1, 183) if number not in _UNUSED_COCO_IDS)
_COCO_THINGS = 80

# PASCAL-Context's 59 frequent classes in the numbering of all 459, ascending: the order of the class names.
_CONTEXT_IDS = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159,
    162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397,
    415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip

_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(kw_only=True, slots=True)
class Prepared:
    """What a conversion did.

    written: files made now. kept: files that were there already.
    source: what the label maps were made from.
    problems: (file, reason) of what could not be converted.
    """

    written: int = 0
    kept: int = 0
    source: str = ""
    problems: list[tuple[str, str]] = field(default_factory=list)


def prepare_labels(key: str, folder: Path, *, source: str = "auto", progress: Progress | None = None) -> Prepared:
    """Make the label maps of one benchmark.

    Args:
        key: of the benchmark; one that needs no conversion has nothing written.
        folder: the benchmark's own root, or a folder of data sets; see `open_benchmark`.
        source: for coco_object: "pixelmaps" (what the published figures were made with), "instances", or "auto" for
            what label maps that are there were made from, else the first of these that is there.
        progress: called with (what, done, total).

    Raises:
        InputError: unknown benchmark or source, or what it is made from is not there (says where it is expected), or
            label maps of another source are there.
    """
    benchmark = benchmark_named(key)
    if source not in SOURCES:
        raise InputError(f"unknown source {source!r}: it is one of {', '.join(SOURCES)}", source=source)
    if source != "auto" and key != "coco_object":
        raise InputError(f"only coco_object can be made from two sources, {key} has one")
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder", path=str(folder))
    root = benchmark_root(benchmark, folder)
    report = progress or silent
    if key == "cityscapes":
        return _remapped(benchmark, root, "_gtFine_labelIds.png", cityscapes_table(), report)
    if key == "coco_stuff":
        return _remapped(benchmark, root, ".png", coco_stuff_table(), report)
    if key == "coco_object":
        return _coco_object(benchmark, root, source, report)
    if key in ("context", "context59"):
        return _context(benchmark, root, report)
    return Prepared(source="nothing: the label maps are used as they are shipped")


def cityscapes_table() -> npt.NDArray[np.uint8]:
    """(256,) train id of every Cityscapes label id; what is not evaluated becomes 255."""
    return _table(dict(zip(_CITYSCAPES_IDS, range(19), strict=True)), IGNORED)


def coco_stuff_table() -> npt.NDArray[np.uint8]:
    """(256,) train id 0..170 of every value of COCO's pixel maps; 255 stays."""
    return _table({number - 1: index for index, number in enumerate(_COCO_IDS)}, IGNORED)


def coco_object_table() -> npt.NDArray[np.uint8]:
    """(256,) class 1..80 of every value of COCO's pixel maps; stuff and what nobody labelled become background, 0."""
    return _table({number - 1: index + 1 for index, number in enumerate(_COCO_IDS[:_COCO_THINGS])}, 0)


def _table(values: Mapping[int, int], otherwise: int) -> npt.NDArray[np.uint8]:
    table = np.full(256, otherwise, np.uint8)
    for source, target in values.items():
        table[source] = target
    return table


def _remapped(
    benchmark: Benchmark, root: Path, source_suffix: str, table: npt.NDArray[np.uint8], progress: Progress
) -> Prepared:
    """Pass every label file through a table of 256 values."""
    labels = root / benchmark.labels
    sources = [path for path in sorted(labels.rglob(f"*{source_suffix}")) if "TrainIds" not in path.name]
    if not sources:
        raise InputError(f"nothing to convert: expected {labels}/**/*{source_suffix}", path=str(labels))
    outcome = Prepared(source=f"{labels}/**/*{source_suffix}")
    for done, path in enumerate(sources):
        progress(f"{benchmark.key} label maps", done, len(sources))
        target = path.with_name(path.name.removesuffix(source_suffix) + benchmark.label_suffix)
        _write_once(target, functools.partial(_through_table, path, table), outcome)
    progress(f"{benchmark.key} label maps", len(sources), len(sources))
    return outcome


def _through_table(path: Path, table: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    label_map = read_label_map(path)
    if label_map.size and not 0 <= int(label_map.min()) <= int(label_map.max()) <= 255:
        raise InputError(f"{path} holds labels up to {label_map.max()}; 0..255 are expected", path=str(path))
    return np.asarray(table[label_map])


def _coco_object(benchmark: Benchmark, root: Path, source: str, progress: Progress) -> Prepared:
    labels = root / benchmark.labels
    before = _noted_source(benchmark, labels)
    if source == "auto":
        has_maps = any("TrainIds" not in path.name for path in labels.glob("*.png"))
        chosen = before if before in SOURCES else "pixelmaps" if has_maps else "instances"
    else:
        chosen = source
    if chosen == "instances" and not (root / _INSTANCES).is_file():
        raise InputError(
            f"COCO-Object is made from the pixel maps {labels}/*.png (stuffthingmaps_trainval2017) or from "
            f"{root / _INSTANCES}; neither is there",
            path=str(root / _INSTANCES),
        )
    if source != "auto" and before not in (None, source):
        raise InputError(
            f"the label maps in {labels} were made from {before}; to make them from {source}, first delete "
            f"{labels}/*{benchmark.label_suffix}",
            path=str(labels),
        )
    if before is None and (chosen == "instances" or labels.is_dir()):
        with atomic_file(labels / _SOURCE_NOTE) as temporary:
            temporary.write_text(chosen, encoding="utf-8")
    if chosen == "pixelmaps":
        outcome = _remapped(benchmark, root, ".png", coco_object_table(), progress)
    else:
        outcome = _coco_object_from_instances(benchmark, root, progress)
    if before == _UNKNOWN:
        outcome.source += f" (those that were there from {_UNKNOWN})"
    return outcome


def _noted_source(benchmark: Benchmark, labels: Path) -> str | None:
    """What the label maps there were made from; None where there are none."""
    if not any(labels.glob(f"*{benchmark.label_suffix}")):
        return None
    try:
        return (labels / _SOURCE_NOTE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return _UNKNOWN


def _coco_object_from_instances(benchmark: Benchmark, root: Path, progress: Progress) -> Prepared:
    """Draw instances: crowds first, then the large before the small, so that nothing small is painted over."""
    images: dict[int, tuple[str, tuple[int, int]]] = {}
    annotations: defaultdict[int, list[tuple[bool, float, int, Any]]] = defaultdict(list)
    path = root / _INSTANCES
    class_of = {number: index + 1 for index, number in enumerate(_COCO_IDS[:_COCO_THINGS])}
    with _layout_of(path):
        for key, element in stream_arrays(path):
            if key == "images":
                number = int(element["id"])
                images[number] = _stem_and_size(element)
            elif key == "annotations":
                drawn = (not element["iscrowd"], -float(element["area"]), class_of[int(element["category_id"])])
                annotations[int(element["image_id"])].append((*drawn, element["segmentation"]))
    outcome = Prepared(source=str(path))
    for done, (number, (stem, size)) in enumerate(images.items()):
        progress("coco_object label maps", done, len(images))
        target = root / benchmark.labels / f"{stem}{benchmark.label_suffix}"
        drawn_first = sorted(annotations[number], key=lambda annotation: annotation[:2])
        shapes = [(label, segmentation) for _, _, label, segmentation in drawn_first]
        _write_once(target, functools.partial(_drawn, shapes, size), outcome)
    progress("coco_object label maps", len(images), len(images))
    return outcome


def _context(benchmark: Benchmark, root: Path, progress: Progress) -> Prepared:
    """PASCAL in Detail's annotations, in the file's order: of overlapping ones the last stays."""
    path = next((place for place in (root / _DETAIL, root.parent / _DETAIL) if place.is_file()), root / _DETAIL)
    if not path.is_file():
        raise InputError(f"PASCAL-Context is made from {path} (PASCAL in Detail), which is not there", path=str(path))
    images: dict[int, tuple[str, tuple[int, int], str]] = {}
    annotations: defaultdict[int, list[tuple[int, Any]]] = defaultdict(list)
    class_of = {number: index + 1 for index, number in enumerate(_CONTEXT_IDS)}
    with _layout_of(path):
        for key, element in stream_arrays(path):
            if key == "images":
                number = int(element["image_id"])
                images[number] = (*_stem_and_size(element), element["phase"])
            elif key == "annos_segmentation":
                label = class_of[int(element["category_id"])]
                annotations[int(element["image_id"])].append((label, element["segmentation"]))
    wanted = {number: image for number, image in images.items() if image[2] in ("train", "val")}
    outcome = Prepared(source=str(path))
    for done, (number, (stem, size, _)) in enumerate(wanted.items()):
        progress("context label maps", done, len(wanted))
        target = root / benchmark.labels / f"{stem}{benchmark.label_suffix}"
        shapes = annotations[number]
        _write_once(target, functools.partial(_drawn, shapes, size), outcome)
    progress("context label maps", len(wanted), len(wanted))
    for phase in ("train", "val"):
        names = sorted(stem for stem, _, part in wanted.values() if part == phase)
        with atomic_file((root / str(benchmark.split)).with_name(f"{phase}.txt")) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return outcome


def _stem_and_size(image: Mapping[str, Any]) -> tuple[str, tuple[int, int]]:
    """File name without its suffix, and (H, W), of an image's entry; to be called in `_layout_of`."""
    height, width = int(image["height"]), int(image["width"])
    if min(height, width) < 1 or height * width > DEFAULT_MAX_PIXELS:
        raise ValueError(f"an image of {height} x {width} pixels")
    return Path(image["file_name"]).stem, (height, width)


@contextlib.contextmanager
def _layout_of(path: Path) -> Iterator[None]:
    """Turn what a file of another layout raises into one error that names the file."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        message = f"{path} is not laid out as expected: {type(error).__name__} {error}"
        raise InputError(message, path=str(path)) from error


def _drawn(shapes: list[tuple[int, Any]], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    label_map = np.zeros(size, np.uint8)
    for label, segmentation in shapes:
        label_map[mask_from_segmentation(segmentation, size)] = label
    return label_map


def _write_once(target: Path, make: Callable[[], LabelMap], outcome: Prepared) -> None:
    if target.is_file():
        outcome.kept += 1
        return
    try:
        write_label_map(target, make())
    except InputError as error:
        outcome.problems.append((target.name, error.message))
    else:
        outcome.written += 1
