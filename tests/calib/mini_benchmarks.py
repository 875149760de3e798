"""The eight benchmarks in miniature: real JPEG and PNG files in the folders and encodings that their publishers ship.

Pictures are blocks of colour. A tiny bundle that calls its colours by class names (`CLASS_COLOURS`) labels them almost
without error, so figures can be predicted.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASS_COLOURS: dict[str, tuple[int, int, int]] = {
    "person": (255, 0, 0),
    "car": (0, 255, 0),
    "bicycle": (0, 0, 255),
    "aeroplane": (255, 255, 0),
    "sky": (0, 255, 255),
    "road": (255, 0, 255),
    "wall": (0, 0, 0),
    "tree": (255, 255, 255),
}
OTHER_RGB = (124, 116, 104)  # no class
SIZES = ((64, 96), (64, 64), (130, 65))  # (H, W): several windows, one window, windows from top to bottom
NAMES = ("2007_000033", "2007_000042", "2007_000061")

# What a file holds for a class, by benchmark. In COCO's pixel maps it is COCO's number less one.
VOC = {"aeroplane": 1, "bicycle": 2, "car": 7, "person": 15}
CONTEXT_IDS = {
    "aeroplane": 2,
    "bicycle": 23,
    "car": 59,
    "person": 284,
    "road": 324,
    "sky": 360,
    "tree": 420,
    "wall": 440,
}
COCO_PIXELS = {"person": 0, "bicycle": 1, "car": 2, "tree": 168}  # "railroad" has the token of "road" here
CITYSCAPES_IDS = {"road": 7, "wall": 12, "sky": 23, "person": 24, "car": 26, "bicycle": 33}
ADE = {"wall": 1, "sky": 3, "tree": 5, "road": 7, "person": 13, "car": 21, "bicycle": 128}


def scene(size: tuple[int, int], names: Sequence[str], turn: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of 16 pixels of `names` and of no class: picture (H, W, 3) uint8, and index into names (H, W), -1 none."""
    height, width = size
    rows, columns = np.arange(height) // 16, np.arange(width) // 16
    index = (rows[:, None] * 2 + columns + turn) % (len(names) + 1) - 1
    colours = np.array([*(CLASS_COLOURS[name] for name in names), OTHER_RGB], np.uint8)
    return colours[index], index


def write_all(root: Path) -> None:
    """Write all eight below `root`, as shipped: the label maps of four have to be prepared."""
    write_voc(root)
    write_context(root)
    write_coco(root)
    write_cityscapes(root)
    write_ade20k(root)


def write_voc(root: Path) -> None:
    folder = root / "VOCdevkit/VOC2012"
    for name, image, values in _scenes(VOC, 0):
        values[:, :2] = 255  # the border that nobody labelled
        _jpeg(folder / f"JPEGImages/{name}.jpg", image)
        _palette_png(folder / f"SegmentationClass/{name}.png", values)
    _text(folder / "ImageSets/Segmentation/val.txt", NAMES)
    _jpeg(folder / "JPEGImages/2007_009999.jpg", np.zeros((8, 8, 3), np.uint8))  # in no split


def write_context(root: Path) -> None:
    folder = root / "VOCdevkit/VOC2010"
    images, annotations = [], []
    for number, (name, image, values) in enumerate(_scenes(CONTEXT_IDS, 0)):
        _jpeg(folder / f"JPEGImages/{name}.jpg", image)
        height, width = values.shape
        described = {"image_id": number, "file_name": f"{name}.jpg", "height": height, "width": width}
        images.append({**described, "phase": "val" if number else "train"})
        for value in np.unique(values[values > 0]):
            segmentation = {"size": [height, width], "counts": run_text(values == value)}
            annotations.append(
                {"id": len(annotations), "image_id": number, "category_id": int(value), "segmentation": segmentation}
            )
    document = {"info": {"version": "3"}, "images": images, "annos_segmentation": annotations, "categories": []}
    (folder / "trainval_merged.json").write_text(json.dumps(document))


def write_coco(root: Path) -> None:
    folder = root / "coco_stuff164k"
    for number, (_, image, values) in enumerate(_scenes(COCO_PIXELS, 255)):
        _jpeg(folder / f"images/val2017/{number:012d}.jpg", image)
        _grey_png(folder / f"annotations/val2017/{number:012d}.png", values)


def write_cityscapes(root: Path) -> None:
    folder = root / "cityscapes"
    for number, (_, image, values) in enumerate(_scenes(CITYSCAPES_IDS, 0)):
        stem = f"val/{('lindau', 'munster')[number % 2]}/town_{number:06d}_000019"
        _png(folder / f"leftImg8bit/{stem}_leftImg8bit.png", image)
        _grey_png(folder / f"gtFine/{stem}_gtFine_labelIds.png", values)


def write_ade20k(root: Path) -> None:
    folder = root / "ade/ADEChallengeData2016"
    for number, (_, image, values) in enumerate(_scenes(ADE, 0)):
        _jpeg(folder / f"images/validation/ADE_val_{number:08d}.jpg", image)
        _grey_png(folder / f"annotations/validation/ADE_val_{number:08d}.png", values)


def write_own(folder: Path) -> None:
    """A user's own data: images, labels, names.txt."""
    names = ("car", "sky")
    for number, size in enumerate(SIZES):
        image, index = scene(size, names, number)
        _png(folder / f"images/shot-{number}.png", image)
        _grey_png(folder / f"labels/shot-{number}.png", index + 1)
    _text(folder / "names.txt", ("background", *names))


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's run lengths of a mask, column by column, beginning with what is outside."""
    flat = np.concatenate([[0], mask.T.ravel().astype(np.int8), [2]])
    starts = np.flatnonzero(np.diff(flat))
    runs = np.diff(np.concatenate([[0], starts]))
    return [int(run) for run in runs]


def run_text(mask: np.ndarray) -> str:
    """The same as COCO's text."""
    runs, text = run_lengths(mask), ""
    for index, run in enumerate(runs):
        value = run - (runs[index - 2] if index > 2 else 0)
        while True:
            five, value = value & 31, value >> 5
            is_last = value == (-1 if five & 16 else 0)
            text += chr((five if is_last else five | 32) + 48)
            if is_last:
                break
    return text


def _scenes(values_of: dict[str, int], none: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    table = np.array([*values_of.values(), none])
    drawn = (scene(size, list(values_of), turn) for turn, size in enumerate(SIZES))
    return [(name, image, table[index]) for name, (image, index) in zip(NAMES, drawn, strict=True)]


def _jpeg(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=98, subsampling=0)


def _png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def _grey_png(path: Path, values: np.ndarray) -> None:
    _png(path, values.astype(np.uint8))


def _palette_png(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette([(value * 37 + channel * 59) % 256 for value in range(256) for channel in range(3)])
    image.save(path)


def _text(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
