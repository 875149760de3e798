"""How large the activations of an ONNX graph grow on real images, measured with ONNX Runtime in constant memory."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from tclkit.runtime.errors import InputError

from ._measured_graph import Batch, Measurement, Tensors
from .histograms import LEVELS, RANGE_METHODS, RangeMethod, entropy_limit, mse_limit, percentile_limit
from .ranges_cache import Values, remembered

logger = logging.getLogger(__name__)

RangeProgress = Callable[[str, int, int], None]
"""Called as progress(what_is_done, images_done, images_in_all); images_in_all is 0 where it is not known."""

_FINE_STEPS = 32766  # largest magnitude in int16 steps, with room for the rounding of the step
_COUNT_CHUNK = 1 << 18  # values counted at once: their int64 copy stays in the cache
_MAX_FETCHED_BYTES = 256 << 20
_SMALLEST_RANGE = 1e-30  # below this a float32 step underflows: all zeros, for our purpose
_RANGE_OF_ZEROS = 1.0


def absolute_maxima(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[Batch],
    *,
    channel_axis: Mapping[str, int] | None = None,
    content_hash: str | None = None,
    progress: RangeProgress | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Measure the largest magnitude of tensors over all images, of the whole tensor or by channel.

    Args:
        model: an ONNX graph; it is not changed.
        tensors: names of float tensors: inputs of the graph, or what its nodes produce.
        batches: (B, ...) arrays for the graph's one input, or mappings from input names to arrays. Arrays are run one
            image at a time unless the graph's batch is fixed.
        channel_axis: the axis to keep, for the tensors to measure by channel; negative ones count from the end.
        content_hash: what names the images (`CalibrationSet.content_hash`): the result is then kept in the cache
            folder, and found there the next time. None measures always.
        progress: called after every run.

    Returns:
        By tensor, float32: a 0-d array, or (channels,). Infinities and NaN of the graph show as such.

    Raises:
        InputError: a tensor that is not in the graph, a weight, or no float; an axis it does not have; no batch; or
            batches that do not fit the graph.
        BackendError: ONNX Runtime cannot load the graph.
    """
    known = Tensors(model)
    names = _checked_names(tensors, known)
    axes = dict(channel_axis or {})
    if strangers := sorted(set(axes) - set(names)):
        raise InputError(f"channel_axis names {strangers[0]!r}, which is not among the tensors to measure")

    def measure() -> Values:
        maxima = _extremes(model, known, names, batches, axes, progress).maxima
        return {name: value.tolist() for name, value in maxima.items()}

    key = {"what": "maxima", "axes": axes}
    values = _maybe_remembered(model, names, content_hash, key, measure)
    return {name: np.asarray(values[name], np.float32) for name in names}


def float_tensor_maxima(
    model: onnx.ModelProto,
    batches: Iterable[Batch],
    *,
    content_hash: str | None = None,
    progress: RangeProgress | None = None,
) -> dict[str, float]:
    """Measure the largest magnitude of every float tensor that a node of the graph produces, in the graph's order.

    For the check against half precision's 65504. Arguments and errors are those of `absolute_maxima`; tensors inside
    branches and loop bodies are not measured.
    """
    names = Tensors(model).floats()
    maxima = absolute_maxima(model, names, batches, content_hash=content_hash, progress=progress)
    return {name: float(maxima[name]) for name in names}


def activation_ranges(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[Batch],
    *,
    method: RangeMethod = "mse",
    percentile: float = 99.99,
    bins: int = 2048,
    content_hash: str | None = None,
    progress: RangeProgress | None = None,
) -> dict[str, float]:
    """Choose the symmetric range of tensors for 8 bits: the magnitude that becomes 127.

    `minmax` takes the largest magnitude, in one pass over the images. The others take a second pass, in which every
    value is counted in 32766 steps of that magnitude; see `mse_limit`, `entropy_limit` and `percentile_limit`. Memory
    does not grow with the number of images: at most 256 MB of activations (or one tensor, if that is larger) are
    outside ONNX Runtime at a time; more of them take further passes.

    Args:
        model: an ONNX graph; it is not changed.
        tensors: names of float tensors: inputs of the graph, or what its nodes produce.
        batches: as for `absolute_maxima`, and to be iterated more than once: a list or a `CalibrationSet.calibration`.
        method: "mse", "entropy", "minmax" or "percentile".
        percentile: in (0, 100]; of all values of a tensor, so many % lie within its range.
        bins: bins of magnitudes that entropy compares, 128 to 32766.
        content_hash: see `absolute_maxima`.
        progress: called after every run.

    Returns:
        By tensor, positive. A tensor that is 0 on all images is announced and gets 1.0.

    Raises:
        InputError: as `absolute_maxima`; the method is unknown, a parameter out of range, the batches an iterator, or a
            tensor is infinite or NaN on some image.
        BackendError: ONNX Runtime cannot load the graph.
    """
    _check_method(method, percentile, bins)
    if isinstance(batches, Iterator):
        raise InputError("activation ranges need the images more than once: give a list of batches, not an iterator")
    known = Tensors(model)
    names = _checked_names(tensors, known)

    def measure() -> Values:
        return dict(_ranges(model, known, names, batches, method, percentile, bins, progress))

    all_parameters: dict[str, dict[str, Any]] = {
        "mse": {},
        "entropy": {"bins": bins},
        "percentile": {"percentile": float(percentile)},
        "minmax": {},
    }
    parameters = all_parameters[method]
    values = _maybe_remembered(model, names, content_hash, {"what": method, **parameters}, measure)
    return {name: float(np.asarray(values[name])) for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Extremes:
    """maxima: by tensor, float32. elements: by tensor, in one run."""

    maxima: dict[str, NDArray[np.float32]]
    elements: dict[str, int]


def _extremes(
    model: onnx.ModelProto,
    known: Tensors,
    names: Sequence[str],
    batches: Iterable[Batch],
    axes: Mapping[str, int],
    progress: RangeProgress | None,
) -> _Extremes:
    measurement = Measurement(model, known)
    for name in names:
        measurement.add_extremes(name, axes.get(name))
    maxima: dict[str, NDArray[np.float32]] = {}
    elements: dict[str, int] = {}
    total = _image_count(batches)
    for done, results in measurement.runs(batches):
        for index, name in enumerate(names):
            largest, smallest, sums, size = results[4 * index : 4 * index + 4]
            magnitude = np.maximum(np.abs(largest), np.abs(smallest)).astype(np.float32)
            magnitude = np.where(np.isnan(sums), np.float32(np.nan), magnitude)  # ReduceMax may pass over a NaN
            maxima[name] = np.maximum(maxima.get(name, magnitude), magnitude)
            elements[name] = max(elements.get(name, 0), int(size))
        if progress:
            progress("largest activations", done, total)
    return _Extremes(maxima=maxima, elements=elements)


def _ranges(
    model: onnx.ModelProto,
    known: Tensors,
    names: Sequence[str],
    batches: Iterable[Batch],
    method: RangeMethod,
    percentile: float,
    bins: int,
    progress: RangeProgress | None,
) -> dict[str, float]:
    extremes = _extremes(model, known, names, batches, {}, progress)
    maxima = {name: float(value) for name, value in extremes.maxima.items()}
    for name, value in maxima.items():
        if not np.isfinite(value):
            raise InputError(f"tensor {name!r} reaches {value} on the calibration images; it has no range", tensor=name)
    zeros = [name for name, value in maxima.items() if value < _SMALLEST_RANGE]
    if zeros:
        named = ", ".join(zeros[:5]) + (", ..." if len(zeros) > 5 else "")
        logger.warning("%d tensor(s) are 0 on all calibration images and get the range 1: %s", len(zeros), named)
    ranges = maxima | dict.fromkeys(zeros, _RANGE_OF_ZEROS)
    counted = [name for name in names if name not in zeros]
    if method == "minmax" or not counted:
        return ranges
    for group in _groups(counted, extremes.elements):
        counts = _fine_counts(model, known, {name: maxima[name] for name in group}, batches, progress)
        for name in group:
            ranges[name] = _limit(counts[name], maxima[name], method, percentile, bins)
    return ranges


def _groups(names: Sequence[str], elements: Mapping[str, int]) -> Iterator[list[str]]:
    """Tensors whose int16 copies fit into the limit together."""
    group: list[str] = []
    size_bytes = 0
    for name in names:
        tensor_bytes = 2 * elements[name]
        if group and size_bytes + tensor_bytes > _MAX_FETCHED_BYTES:
            yield group
            group, size_bytes = [], 0
        group.append(name)
        size_bytes += tensor_bytes
    yield group


def _fine_counts(
    model: onnx.ModelProto,
    known: Tensors,
    maxima: Mapping[str, float],
    batches: Iterable[Batch],
    progress: RangeProgress | None,
) -> dict[str, NDArray[np.int64]]:
    """By tensor, how many values have which magnitude, in steps of maximum / 32766; int64 (32768,)."""
    measurement = Measurement(model, known)
    for name, maximum in maxima.items():
        measurement.add_quantized(name, maximum / _FINE_STEPS)
    signed = {name: np.zeros(1 << 16, np.int64) for name in maxima}
    scratch = np.empty(_COUNT_CHUNK, np.int64)
    total = _image_count(batches)
    for done, results in measurement.runs(batches):
        for name, steps in zip(maxima, results, strict=True):
            _count(steps.reshape(-1).view(np.uint16), signed[name], scratch)
        if progress:
            progress("activation histograms", done, total)
    return {name: _folded(name, counts) for name, counts in signed.items()}


def _count(steps: NDArray[np.uint16], counts: NDArray[np.int64], scratch: NDArray[np.int64]) -> None:
    for start in range(0, steps.size, scratch.size):
        piece = steps[start : start + scratch.size]
        indices = scratch[: piece.size]
        indices[...] = piece  # what bincount would otherwise copy anew each time
        counts += np.bincount(indices, minlength=counts.size)


def _folded(name: str, signed: NDArray[np.int64]) -> NDArray[np.int64]:
    """Both signs of int16, counted as uint16, put together."""
    if signed[1 << 15]:  # -32768: beyond the maximum of the first pass, or NaN
        raise InputError(
            f"tensor {name!r} differs between two passes over the images; give the same batches each time", tensor=name
        )
    counts = signed[: 1 << 15].copy()
    counts[1:] += signed[: 1 << 15 : -1]
    return counts


def _limit(counts: NDArray[np.int64], maximum: float, method: str, percentile: float, bins: int) -> float:
    step = maximum / _FINE_STEPS
    if method == "percentile" and percentile == 100:
        return maximum
    if method in ("mse", "percentile"):
        limit = mse_limit(counts, step) if method == "mse" else percentile_limit(counts, step, percentile)
        # The count of a step holds the values half a step around it.
        return min(maximum, max(step, limit - step / 2))
    coarse = np.minimum(np.arange(counts.size) * bins // _FINE_STEPS, bins - 1)
    return entropy_limit(np.bincount(coarse, counts, bins).astype(np.int64), maximum / bins)


def _check_method(method: str, percentile: float, bins: int) -> None:
    if method not in RANGE_METHODS:
        raise InputError(f"unknown range method {method!r}: it is one of {', '.join(RANGE_METHODS)}", method=method)
    if not 0 < percentile <= 100:
        raise InputError(f"percentile should be in (0, 100], found {percentile}")
    if not LEVELS <= bins <= _FINE_STEPS:
        raise InputError(f"bins should be {LEVELS} to {_FINE_STEPS}, found {bins}")


def _checked_names(tensors: Sequence[str], known: Tensors) -> list[str]:
    names = list(dict.fromkeys(tensors))
    if not names:
        raise InputError("no tensors are named to measure")
    known.check(names)
    return names


def _maybe_remembered(
    model: onnx.ModelProto,
    names: Sequence[str],
    content_hash: str | None,
    key: Mapping[str, Any],
    measure: Callable[[], Values],
) -> Values:
    if content_hash is None:
        return measure()
    model_hash = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    return remembered({"model": model_hash, "images": content_hash, "tensors": list(names), **key}, measure)


def _image_count(batches: Iterable[Batch]) -> int:
    if isinstance(batches, (list, tuple)):
        return sum(1 if isinstance(batch, Mapping) else len(batch) for batch in batches)
    return int(getattr(batches, "images", 0))
