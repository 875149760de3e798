"""From an image of any size to the fixed input of an image graph, and the way back for its masks.

Three fits. `whole` scales the image until it fits inside the input and pads the rest with the mean colour, `stretch`
scales both sides on their own, `slide` scales the short side and covers the image with overlapping windows. Each is a
`FitPlan`: the image is resized once, cut into windows, and every window is padded to the input, centred as in the
reference.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .fitted_masks import FittedMasks
from .upsample import resize_masks
from .windows import Window, WindowAverage, window_positions

Fit = Literal["whole", "stretch", "slide"]
FITS: tuple[str, ...] = get_args(Fit)
LONG_SIDE_LIMIT = 2048  # of the published protocol
_SAME_ASPECT = 0.1  # of log(W/H): sides are multiples of the patch, so that no two sizes need to be exactly alike


def check_image(image_hwc: object) -> NDArray[np.uint8]:
    """Return the array if it is one RGB image, (H, W, 3) uint8; say how to make it one if it is not.

    Raises:
        InputError: wrong type, dtype or shape; the message names the remedy.
    """
    if _is_array(image_hwc):
        remedy = _image_remedy(image_hwc)
        if remedy is None:
            return image_hwc.astype(np.uint8, copy=False)
        found = f"{image_hwc.dtype} of shape {image_hwc.shape}"
    else:
        remedy = _type_remedy(image_hwc)
        found = type(image_hwc).__name__
    raise InputError(f"an image is a uint8 RGB array of shape (H, W, 3), but this is {found}: {remedy}", found=found)


def _is_array(value: object) -> TypeGuard[NDArray[np.generic]]:
    return isinstance(value, np.ndarray)


def _image_remedy(image: NDArray[np.generic]) -> str | None:
    """What to do to make an image of the array; None if it is one."""
    if image.size == 0:
        return "it has no pixels; check where it was cut or read"
    if image.ndim == 2:
        return "grey images take np.stack([image] * 3, axis=-1)"
    if image.ndim == 4:
        return "give one image at a time, image[0]"
    if image.ndim != 3:
        return "give one image, not a flat buffer or a stack"
    if image.shape[2] != 3:
        if image.shape[0] == 3:
            return "colours come last, image.transpose(1, 2, 0)"
        if image.shape[2] == 4:
            return "drop the alpha channel, image[..., :3]"
        if image.shape[2] == 1:
            return "grey images take np.repeat(image, 3, axis=2)"
        return "it needs 3 colours"
    if image.dtype == np.uint8:
        return None
    if np.issubdtype(image.dtype, np.floating):
        return "floats in 0..1 take (image * 255).round().astype(np.uint8)"
    if image.dtype == np.uint16:
        return "16-bit values take (image // 257).astype(np.uint8)"
    return "values in 0..255 take image.astype(np.uint8)"


def _type_remedy(value: object) -> str:
    if isinstance(value, (str, bytes)) or hasattr(value, "__fspath__"):
        return "read the file with load_image(path) first"
    if type(value).__module__.startswith("PIL."):
        return "take np.asarray(image.convert('RGB'))"
    if type(value).__module__.startswith("torch"):
        return "take tensor.cpu().numpy(), colours last, uint8"
    if value is None:
        return "the camera or file gave no frame"
    return "make it a numpy array"


def rescaled_size(height: int, width: int, *, short: int = 448, long: int = LONG_SIDE_LIMIT) -> tuple[int, int]:
    """The published protocol's size of an image: short side to `short` unless the long side would pass `long`.

    Returns:
        (H, W) in pixels, at least 1 each. Small images grow.

    Source: mmcv 1.6.2, `rescale_size`.
    """
    factor = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_image(image_hwc: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resize bilinearly on bytes, without antialiasing, as the published protocol does (OpenCV's INTER_LINEAR).

    Args:
        image_hwc: (H, W, 3) uint8.
        size: (H', W') in pixels.
    """
    if image_hwc.shape[:2] == tuple(size):
        return image_hwc
    height, width = size
    resized = cv2.resize(np.ascontiguousarray(image_hwc), (width, height), interpolation=cv2.INTER_LINEAR)
    return resized.astype(np.uint8, copy=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class FitPlan:
    """How one image is brought to the input of an image graph.

    Attributes:
        fit: which of the three.
        source_size: (H, W) of the image as given.
        resized_size: (H, W) after resizing.
        graph_size: (H, W) of the graph's input; windows that are smaller are padded to it.
        windows: what of the resized image becomes one input each.
    """

    fit: str
    source_size: tuple[int, int]
    resized_size: tuple[int, int]
    graph_size: tuple[int, int]
    windows: tuple[Window, ...]

    def inputs(self, image_hwc: NDArray[np.uint8], pad_rgb: tuple[int, int, int]) -> Iterator[NDArray[np.uint8]]:
        """Yield the input of every window, (H, W, 3) uint8 of the graph's size, padded with `pad_rgb`."""
        resized = resize_image(image_hwc, self.resized_size)
        for window in self.windows:
            crop = resized[window.top : window.bottom, window.left : window.right]
            if (window.height, window.width) == self.graph_size:
                yield np.ascontiguousarray(crop)
                continue
            padded = np.empty((*self.graph_size, 3), np.uint8)
            padded[:] = pad_rgb
            rows, columns = self._content(window)
            padded[rows, columns] = crop
            yield padded

    def window_masks(self, window: Window, grid_masks: NDArray[np.float32]) -> NDArray[np.float32]:
        """Bring a window's masks from the mask grid (N, h, w) to its pixels (N, window.height, window.width)."""
        rows, columns = self._content(window)
        return resize_masks(grid_masks, self.graph_size)[:, rows, columns]

    def join(self, grid_masks: Iterator[NDArray[np.float32]], count: int) -> FittedMasks:
        """Put the masks of all windows, in order, together: N masks of the resized size.

        Those of a single window stay on the grid until they are asked for.

        Args:
            grid_masks: one (N, h, w) float32 a window, on the mask grid.
            count: N.
        """
        if len(self.windows) == 1:
            return self._on_grid(self.windows[0], next(iter(grid_masks)))
        average = WindowAverage(count, self.resized_size)
        for window, masks in zip(self.windows, grid_masks, strict=True):
            average.add(window, self.window_masks(window, masks))
        return FittedMasks.from_array(average.mean())

    def _on_grid(self, window: Window, grid_masks: NDArray[np.float32]) -> FittedMasks:
        height, width = (side // cells for side, cells in zip(self.graph_size, grid_masks.shape[1:], strict=True))
        is_whole = (grid_masks.shape[1] * height, grid_masks.shape[2] * width) == self.graph_size
        if not (is_whole and _is_power_of_two(height) and _is_power_of_two(width)):
            # rows of such a grid resized on their own would differ from the whole in rounding
            return FittedMasks.from_array(np.ascontiguousarray(self.window_masks(window, grid_masks)))
        rows, columns = self._content(window)
        return FittedMasks(grid=grid_masks, cell=(height, width), rows=rows, columns=columns)

    def _content(self, window: Window) -> tuple[slice, slice]:
        """Rows and columns of the input that hold the window: centred, the odd pixel of padding right and below."""
        top = (self.graph_size[0] - window.height) // 2
        left = (self.graph_size[1] - window.width) // 2
        return slice(top, top + window.height), slice(left, left + window.width)


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def check_fit(fit: str) -> None:
    """Refuse what is not one of `FITS` with an InputError."""
    if fit not in FITS:
        raise InputError(f"unknown fit {fit!r}: it is one of {', '.join(FITS)}", fit=fit)


def plan_fit(
    source_size: tuple[int, int], graph_sizes: Sequence[tuple[int, int]], fit: str = "whole", *, patch_size: int = 16
) -> FitPlan:
    """Plan how an image of `source_size` reaches one of the image graphs.

    `whole` and `stretch` use the graph of the nearest aspect, `slide` the squarest one; ties go to the first.

    Args:
        source_size: (H, W) of the image.
        graph_sizes: (H, W) of the image graphs.
        fit: "whole", "stretch" or "slide".
        patch_size: pixels; an image that would shrink below one patch is refused.

    Raises:
        InputError: unknown fit, or an aspect ratio so extreme that less than one patch of the short side would remain.
    """
    check_fit(fit)
    graph_size = _nearest_size(source_size, graph_sizes, fit)
    if fit == "stretch":
        resized_size = graph_size
    elif fit == "whole":
        resized_size = _size_inside(source_size, graph_size)
    else:
        resized_size = rescaled_size(*source_size, short=min(graph_size))
    if fit != "stretch" and min(resized_size) < patch_size:
        slides = min(rescaled_size(*source_size, short=min(graph_size))) >= patch_size
        message = _aspect_message(source_size, resized_size, fit, patch_size, slides=slides)
        raise InputError(message, source_size=source_size, fit=fit)
    stride = (max(1, graph_size[0] // 2), max(1, graph_size[1] // 2))
    return FitPlan(
        fit=fit,
        source_size=source_size,
        resized_size=resized_size,
        graph_size=graph_size,
        windows=window_positions(resized_size, graph_size, stride),
    )


def plan_scales(
    source_size: tuple[int, int], graph_sizes: Sequence[tuple[int, int]], fit: str = "whole", *, patch_size: int = 16
) -> tuple[FitPlan, ...]:
    """Plan how an image reaches image graphs of one aspect and several sizes, the finest first; see `plan_fit`.

    Sizes whose sides are in the same ratio to within a tenth count as of one aspect. Aspects that come in one size
    only are passed over, however near.

    Raises:
        InputError: as `plan_fit`, or no aspect comes in two sizes.
    """
    check_fit(fit)
    nearest = _nearest_size(source_size, sizes_with_scales(graph_sizes), fit)
    sizes = sorted((size for size in graph_sizes if _is_same_aspect(size, nearest)), key=math.prod, reverse=True)
    return tuple(plan_fit(source_size, [size], fit, patch_size=patch_size) for size in sizes)


def sizes_with_scales(graph_sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of the (H, W) that have at least one of another size and the same aspect beside them.

    Raises:
        InputError: there are none; names the remedy.
    """
    found = [size for size in graph_sizes if sum(_is_same_aspect(size, other) for other in graph_sizes) > 1]
    if not found:
        have = ", ".join(f"{height}x{width}" for height, width in graph_sizes)
        height, width = graph_sizes[0]
        raise InputError(
            f"scales need image graphs of one aspect in two sizes or more, found {have}. Export the model with more: "
            f"tclkit export CHECKPOINT -o FOLDER --size {height}x{width} --size {2 * height}x{2 * width}",
            found=have,
        )
    return found


def _nearest_size(source_size: tuple[int, int], graph_sizes: Sequence[tuple[int, int]], fit: str) -> tuple[int, int]:
    target_aspect = 1.0 if fit == "slide" else source_size[1] / source_size[0]
    return min(graph_sizes, key=lambda size: abs(math.log(size[1] / size[0] / target_aspect)))


def _is_same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    return abs(math.log(size[1] * other[0] / (size[0] * other[1]))) <= _SAME_ASPECT


def _size_inside(source_size: tuple[int, int], graph_size: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the source's aspect that fits inside the graph's input."""
    factor = min(graph_size[0] / source_size[0], graph_size[1] / source_size[1])
    height, width = (max(1, int(side * factor + 0.5)) for side in source_size)
    return min(height, graph_size[0]), min(width, graph_size[1])


def _aspect_message(
    source_size: tuple[int, int], resized_size: tuple[int, int], fit: str, patch_size: int, *, slides: bool
) -> str:
    height, width = source_size
    return (
        f"the image is {width} x {height} pixels; fitted ({fit}) it would be {resized_size[1]} x {resized_size[0]}, "
        f"thinner than one patch of {patch_size}. Cut it into pieces, or use the fit "
        + ("'slide' or 'stretch'" if slides else "'stretch'")
    )
