"""The ONNX Runtime backend: one CPU session per graph, made when the graph is first needed."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .backend_inputs import check_features, check_images, check_interface, check_prompts, check_token_ids
from .backends import Features, HostFeatures
from .bundle import Bundle
from .engines import build_command
from .errors import BackendError, InputError
from .memory import trim_heap
from .optimised_graphs import WORTHWHILE_BYTES, OptimisedGraphs
from .processor import usable_cpus

if TYPE_CHECKING:
    import onnxruntime

_FEATURES = ("grounded", "kp")
_OPTIMISATION = "CPUExecutionProvider, all optimisations, 1"  # part of the key of optimised graphs
_log = logging.getLogger(__name__)


class OnnxRuntimeBackend:
    """Runs a bundle's graphs on the CPU with ONNX Runtime; see `Backend`.

    Args:
        bundle: an opened bundle.
        precision: which image graphs to take, "fp32", "fp16" or "int8".
        threads: CPU threads of one operator; None takes every CPU this process may use.
        reason: why this backend was chosen.
        optimised: where graphs are kept as ONNX Runtime has optimised them, which makes the next start faster; None
            takes the user's cache folder, False keeps none.

    Raises:
        BackendError: onnxruntime is not installed, or the bundle has no image graph of this precision.
        InputError: threads is below 1.
    """

    name = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        *,
        precision: str = "fp32",
        threads: int | None = None,
        reason: str = "asked for",
        optimised: OptimisedGraphs | Literal[False] | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads should be 1 or more, found {threads}")
        self._bundle = bundle
        self._image_files = _image_files(bundle, precision)
        self.threads = threads or usable_cpus()
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self.precision = precision
        self.reason = reason
        self._optimised = OptimisedGraphs() if optimised is None else optimised
        _import_onnxruntime()

    def image_features(self, images_BHWC: NDArray[np.uint8]) -> HostFeatures:
        """Run the image graph of the images' size; see `Backend.image_features`."""
        size = check_images(self._bundle, images_BHWC, self._image_files)
        names = _FEATURES if self._bundle.manifest.has_kp else _FEATURES[:1]
        file = self._image_files[size]
        # One after the other: an image fills the cores already, and the memory of several would be taken for good.
        runs = [self._run(file, names, {"image": one_HWC[None]}) for one_HWC in images_BHWC]
        outputs = runs[0] if len(runs) == 1 else [np.concatenate(parts) for parts in zip(*runs, strict=True)]
        return HostFeatures(grounded=outputs[0], kp=outputs[1] if len(outputs) > 1 else None)

    def masks(self, features: Features, text_ND: NDArray[np.float32], kp_w: float) -> NDArray[np.float32]:
        """Compare features with text embeddings; see `Backend.masks`."""
        check_features(self._bundle, features)
        check_prompts(self._bundle, text_ND, kp_w)
        feeds: dict[str, NDArray[Any]] = {"grounded": features.grounded, "text": text_ND}
        if self._bundle.manifest.has_kp:
            feeds |= {"kp": np.asarray(features.kp), "kp_w": np.asarray(kp_w, np.float32)}
        return self._run(self._bundle.manifest.masks, ("masks",), feeds)[0]

    def encode_text(self, token_ids_ML: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run the text graph; see `Backend.encode_text`."""
        check_token_ids(self._bundle, token_ids_ML)
        return self._run(self._bundle.manifest.text, ("embeddings",), {"token_ids": token_ids_ML})[0]

    def close(self) -> None:
        """Release the sessions; a graph that is asked for again is loaded again."""
        self._sessions.clear()

    def _run(self, file: str, outputs: Sequence[str], feeds: dict[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        if file not in self._sessions:
            self._sessions[file] = self._open_session(file, outputs, feeds)
            trim_heap()  # of the file's content and of weights that were packed
        contiguous = {name: np.asarray(value, order="C") for name, value in feeds.items()}
        try:
            results: list[NDArray[np.float32]] = self._sessions[file].run(list(outputs), contiguous)
        except Exception as error:  # onnxruntime's own exceptions share no base but this
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feeds.items())
            message = f"ONNX Runtime could not run {file} of {self._bundle.name} on {shapes}: {_first_line(error)}"
            raise BackendError(message, file=file) from error
        return results

    def _open_session(
        self, file: str, outputs: Sequence[str], feeds: dict[str, NDArray[Any]]
    ) -> "onnxruntime.InferenceSession":
        path = self._bundle.path(file)
        try:
            session = self._kept_session(path) if _is_worth_keeping(path) else None
            session = session or self._session(path)
        except Exception as error:  # onnxruntime's own exceptions share no base but this
            version = _import_onnxruntime().__version__
            message = f"ONNX Runtime {version} cannot load {path}: {_first_line(error)}"
            raise BackendError(f"{message}. A newer one may: pip install -U onnxruntime", file=file) from error
        check_interface(str(path), "inputs", [{one.name} for one in session.get_inputs()], feeds)
        check_interface(str(path), "outputs", [{one.name} for one in session.get_outputs()], outputs)
        return session

    def _kept_session(self, path: Path) -> "onnxruntime.InferenceSession | None":
        """A session of the graph as it was optimised before, or optimised and kept now; None where none are kept."""
        kept = self._optimised
        if kept is False:
            return None
        entry = kept.entry(path, f"onnxruntime {_import_onnxruntime().__version__} {_OPTIMISATION}")
        graph = kept.read(entry)
        if graph is not None:
            try:
                return self._session(graph, is_optimised=True)
            except Exception as error:  # of another build of the same version, say
                _log.warning("the optimised graph %s cannot be loaded (%s); it is made anew", entry, _first_line(error))
                kept.drop(entry)
        try:
            with tempfile.TemporaryDirectory(prefix="tclkit-") as folder:
                written = Path(folder) / "optimised.onnx"
                session = self._session(path, write_to=written)
                kept.write(entry, written.read_bytes())
        except Exception as error:  # no room for temporary files, say
            session = self._session(path)  # where the graph cannot be loaded, that is what is raised
            _log.warning("the graph %s cannot be kept optimised (%s); that is done each time", path, _first_line(error))
        return session

    def _session(
        self, graph: Path | bytes, *, is_optimised: bool = False, write_to: Path | None = None
    ) -> "onnxruntime.InferenceSession":
        onnxruntime = _import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # what fails is raised, and told once
        # A plan of all activations at once is a second arena beside the one that the first run filled: 130 to 300 MB on
        # ViT-B/16, and no quicker.
        options.enable_mem_pattern = False
        # Threads that wait for work in a loop take the CPU from whoever draws or shares the machine: without it a
        # stream of tcl-shapes takes half the CPU time; ViT-B/16 alone on an idle machine is 2 % slower.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if is_optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if write_to is not None:
            options.optimized_model_filepath = str(write_to)
        source = graph if isinstance(graph, bytes) else str(graph)
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _is_worth_keeping(path: Path) -> bool:
    return path.stat().st_size in WORTHWHILE_BYTES


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"onnxruntime cannot be imported ({error}). Install it: pip install onnxruntime") from error
    return onnxruntime


def _image_files(bundle: Bundle, precision: str) -> dict[tuple[int, int], str]:
    files: dict[tuple[int, int], str] = {
        (image.height, image.width): image.files[precision]
        for image in bundle.manifest.images
        if precision in image.files
    }
    if not files:
        have = ", ".join(bundle.manifest.precisions)
        message = f"{bundle.name} has no image graph in {precision}, only in {have}"
        remedy = f"Make it: {build_command(bundle, precision)} --prepare-only"
        raise BackendError(f"{message}. {remedy}", precision=precision)
    return files


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
