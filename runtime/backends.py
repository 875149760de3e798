"""What runs a bundle's graphs: the interface, which backends are there, and the choice among them."""

import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .cpu_records import graph_file
from .errors import BackendError, BundleError, EngineMismatchError
from .extras import install_command
from .manifest import RUN_PRECISIONS

_log = logging.getLogger(__name__)


class Features(Protocol):
    """What the image graph makes of a batch of images; prompts are compared with it.

    Where they lie is the backend's affair: reading an attribute may copy from a device.
    """

    @property
    def grounded(self) -> NDArray[np.float32]:
        """(B, D, 4h, 4w) float32, of unit length over D, on the mask grid."""
        ...

    @property
    def kp(self) -> NDArray[np.float32] | None:
        """(B, D, h, w) float32, of unit length over D, on the patch grid; None for a bundle without the KP branch."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFeatures:
    """Features in the host's memory; see `Features`.

    grounded: (B, D, 4h, 4w) float32.
    kp: (B, D, h, w) float32, or None.
    """

    grounded: NDArray[np.float32]
    kp: NDArray[np.float32] | None


class Backend(Protocol):
    """Runs the three graphs of one bundle. Not for use by two threads at once; by one after another it is."""

    @property
    def name(self) -> str:
        """Name of the backend, as given to `choose_backend`."""
        ...

    @property
    def precision(self) -> str:
        """Precision of the image graphs: "fp32", "fp16", "bf16" or "int8"."""
        ...

    @property
    def reason(self) -> str:
        """Why this backend runs, with its version, its precision, and why no better one was taken."""
        ...

    def image_features(self, images_BHWC: NDArray[np.uint8]) -> Features:
        """Run the image graph of the images' size.

        Args:
            images_BHWC: (B, H, W, 3) uint8 RGB; (H, W) is one of the bundle's image sizes.

        Raises:
            InputError: wrong shape or dtype, or a size the bundle has no graph for.
            BackendError: the graph cannot be loaded or run.
        """
        ...

    def masks(self, features: Features, text_ND: NDArray[np.float32], kp_w: float) -> NDArray[np.float32]:
        """Compare features with text embeddings.

        Args:
            features: from `image_features` of the same bundle.
            text_ND: (N, D) float32 of unit length.
            kp_w: share of the KP branch, in [0, 1].

        Returns:
            (B, N, 4h, 4w) float32 soft masks in [0, 1], on the mask grid.

        Raises:
            InputError: wrong shape or dtype, or kp_w above 0 for a bundle without the KP branch.
            BackendError: the graph cannot be loaded or run.
        """
        ...

    def encode_text(self, token_ids_ML: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run the text graph: (M, L) int64 token ids -> (M, D) float32 embeddings, not normalised.

        Raises:
            InputError: wrong shape or dtype, or more tokens than the model reads.
            BackendError: the graph cannot be loaded or run.
        """
        ...

    def close(self) -> None:
        """Release what it holds; it cannot be used afterwards."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendStatus:
    """Whether a backend can run here.

    name: as given to `choose_backend`.
    available: whether this version of tclkit can use it here.
    version: of the installed package; None when none is installed.
    remedy: what to do to get it; empty when available.
    """

    name: str
    available: bool
    version: str | None
    remedy: str


def available_backends() -> tuple[BackendStatus, ...]:
    """Status of every backend tclkit knows, best first; imports none of them.

    For tensorrt, cuda-python is asked for a device, where both are installed.
    """
    return tuple(_status(name) for name in _ORDER)


def choose_backend(name: str, bundle: Bundle, *, precision: str = "auto", threads: int | None = None) -> Backend:
    """Open a backend on a bundle, and announce which one and why in the log.

    Args:
        name: "auto" takes the best that can run this bundle here, else the backend's name. Where TensorRT or OpenVINO
            is installed but cannot run the bundle, because no engine was built here, say, the reason is logged as a
            warning.
        bundle: what it is to run.
        precision: "fp32", "fp16", "bf16" or "int8", never replaced by another; "auto" takes with TensorRT the first of
            int8, fp16 and fp32 that has an engine for every image size, with OpenVINO the first of int8 and bf16 that
            passed the gate on this machine, else fp32, with ONNX Runtime fp32.
        threads: CPU threads of one operator; None takes every CPU this process may use.

    Raises:
        BackendError: unknown, not installed, not implemented, or no graph or engine of this precision.
        EngineMismatchError: TensorRT was asked for by name, and the engines are for another machine or graph.
        BundleError: TensorRT was asked for by name, and an engine is damaged.
    """
    _check_names(name, precision)
    if name == "auto":
        backend = _best_backend(bundle, precision, threads)
    else:
        status = _status(name)
        if not status.available:
            raise BackendError(f"backend {name} cannot be used. {status.remedy}", backend=name)
        backend = _OPENERS[name](bundle, precision, threads, "asked for")
    _log.info("backend %s for %s: %s", backend.name, bundle.name, backend.reason)
    return backend


def image_file(bundle: Bundle, backend: str, precision: str, size: tuple[int, int]) -> str | None:
    """Name of the image graph's file that a backend runs, or has compiled, to compute in a precision.

    Args:
        bundle: opened.
        backend: its name; OpenVINO takes graphs for processors where there are some.
        precision: computed in.
        size: (H, W) in pixels of the images.

    Returns:
        None where the bundle has none.
    """
    if backend == "openvino":
        return graph_file(bundle, precision, size)
    return next((entry.files.get(precision) for entry in bundle.manifest.images if entry.size == size), None)


_ORDER = ("tensorrt", "openvino", "onnxruntime")
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
}
_TITLES = {"tensorrt": "TensorRT", "openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
_LAST = _ORDER[-1]
_REMEDIES = {
    "tensorrt": "It is not installed. Jetson: it comes with JetPack (apt install python3-libnvinfer; make the virtual "
    "environment with --system-site-packages). Servers: pip install tensorrt. Or take --backend onnxruntime",
    "openvino": f"It is not installed: {install_command('openvino')}. Or take --backend onnxruntime",
    "onnxruntime": "It is not installed: pip install onnxruntime",
}


def _check_names(name: str, precision: str) -> None:
    if name not in ("auto", *_ORDER):
        raise BackendError(f"unknown backend {name!r}. Choose auto, {', '.join(_ORDER)}", backend=name)
    if precision not in ("auto", *RUN_PRECISIONS):
        message = f"unknown precision {precision!r}. Choose auto, {', '.join(RUN_PRECISIONS)}"
        raise BackendError(message, precision=precision)


def _best_backend(bundle: Bundle, precision: str, threads: int | None) -> Backend:
    """The first backend that is installed and takes the bundle; why each better one does not is announced."""
    refusals: list[str] = []
    for name in _ORDER:
        status = _status(name)
        if not status.available and (status.version is None or name == _LAST):
            continue
        reason = " ".join(refusals) or "the best backend available here"
        why_not = status.remedy
        if status.available:
            try:
                return _OPENERS[name](bundle, precision, threads, reason)
            except (BackendError, EngineMismatchError, BundleError) as error:
                if name == _LAST:
                    raise
                why_not = error.message
        title = f"{_TITLES[name]} {status.version}"
        _log.warning("%s does not run on %s: %s", bundle.name, title, why_not)
        refusals.append(f"{title} cannot be used: {why_not}")
    message = " ".join(["no backend is installed. Install one: pip install onnxruntime.", *refusals])
    raise BackendError(message.rstrip("."), backend="auto")


def _open_tensorrt(bundle: Bundle, precision: str, threads: int | None, reason: str) -> Backend:
    from .tensorrt_backend import open_tensorrt

    if precision == "bf16":
        raise BackendError(
            "TensorRT engines are fp32, fp16 or int8, not bf16. Take --precision fp16", precision=precision
        )
    return open_tensorrt(bundle, precision=precision, threads=threads, reason=reason)


def _open_openvino(bundle: Bundle, precision: str, threads: int | None, reason: str) -> Backend:
    from .openvino_backend import open_openvino

    return open_openvino(bundle, precision=precision, threads=threads, reason=reason)


def _open_onnxruntime(bundle: Bundle, precision: str, threads: int | None, reason: str) -> Backend:
    from .onnxruntime_backend import OnnxRuntimeBackend

    if precision == "bf16":
        remedy = f"Take --backend openvino ({install_command('openvino')}), or --precision fp32"
        raise BackendError(f"ONNX Runtime does not compute in bf16. {remedy}", precision=precision)
    taken = "fp32" if precision == "auto" else precision
    reason = f"{reason} (onnxruntime {_installed_version('onnxruntime')}, {taken})"
    return OnnxRuntimeBackend(bundle, precision=taken, threads=threads, reason=reason)


_OPENERS: dict[str, Callable[[Bundle, str, int | None, str], Backend]] = {
    "tensorrt": _open_tensorrt,
    "openvino": _open_openvino,
    "onnxruntime": _open_onnxruntime,
}


def _status(name: str) -> BackendStatus:
    version = _installed_version(name)
    remedy = _REMEDIES[name] if version is None else ""
    if version is not None and name == "tensorrt":
        remedy = _device_remedy()
    return BackendStatus(name=name, available=not remedy, version=version, remedy=remedy)


def _device_remedy() -> str:
    """What TensorRT lacks to run here besides itself; empty for nothing."""
    from .cuda_memory import device_count

    try:
        device_count()
    except BackendError as error:
        return f"{error.message}. Or take --backend onnxruntime"
    return ""


def _installed_version(name: str) -> str | None:
    try:
        if importlib.util.find_spec(name) is None:
            return None
    except ValueError:  # loaded, but not by the import system
        pass
    for distribution in _DISTRIBUTIONS[name]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203
            continue
    return str(getattr(sys.modules.get(name), "__version__", "unknown"))
