"""The OpenVINO backend: a bundle's graphs compiled for this processor when they are first needed, or from the cache.

Precision is never OpenVINO's choice: left alone it computes in bfloat16 on every processor that can, so the type is set
for each graph. The image graph runs in "fp32", in "bf16" (the float32 graph, where the processor has bfloat16) or in
"int8" (the graph with Q/DQ pairs, the rest of it in bfloat16 where there is some, else in float32). The masks and text
graphs run in float32 always: embeddings are cached for every backend alike. "fp16" is refused: told to compute that
graph in half precision, OpenVINO 2026.4 took bfloat16 without a word on a processor that has no half precision.

Images are run one after the other by a model of that very shape. One fills the cores already: taken together, two to
eight of ViT-B/16 need 1.3 times as long in INT8 (two cores of an AMD EPYC), and as much more memory.
"""

import contextlib
import functools
import io
import logging
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._section import AGAIN
from .backend_inputs import (
    check_features,
    check_image_size,
    check_images,
    check_interface,
    check_prompts,
    check_token_ids,
)
from .backends import Features, HostFeatures
from .bfloat16_weights import round_weights
from .bundle import Bundle
from .compiled_models import CompiledKey, drop_compiled, load_compiled, store_compiled
from .cpu_records import (
    CpuIdentity,
    cpu_identity,
    cpu_misfit,
    fitting_precisions,
    graph_file,
    outdated_graphs,
    read_cpu_records,
)
from .engines import build_command
from .errors import BackendError, BundleError, InputError
from .extras import install_command
from .manifest import graph_precision
from .memory import trim_heap
from .processor import usable_cpus
from .reused_arrays import ReusedArrays

Size = tuple[int, int]
CPU_PRECISIONS = ("fp32", "bf16", "int8")
_FEATURES = ("grounded", "kp")
_ANY_BATCH = 0
_TELEMETRY = "openvino_telemetry"
_LONGEST_REASON = 300
_IR_VERSION_FIELD = b"\x08"  # the first field of every ONNX file, as protobuf writes it
_log = logging.getLogger(__name__)
_core_lock = threading.Lock()


class OpenVinoBackend:
    """Runs a bundle's graphs on the CPU with OpenVINO; see `Backend`. Most callers use `open_openvino`.

    This class computes in any precision that it can; whether the result is good enough the gate decides, which
    `open_openvino` asks for.

    `float_type` is OpenVINO's name of the type that the image graph's floats are computed in, "f32" or "bf16".

    Args:
        bundle: an opened bundle.
        precision: of the image graph, "fp32", "bf16" or "int8".
        threads: CPU threads of one operator; None takes every CPU this process may use.
        keep_compiled: keep what is compiled in the user's cache, and look there first.
        reason: why this backend was chosen.

    Raises:
        BackendError: OpenVINO is not installed, the processor has no bfloat16, or the bundle has no such graph.
        InputError: threads is below 1.
    """

    name = "openvino"

    def __init__(
        self,
        bundle: Bundle,
        *,
        precision: str = "fp32",
        threads: int | None = None,
        keep_compiled: bool = True,
        reason: str = "asked for",
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads should be 1 or more, found {threads}")
        self._bundle = bundle
        self._core = openvino_core()
        self.identity = cpu_identity(self._core)
        check_cpu_precision(self._core, precision)
        self.float_type = "bf16" if _has_bf16(self._core) and precision != "fp32" else "f32"
        self._image_files = _image_files(bundle, precision)
        self.threads = threads or usable_cpus()
        self.precision = precision
        self.reason = reason
        self._keep_compiled = keep_compiled
        self._models: dict[str, _Model] = {}
        self._arrays = ReusedArrays()

    def image_features(self, images_BHWC: NDArray[np.uint8]) -> HostFeatures:
        """Run the image graph of the images' size; see `Backend.image_features`."""
        size = check_images(self._bundle, images_BHWC, self._image_files)
        model = self._image_model(size)
        outputs = self._feature_arrays(size, len(images_BHWC))
        for index in range(len(images_BHWC)):
            one = slice(index, index + 1)
            self._run(model, {"image": images_BHWC[one]}, {name: array[one] for name, array in outputs.items()})
        return HostFeatures(grounded=outputs["grounded"], kp=outputs.get("kp"))

    def masks(self, features: Features, text_ND: NDArray[np.float32], kp_w: float) -> NDArray[np.float32]:
        """Compare features with text embeddings; see `Backend.masks`."""
        check_features(self._bundle, features)
        check_prompts(self._bundle, text_ND, kp_w)
        batch, _, rows, columns = features.grounded.shape
        feeds: dict[str, NDArray[Any]] = {"grounded": features.grounded, "text": text_ND}
        if self._bundle.manifest.has_kp:
            feeds |= {"kp": np.asarray(features.kp), "kp_w": np.asarray(kp_w, np.float32)}
        masks = self._arrays.take((batch, len(text_ND), rows, columns))
        model = self._model(self._bundle.manifest.masks, list(feeds), ["masks"])
        return self._run(model, feeds, {"masks": masks})["masks"]

    def encode_text(self, token_ids_ML: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run the text graph; see `Backend.encode_text`."""
        check_token_ids(self._bundle, token_ids_ML)
        manifest = self._bundle.manifest
        embeddings = np.empty((len(token_ids_ML), manifest.model.embed_dim), np.float32)
        model = self._model(manifest.text, ["token_ids"], ["embeddings"])
        return self._run(model, {"token_ids": token_ids_ML}, {"embeddings": embeddings})["embeddings"]

    def prepare(self, size: Size) -> None:
        """Compile now what one image of a size (H, W) and prompts need, so that the first image waits for nothing."""
        check_image_size(self._bundle, size, self._image_files)
        self._image_model(size)
        manifest = self._bundle.manifest
        kp = ["kp", "kp_w"] if manifest.has_kp else []
        self._model(manifest.masks, ["grounded", "text", *kp], ["masks"])

    def close(self) -> None:
        """Release the compiled models; a graph that is asked for again is compiled, or read from the cache, again."""
        self._models.clear()
        self._arrays.clear()

    def _image_model(self, size: Size) -> "_Model":
        outputs = _FEATURES if self._bundle.manifest.has_kp else _FEATURES[:1]
        return self._model(self._image_files[size], ["image"], outputs, hint=self.float_type, batch=1)

    def _feature_arrays(self, size: Size, batch: int) -> dict[str, NDArray[np.float32]]:
        """Arrays for the image graph's outputs that nobody else has: features outlive the call."""
        model = self._bundle.manifest.model
        rows, columns = (side // model.patch_size for side in size)
        scales = {"grounded": model.mask_scale} | ({"kp": 1} if self._bundle.manifest.has_kp else {})
        return {
            name: self._arrays.take((batch, model.embed_dim, rows * scale, columns * scale))
            for name, scale in scales.items()
        }

    def _model(
        self, file: str, inputs: Sequence[str], outputs: Sequence[str], *, hint: str = "f32", batch: int = _ANY_BATCH
    ) -> "_Model":
        if file not in self._models:
            key = CompiledKey(
                graph_sha256=self._bundle.manifest.files[file].sha256, hint=hint, batch=batch, identity=self.identity
            )
            found = self._imported(key) if self._keep_compiled else None
            made = found or self._compiled(file, key)
            for what, names, expected in (("inputs", made.inputs, inputs), ("outputs", made.outputs, outputs)):
                check_interface(str(self._bundle.path(file)), what, names, expected)
            if found is None and self._keep_compiled:
                store_compiled(key, made.exported())
            self._models[file] = made
            trim_heap()
        return self._models[file]

    def _imported(self, key: CompiledKey) -> "_Model | None":
        """The model from the cache; None where it is not there, or OpenVINO does not take it."""
        import openvino

        mapped = load_compiled(key)
        if mapped is None:
            return None
        tensor = openvino.Tensor(mapped.insisted_on(), shared_memory=True)  # OpenVINO's own cache is read-only as well
        try:
            with mapped.releasing_pages():  # OpenVINO makes its own of most of them: both together were the peak
                compiled = self._core.import_model(tensor, "CPU", self._properties(key.hint))
                return _Model(compiled, (tensor, mapped))
        except RuntimeError as error:  # whole, and yet not what this OpenVINO reads: the graph is there to compile
            _log.warning("%s cannot be read (%s): the graph is compiled anew", key.path, _reason(error))
            drop_compiled(key)
            return None

    def _compiled(self, file: str, key: CompiledKey) -> "_Model":
        path = self._bundle.path(file)
        _check_onnx(path, file)
        try:
            model = self._core.read_model(path)
            if key.batch != _ANY_BATCH:
                shape = model.inputs[0].partial_shape
                shape[0] = key.batch
                model.reshape({model.inputs[0]: shape})
            if key.hint == "bf16":
                round_weights(model)
            return _Model(self._core.compile_model(model, "CPU", self._properties(key.hint)), None)
        except (RuntimeError, IndexError) as error:  # OpenVINO's exceptions; IndexError: a graph without inputs
            message = f"{self.identity} cannot compile {path}: {_reason(error)}"
            remedy = "A newer one may: pip install -U openvino, or take --backend onnxruntime"
            raise BackendError(f"{message}. {remedy}", file=file) from error

    def _properties(self, hint: str) -> dict[str, Any]:
        return {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.threads}

    def _run(
        self, model: "_Model", feeds: Mapping[str, NDArray[Any]], outputs: dict[str, NDArray[np.float32]]
    ) -> dict[str, NDArray[np.float32]]:
        try:
            model.run(feeds, outputs)
        except RuntimeError as error:
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feeds.items())
            message = f"{self.identity} could not run {self._bundle.name} on {shapes}: {_reason(error)}"
            raise BackendError(message) from error
        return outputs


class _Model:
    """A compiled model with one request, which reads and writes arrays where they lie."""

    def __init__(self, compiled: Any, content: Any) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._content = content  # an imported model computes with the weights in it; it has to go last
        self.inputs = [one.get_names() for one in compiled.inputs]
        self.outputs = [one.get_names() for one in compiled.outputs]  # after fusion one tensor may have several names

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]) -> None:
        import openvino

        arrays = {**{name: _readable(value) for name, value in feeds.items()}, **outputs}
        # A request keeps no array alive, and those that had to be copied are nobody else's: held until it has run.
        held = {name: openvino.Tensor(array, shared_memory=True) for name, array in arrays.items()}
        for name, tensor in held.items():
            self._request.set_tensor(name, tensor)
        self._request.infer()

    def exported(self) -> memoryview:
        stream = io.BytesIO()
        self._compiled.export_model(stream)
        return stream.getbuffer()


def open_openvino(
    bundle: Bundle, *, precision: str = "auto", threads: int | None = None, reason: str = "asked for"
) -> OpenVinoBackend:
    """Open a bundle on this processor, in a precision that passed the gate on it.

    Args:
        bundle: opened.
        precision: of the image graphs. "fp32" needs no gate; "bf16" and "int8" have to have passed it here for every
            image size; "auto" takes the first of int8 and bf16 that did, else fp32.
        threads: CPU threads of one operator.
        reason: why this backend was chosen; version, processor and precision are added.

    Raises:
        BackendError: OpenVINO is not installed, the processor or the bundle lacks the precision, or it was not judged
            here.
    """
    core = openvino_core()
    identity = cpu_identity(core)
    fitting = fitting_precisions(bundle, identity)
    why = ""
    if precision == "auto":
        precision = fitting[0] if fitting else "fp32"
        why = "" if precision != "fp32" else f"; {_nothing_faster(bundle, identity, has_bf16=_has_bf16(core))}"
    backend = OpenVinoBackend(bundle, precision=precision, threads=threads)
    if precision not in (*fitting, "fp32"):
        raise BackendError(_not_judged(bundle, precision, identity), precision=precision)
    rest = f", the rest in {backend.float_type}" if precision == "int8" else ""
    backend.reason = f"{reason} ({identity}, {precision}{rest}{why})"
    return backend


def import_openvino() -> Any:
    """The module `openvino`, loaded without its telemetry.

    Importing openvino 2026.4 reports the import to its makers, where the package openvino-telemetry is installed, which
    pip does by itself. Without that package openvino uses a stub; so it is out of sight while openvino is loaded.

    Raises:
        BackendError: it is not installed, or its libraries cannot be loaded.
    """
    try:
        with _without_telemetry():
            import openvino
    except (ImportError, OSError, RuntimeError) as error:
        remedy = f"Install it: {install_command('openvino')}. Or take --backend onnxruntime"
        raise BackendError(f"openvino cannot be imported ({error}). {remedy}") from error
    return openvino


def openvino_core() -> Any:
    """The process's one `openvino.Core`, which stays until the process ends.

    OpenVINO 2026.4's CPU plugin gives the thread a stack for signals and puts the one before back when it goes. Of two
    cores of which the older goes first, the younger puts back what is no longer there: the next signal kills the
    process.

    Raises:
        BackendError: see `import_openvino`.
    """
    with _core_lock:  # functools.cache alone lets two threads make one each
        return _core()


@functools.cache
def _core() -> Any:
    openvino = import_openvino()
    try:
        return openvino.Core()
    except RuntimeError as error:
        remedy = "Install it anew: pip install --force-reinstall openvino, or take --backend onnxruntime"
        raise BackendError(f"openvino cannot start ({_reason(error)}). {remedy}") from error


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    if "openvino" in sys.modules or _TELEMETRY in sys.modules:  # somebody else loaded it, and had it as he wanted
        yield
        return
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # as for a package that is not there
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]


def check_cpu_precision(core: Any, precision: str) -> None:
    """Refuse a precision that OpenVINO does not compute in on this processor.

    Args:
        core: an `openvino.Core`.
        precision: of the image graphs.

    Raises:
        BackendError: names what can be had instead.
    """
    if precision == "fp16":
        message = "OpenVINO computes fp16 graphs on a CPU in fp32 or bf16, not in fp16"
        raise BackendError(f"{message}. Take --precision bf16, int8 or fp32", precision=precision)
    if precision not in CPU_PRECISIONS:
        raise BackendError(f"OpenVINO runs in {', '.join(CPU_PRECISIONS)}, not in {precision!r}", precision=precision)
    if precision == "bf16" and not _has_bf16(core):
        processor = core.get_property("CPU", "FULL_DEVICE_NAME").strip()
        message = f"this processor ({processor}) has no bfloat16 instructions (AVX512_BF16 or AMX)"
        raise BackendError(f"{message}. Take --precision int8 or fp32", precision=precision)


def _has_bf16(core: Any) -> bool:
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _image_files(bundle: Bundle, precision: str) -> dict[Size, str]:
    for why in outdated_graphs(bundle).values():
        _log.warning("%s", why)
    sizes = [(entry.height, entry.width) for entry in bundle.manifest.images]
    found = {size: graph_file(bundle, precision, size) for size in sizes}
    files = {size: file for size, file in found.items() if file is not None}
    if not files:
        have = ", ".join(bundle.manifest.precisions)
        message = f"{bundle.name} has no image graph in {graph_precision(precision)}, only in {have}"
        raise BackendError(f"{message}. Make it: {_command(bundle, precision)}", precision=precision)
    return files


def _nothing_faster(bundle: Bundle, identity: CpuIdentity, *, has_bf16: bool) -> str:
    """Why neither int8 nor bf16 is taken, and what to do."""
    remedy = _command(bundle, "bf16" if has_bf16 else "int8")
    misfits = [cpu_misfit(bundle, one, identity) for one in read_cpu_records(bundle) if one.precision != "fp32"]
    if any(misfits):
        return f"{next(filter(None, misfits))}. To have it again: {remedy}"
    return f"faster, if it passes here: {remedy}"


def _not_judged(bundle: Bundle, precision: str, identity: CpuIdentity) -> str:
    records = [record for record in read_cpu_records(bundle) if record.precision == precision]
    why = next(filter(None, (cpu_misfit(bundle, record, identity) for record in records)), "")
    why = why or f"{precision} was not judged for every image size of {bundle.name} on this machine"
    return f"{why}. Build it here: {_command(bundle, precision)}, or take --precision fp32"


def _command(bundle: Bundle, precision: str) -> str:
    return f"{build_command(bundle, precision)} --device cpu"


def _readable(value: NDArray[Any]) -> NDArray[Any]:
    """The array where it lies, in C order; copied only if it is not, or may not be written, which OpenVINO wants."""
    contiguous = np.asarray(value, order="C")
    return contiguous if contiguous.flags.writeable else contiguous.copy()


def _check_onnx(path: Path, file: str) -> None:
    """Refuse a file that does not begin as ONNX does: OpenVINO would try all the formats it knows on it, aloud."""
    with path.open("rb") as stream:
        begins = stream.read(1)
    if begins != _IR_VERSION_FIELD:
        raise BundleError(f"{path} is no ONNX file. {AGAIN}", file=file)


def _reason(error: Exception) -> str:
    """What OpenVINO says at last: first come the places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:_LONGEST_REASON] if lines else type(error).__name__
