"""What runs a bundle's graphs: the interface, which backends are there, and the choice among them."""

import importlib.metadata
import importlib.util
import logging
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .errors import BackendError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """What the image graph makes of a batch of images; prompts are compared with it.

    grounded: (B, D, 4h, 4w) float32, of unit length over D, on the mask grid.
    kp: (B, D, h, w) float32, of unit length over D, on the patch grid; None for a bundle without the KP branch.
    """

    grounded: NDArray[np.float32]
    kp: NDArray[np.float32] | None


class Backend(Protocol):
    """Runs the three graphs of one bundle. Not for use by two threads at once."""

    @property
    def name(self) -> str:
        """Name of the backend, as given to `choose_backend`."""
        ...

    @property
    def reason(self) -> str:
        """One sentence: why this backend runs, with its version."""
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
    """Status of every backend tclkit knows, best first; imports none of them."""
    return tuple(_status(name) for name in _ORDER)


def choose_backend(name: str, bundle: Bundle, *, precision: str = "fp32", threads: int | None = None) -> Backend:
    """Open a backend on a bundle, and announce which one and why in the log.

    Args:
        name: "auto" takes the best that is available here, else the backend's name.
        bundle: what it is to run.
        precision: "fp32"; further ones where the bundle has them.
        threads: CPU threads of one operator; None takes every CPU this process may use.

    Raises:
        BackendError: unknown, not installed, not implemented, or no graph of this precision; names the remedy.
    """
    status = _chosen_status(name)
    from .onnxruntime_backend import OnnxRuntimeBackend

    version = f"onnxruntime {status.version}"
    reason = f"asked for ({version})" if name != "auto" else f"the best backend available here ({version})"
    backend = OnnxRuntimeBackend(bundle, precision=precision, threads=threads, reason=reason)
    _log.info("backend %s for %s: %s", backend.name, bundle.name, reason)
    return backend


_ORDER = ("tensorrt", "openvino", "onnxruntime")
_IMPLEMENTED = ("onnxruntime",)
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt",),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"),
}


def _chosen_status(name: str) -> BackendStatus:
    if name == "auto":
        available = [status for status in available_backends() if status.available]
        if not available:
            raise BackendError("no backend is installed. Install one: pip install onnxruntime", backend=name)
        return available[0]
    if name not in _ORDER:
        raise BackendError(f"unknown backend {name!r}. Choose auto, {', '.join(_ORDER)}", backend=name)
    status = _status(name)
    if not status.available:
        raise BackendError(f"backend {name} cannot be used. {status.remedy}", backend=name)
    return status


def _status(name: str) -> BackendStatus:
    version = _installed_version(name)
    if name not in _IMPLEMENTED:
        remedy = "This version of tclkit cannot run it yet: take --backend onnxruntime (or auto)"
    elif version is None:
        remedy = f"It is not installed: pip install {name}"
    else:
        remedy = ""
    return BackendStatus(name=name, available=not remedy, version=version, remedy=remedy)


def _installed_version(name: str) -> str | None:
    if importlib.util.find_spec(name) is None:
        return None
    for distribution in _DISTRIBUTIONS[name]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203
            continue
    return "unknown"
