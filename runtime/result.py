"""What a segmentation returns: which pixel is which prompt, how sure, how large; as arrays, a picture, or JSON."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .files import atomic_file
from .fitted_masks import FittedMasks
from .labels import count_labels, labels_from_masks, scores_from_labels
from .upsample import resized_strips

if TYPE_CHECKING:
    from .regions import Region

_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_LARGEST_SIDES = {"JPEG": 65500, "WEBP": 16383}  # pixels, of libjpeg and libwebp
_SMALLEST_REGION = 1e-4


@dataclass(frozen=True, kw_only=True, eq=False)
class Segmentation:
    """One segmented image. What is a property here is made when it is first asked for, then kept.

    Attributes:
        image_hwc: (H, W, 3) uint8, the image itself, not a copy.
        names: the N prompts.
        label_map: (H, W) int16; -1 is background, i the i-th prompt.
        fitted: the soft masks as they came from the model; `fitted_masks` and `soft_masks` are arrays of them.
        threshold: value of the background; None when there was none.
        settings: how it was made: fit, kp_w, pamr and so on.
        model: name of the bundle.
        backend: name of what ran it.
        timings_ms: stage -> milliseconds.
        counters: the Segmenter's counters after this image.
    """

    image_hwc: NDArray[np.uint8]
    names: tuple[str, ...]
    label_map: NDArray[np.int16]
    fitted: FittedMasks
    threshold: float | None
    settings: Mapping[str, object]
    model: str
    backend: str
    timings_ms: Mapping[str, float]
    counters: Mapping[str, int]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the image in pixels."""
        return int(self.label_map.shape[0]), int(self.label_map.shape[1])

    @functools.cached_property
    def areas(self) -> dict[str, float]:
        """Prompt -> fraction of the image, in [0, 1]."""
        return _by_name(self.names, count_labels(self.label_map, len(self.names))[1:] / self.label_map.size)

    @functools.cached_property
    def scores(self) -> dict[str, float]:
        """Prompt -> mean of its soft mask over its own pixels, 0 where it has none."""
        return _by_name(self.names, scores_from_labels(self.fitted, self.label_map))

    @functools.cached_property
    def peaks(self) -> dict[str, float]:
        """Prompt -> highest value of its soft mask anywhere: how near a prompt that was not found came."""
        return _by_name(self.names, self.fitted_masks.max(axis=(1, 2)))

    @functools.cached_property
    def fitted_masks(self) -> NDArray[np.float32]:
        """(N, h, w) float32 soft masks at the size the model saw the image.

        With PAMR, prompts that cannot reach the threshold keep their unrefined masks.
        """
        return self.fitted.array()

    @functools.cached_property
    def soft_masks(self) -> NDArray[np.float32]:
        """(N, H, W) float32 soft masks in [0, 1] at image size."""
        masks = np.empty((len(self.names), *self.size), np.float32)
        for rows, strip in resized_strips(self.fitted_masks, self.size):
            masks[:, rows] = strip
        return masks

    def soft_mask(self, name: str) -> NDArray[np.float32]:
        """(H, W) float32 soft mask of one prompt at image size.

        Raises:
            InputError: no such prompt.
        """
        index = self._index(name)
        mask = self.fitted.band(index, slice(0, self.fitted.size[0]))
        strips = resized_strips(mask[None], self.size)
        return np.concatenate([strip[0] for _, strip in strips])

    def mask(self, name: str) -> NDArray[np.bool_]:
        """(H, W) bool, the pixels labelled with one prompt.

        Raises:
            InputError: no such prompt.
        """
        return np.asarray(self.label_map == self._index(name))

    def regions(self, *, min_area_fraction: float = _SMALLEST_REGION, simplify_px: float = 0.0) -> "list[Region]":
        """Connected regions of all prompts as boxes and polygons, the largest of each prompt first.

        Args:
            min_area_fraction: regions smaller than this share of the image are left out; 0 keeps all.
            simplify_px: pixels by which polygons may deviate; 0 is exact.
        """
        from .regions import regions_from_label_map

        min_area_px = self._pixels(min_area_fraction)
        return regions_from_label_map(self.label_map, self.names, min_area_px=min_area_px, simplify_px=simplify_px)

    def region_counts(self, *, min_area_fraction: float = _SMALLEST_REGION) -> dict[str, int]:
        """Prompt -> number of its regions, without tracing them; see `regions`.

        Args:
            min_area_fraction: as `regions`.
        """
        from .regions import count_regions

        counts = count_regions(self.label_map, len(self.names), min_area_px=self._pixels(min_area_fraction))
        return dict(zip(self.names, counts, strict=True))

    def overlay(
        self,
        *,
        opacity: float = 0.6,
        legend: bool = True,
        compare: bool = False,
        font: str | Path | None = None,
    ) -> NDArray[np.uint8]:
        """Draw the image with coloured pixels and a legend: (H', W', 3) uint8; see `draw_overlay`."""
        from .drawing import draw_overlay

        return draw_overlay(
            self.image_hwc,
            self.label_map,
            self.names,
            opacity=opacity,
            legend=legend,
            compare=compare,
            font=font,
        )

    def save_overlay(
        self,
        path: str | Path,
        *,
        opacity: float = 0.6,
        legend: bool = True,
        compare: bool = False,
        font: str | Path | None = None,
    ) -> Path:
        """Write the overlay to a PNG, JPEG, WebP, BMP or TIFF file, whole or not at all; returns its path.

        Raises:
            InputError: the suffix names none of these, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() not in _FORMATS:
            raise InputError(f"{path} should end in one of {', '.join(_FORMATS)}", path=str(path))
        overlay = self.overlay(opacity=opacity, legend=legend, compare=compare, font=font)
        _write_image(overlay, path, _FORMATS[path.suffix.lower()])
        return path

    def to_dict(
        self, *, min_area_fraction: float = _SMALLEST_REGION, simplify_px: float = 1.0, polygons: bool = True
    ) -> dict[str, Any]:
        """Everything but pixels, ready for JSON.

        Args:
            min_area_fraction: as `regions`.
            simplify_px: as `regions`; by default polygons deviate by a pixel, which saves most of their points.
            polygons: False leaves boxes only.
        """
        regions = self.regions(min_area_fraction=min_area_fraction, simplify_px=simplify_px)
        height, width = self.size
        return {
            "model": self.model,
            "backend": self.backend,
            "image": {"height": height, "width": width},
            "settings": {"threshold": self.threshold, **self.settings},
            "prompts": [
                {
                    "name": name,
                    "area_fraction": self.areas[name],
                    "score": self.scores[name],
                    "peak": self.peaks[name],
                    "regions": [_region_dict(region, polygons) for region in regions if region.index == index],
                }
                for index, name in enumerate(self.names)
            ],
            "background_fraction": max(0.0, 1.0 - sum(self.areas.values())),
            "timings_ms": {stage: round(value, 3) for stage, value in self.timings_ms.items()},
            "counters": dict(self.counters),
        }

    def _pixels(self, fraction: float) -> int:
        return round(fraction * self.label_map.size)

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise InputError(f"{name!r} is none of the prompts: {', '.join(self.names)}", name=name)
        return self.names.index(name)


def segmentation_from_masks(
    image_hwc: NDArray[np.uint8],
    names: Sequence[str],
    masks: FittedMasks | NDArray[np.float32],
    threshold: float | None,
    *,
    settings: Mapping[str, object] | None = None,
    model: str = "",
    backend: str = "",
    timings_ms: Mapping[str, float] | None = None,
    counters: Mapping[str, int] | None = None,
    label_map: NDArray[np.int16] | None = None,
) -> Segmentation:
    """Label an image from its soft masks; see `Segmentation` for the arguments.

    Args:
        masks: the soft masks, also as an array (N, h, w) float32.
        label_map: of these masks at this size and threshold, where it was made already.
    """
    fitted = masks if isinstance(masks, FittedMasks) else FittedMasks.from_array(masks)
    if label_map is None:
        label_map = labels_from_masks(fitted, (image_hwc.shape[0], image_hwc.shape[1]), threshold)
    return Segmentation(
        image_hwc=image_hwc,
        names=tuple(names),
        label_map=label_map,
        fitted=fitted,
        threshold=threshold,
        settings=settings or {},
        model=model,
        backend=backend,
        timings_ms=timings_ms or {},
        counters=counters or {},
    )


def _by_name(names: Sequence[str], values: NDArray[Any]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def _region_dict(region: "Region", polygons: bool) -> dict[str, Any]:
    described: dict[str, Any] = {"area_px": region.area_px, "box": list(region.box)}
    if polygons:
        described |= {"polygon": region.outer.tolist(), "holes": [hole.tolist() for hole in region.holes]}
    return described


def _write_image(image_hwc: NDArray[np.uint8], path: Path, image_format: str) -> None:
    from PIL import Image

    height, width = image_hwc.shape[:2]
    most = _LARGEST_SIDES.get(image_format, max(height, width))
    if max(height, width) > most:
        message = f"{path} cannot be written: {image_format} holds at most {most} pixels a side, found {width}x{height}"
        raise InputError(f"{message}; use .png", path=str(path))
    try:
        with atomic_file(path) as temporary:
            if image_format == "PNG":
                temporary.write_bytes(_png_from_image(image_hwc))
            else:
                Image.fromarray(image_hwc).save(temporary, image_format, quality=92)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}", path=str(path)) from error
    except ValueError as error:  # BMP has a largest size
        raise InputError(f"{path} cannot be written as {image_format}: {error}; use .png", path=str(path)) from error


def _png_from_image(image_hwc: NDArray[np.uint8]) -> bytes:
    """Compress with run lengths alone: a fifth of the time of Pillow's default for files of the same size."""
    import cv2

    options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    _, encoded = cv2.imencode(".png", cv2.cvtColor(image_hwc, cv2.COLOR_RGB2BGR), options)
    return encoded.tobytes()
