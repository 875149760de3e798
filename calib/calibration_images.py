"""The images a compiled model is tuned and judged on: chosen by seed, free of duplicates, brought to the graph's input.

Fitted images lie in an unnamed file of the cache folder, not in memory: a set of 512 at 448x448 is 300 MB. Reading it
again costs a copy and gives the same bytes.
"""

import hashlib
import logging
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tclkit.runtime.errors import InputError
from tclkit.runtime.files import cache_folder
from tclkit.runtime.images import DEFAULT_MAX_PIXELS
from tclkit.runtime.preprocess import plan_fit

from .image_sources import REMEDY, ImageSource, open_source

logger = logging.getLogger(__name__)

CalibrationProgress = Callable[[str, int, int], None]
"""Called as progress(what_is_done, images_done, images_in_all)."""

DEFAULT_MEAN_RGB = (123.675, 116.28, 103.53)
DEFAULT_COUNT = 256
DEFAULT_HELD_BACK = 16
MIN_CALIBRATION_IMAGES = 2

# Two fitted images are one picture if their thumbnails of 8 x 8 mean colours differ by less than this, root mean square
# over the 192 values of 0..255.
NEAR_DUPLICATE_RMS = 4.0
_THUMBNAIL = (8, 8)
_REASONS_TOLD = 3


class ImageBatches:
    """Fitted images in batches; iterate as often as you like, the bytes are the same each time.

    Yields (B, H, W, 3) uint8 RGB arrays of their own memory; the last batch may be smaller. `len` counts batches.
    """

    def __init__(self, store: "_ImageStore", places: Sequence[int], batch_size: int) -> None:
        _check_batch_size(batch_size)
        self._store, self._places, self.batch_size = store, tuple(places), batch_size

    @property
    def images(self) -> int:
        """How many images there are in all batches."""
        return len(self._places)

    def __len__(self) -> int:
        return -(-len(self._places) // self.batch_size)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(self._places), self.batch_size):
            yield np.stack([self._store.read(place) for place in self._places[start : start + self.batch_size]])


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSet:
    """Images to calibrate with, and others, held back, to judge the result on. Made by `select_images`.

    calibration: the images that activation ranges are measured on.
    held_back: images of the same source, none of them (nor a near duplicate) among `calibration`.
    content_hash: hex SHA-256 of the graph size and of the calibration images' bytes, whatever their order.
    """

    calibration: ImageBatches
    held_back: ImageBatches
    content_hash: str
    _record: dict[str, Any] = field(repr=False)

    def describe(self) -> dict[str, Any]:
        """What bundle.json keeps of it: plain values, no folders of this machine.

        Keys: source (kind, name), size [H, W], fit, seed, asked, images, held_back, content_hash, held_back_hash,
        found (items in the source), duplicates, near_duplicates, unreadable.
        """
        return {**self._record, "source": dict(self._record["source"]), "size": list(self._record["size"])}


def select_images(
    source: str | Path,
    *,
    size: tuple[int, int],
    count: int = DEFAULT_COUNT,
    held_back: int = DEFAULT_HELD_BACK,
    seed: int = 0,
    fit: str = "whole",
    mean_rgb: tuple[float, float, float] = DEFAULT_MEAN_RGB,
    patch_size: int = 16,
    batch_size: int = 8,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: CalibrationProgress | None = None,
) -> CalibrationSet:
    """Choose calibration images from a source and bring them to a graph's input exactly as the Segmenter does.

    The choice depends on the seed and on the names in the source, not on the order in which they are listed. An image
    whose fitted pixels equal those of one already taken is left out, and so is a near duplicate: 8 x 8 mean colours
    that differ by less than 4 of 255 (root mean square), as those of neighbouring video frames do. Of a video, frames
    spread over its whole length are read. What cannot be read is counted and announced. If the source has fewer than
    `count` + `held_back` images, at most a third of them is held back, and the shortage is announced.

    Args:
        source: a folder (with its subfolders), a quoted glob, a video, webdataset shards (.tar; several by glob or
            braces), or a text file with one path a line, relative to its folder.
        size: (H, W) of the image graph's input.
        count: images to calibrate with.
        held_back: further images to judge with; 0 for none.
        seed: another seed, other images.
        fit: "whole" or "stretch", see `plan_fit`.
        mean_rgb: the bundle's `preprocessing.mean`, 0..255; what is padded has this colour.
        patch_size: of the model, in pixels; images that would shrink below one patch count as unreadable.
        batch_size: images in a batch.
        max_pixels: larger images are refused by their header and count as unreadable.
        progress: called after every image.

    Raises:
        InputError: the source is missing, of no known kind, empty or wholly unreadable; fewer than 2 images to
            calibrate with (and 1 to hold back) are left; or an argument is out of range.
    """
    _check_arguments(size, count, held_back, seed, fit)
    _check_batch_size(batch_size)
    wanted = count + held_back
    opened = open_source(source, wanted=wanted, seed=seed, max_pixels=max_pixels)
    chooser = _Chooser(size=size, fit=fit, mean_rgb=mean_rgb, patch_size=patch_size)
    chooser.take(opened, progress)
    chosen = chooser.first_by_rank(wanted)
    held = held_back if len(chosen) >= wanted else min(held_back, max(1, len(chosen) // 3))
    _announce(chooser, opened, source, len(chosen), wanted)
    if len(chosen) - held < MIN_CALIBRATION_IMAGES:
        raise InputError(_too_few_message(chooser, opened, source, held_back), source=str(source), images=len(chosen))
    # The first ones are held back: a larger `count` is judged on the same images.
    kept, judged = chosen[held:], chosen[:held]
    content_hash = chooser.hash_of(kept)
    record = {
        "source": {"kind": opened.kind, "name": opened.name},
        "size": tuple(size),
        "fit": fit,
        "seed": seed,
        "asked": count,
        "images": len(kept),
        "held_back": len(judged),
        "content_hash": content_hash,
        "held_back_hash": chooser.hash_of(judged),
        "found": opened.found,
        "duplicates": chooser.duplicates,
        "near_duplicates": chooser.near_duplicates,
        "unreadable": chooser.unreadable + len(opened.problems),
    }
    return CalibrationSet(
        calibration=ImageBatches(chooser.store, kept, batch_size),
        held_back=ImageBatches(chooser.store, judged, batch_size),
        content_hash=content_hash,
        _record=record,
    )


def _check_arguments(size: tuple[int, int], count: int, held_back: int, seed: int, fit: str) -> None:
    if len(size) != 2 or min(size) < 1:
        raise InputError(f"size should be the graph's (height, width) in pixels, found {size}")
    if count < MIN_CALIBRATION_IMAGES:
        raise InputError(f"calibration takes {MIN_CALIBRATION_IMAGES} images or more, found count {count}; try 256")
    if held_back < 0:
        raise InputError(f"held_back should be 0 or more, found {held_back}")
    if seed < 0:
        raise InputError(f"seed should be 0 or more, found {seed}")
    if fit not in ("whole", "stretch"):
        raise InputError(f"calibration images are fitted 'whole' or 'stretch', found {fit!r}", fit=fit)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size should be 1 or more, found {batch_size}")


class _ImageStore:
    """Fitted images of one size in an unnamed temporary file; it goes with the last object that reads it."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._shape = (*size, 3)
        self._bytes = size[0] * size[1] * 3
        self._lock = threading.Lock()
        folder = cache_folder() / "calibration"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        except OSError as error:
            raise InputError(
                f"{folder} cannot hold the calibration images ({error.strerror or error}); "
                "name another folder in TCLKIT_HOME",
                path=str(folder),
            ) from error
        weakref.finalize(self, self._file.close)
        self._count = 0

    def append(self, image_hwc: NDArray[np.uint8]) -> int:
        """Keep an image; returns its place."""
        try:
            with self._lock:
                self._file.seek(self._count * self._bytes)
                self._file.write(image_hwc.tobytes())
                self._file.flush()
        except OSError as error:
            raise InputError(
                f"the calibration images do not fit into {cache_folder()} ({error.strerror or error}): make room for "
                f"{self._bytes:,} bytes an image, take fewer, or name another folder in TCLKIT_HOME"
            ) from error
        self._count += 1
        return self._count - 1

    def read(self, place: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8, read-only."""
        with self._lock:
            self._file.seek(place * self._bytes)
            data = self._file.read(self._bytes)
        return np.frombuffer(data, np.uint8).reshape(self._shape)


class _Chooser:
    """Takes candidates one by one, keeps what is new, counts what is not."""

    def __init__(
        self, *, size: tuple[int, int], fit: str, mean_rgb: tuple[float, float, float], patch_size: int
    ) -> None:
        self.store = _ImageStore(size)
        self.duplicates = self.near_duplicates = self.unreadable = 0
        self.reasons: list[str] = []
        self._size, self._fit, self._patch_size = size, fit, patch_size
        red, green, blue = (min(255, max(0, round(value))) for value in mean_rgb)  # as the Segmenter rounds it
        self._pad_rgb = (red, green, blue)
        self._ranks: list[bytes] = []
        self._digests: list[bytes] = []
        self._known: set[bytes] = set()
        self._thumbnails = np.empty((0, 3 * _THUMBNAIL[0] * _THUMBNAIL[1]), np.float32)

    def take(self, source: ImageSource, progress: CalibrationProgress | None) -> None:
        """Read candidates until the source's share is full or it has no more."""
        for candidate in source.candidates:
            try:
                image = self._fitted(candidate.read())
            except InputError as error:
                self.unreadable += 1
                self.reasons.append(str(error))
                del self.reasons[_REASONS_TOLD:]
                continue
            self._keep_if_new(image, candidate.rank)
            if progress:
                progress("calibration images", len(self._ranks), source.takes)
            if len(self._ranks) == source.takes:
                return

    def first_by_rank(self, wanted: int) -> list[int]:
        """Places of the images that come first in the seeded order."""
        return sorted(range(len(self._ranks)), key=lambda place: self._ranks[place])[:wanted]

    def hash_of(self, places: Sequence[int]) -> str:
        """Hash of a set of images: of their size, and of the sorted SHA-256 of each one's bytes."""
        digest = hashlib.sha256(f"uint8 {self._size[0]}x{self._size[1]}x3\n".encode())
        for image_digest in sorted(self._digests[place] for place in places):
            digest.update(image_digest)
        return digest.hexdigest()

    def _fitted(self, image_hwc: NDArray[np.uint8]) -> NDArray[np.uint8]:
        source_size = (image_hwc.shape[0], image_hwc.shape[1])
        plan = plan_fit(source_size, [self._size], self._fit, patch_size=self._patch_size)
        return next(plan.inputs(image_hwc, self._pad_rgb))

    def _keep_if_new(self, image_hwc: NDArray[np.uint8], rank: bytes) -> None:
        digest = hashlib.sha256(image_hwc.tobytes()).digest()
        if digest in self._known:
            self.duplicates += 1
            return
        thumbnail = cv2.resize(image_hwc, _THUMBNAIL, interpolation=cv2.INTER_AREA).astype(np.float32).reshape(1, -1)
        distances = np.sqrt(np.mean((self._thumbnails - thumbnail) ** 2, axis=1))
        if distances.size and distances.min() < NEAR_DUPLICATE_RMS:
            self.near_duplicates += 1
            return
        self.store.append(image_hwc)
        self._ranks.append(rank)
        self._digests.append(digest)
        self._known.add(digest)
        self._thumbnails = np.concatenate([self._thumbnails, thumbnail])


def _announce(chooser: _Chooser, opened: ImageSource, source: str | Path, found: int, wanted: int) -> None:
    for problem in opened.problems[:_REASONS_TOLD]:
        logger.warning("%s", problem)
    if chooser.unreadable:
        first = "; ".join(chooser.reasons)
        logger.warning("%s: %d image(s) cannot be used and are left out: %s", source, chooser.unreadable, first)
    if 0 < found < wanted:
        logger.warning(
            "%s gives %d different images, %d were asked for%s", source, found, wanted, _left_out_text(chooser)
        )


def _left_out_text(chooser: _Chooser) -> str:
    counts = {
        "duplicates": chooser.duplicates,
        "near duplicates": chooser.near_duplicates,
        "unreadable": chooser.unreadable,
    }
    told = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
    return f" ({told} left out)" if told else ""


def _too_few_message(chooser: _Chooser, opened: ImageSource, source: str | Path, held_back: int) -> str:
    kept = chooser.first_by_rank(opened.takes)
    needed = f"{MIN_CALIBRATION_IMAGES} to calibrate with" + (" and 1 to judge on" if held_back else "")
    if not kept and chooser.reasons:
        return f"{source}: none of {opened.found} items can be used: {'; '.join(chooser.reasons)}. {REMEDY}"
    return (
        f"{source} gives {len(kept)} different image(s){_left_out_text(chooser)}; at least {needed} are needed, "
        f"and 100 or more are good. {REMEDY}"
    )
