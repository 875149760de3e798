"""The TensorRT backend: image and masks graphs as engines on one stream, features on the device in between.

Images go up and low-resolution masks come down through pinned memory; features stay where they are made, and are copied
to the host only when somebody reads them. Texts are embedded by ONNX Runtime on the CPU, once: embeddings are cached.

It ran on the simulator only (tests/tensorrt_simulator), for TensorRT 10.3, 10.13, 10.16 and 11.4; no GPU was at hand.
"""

import collections
import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .backend_inputs import check_features, check_images, check_prompts
from .backends import Features
from .bundle import Bundle
from .cuda_memory import DeviceBuffer, Stream
from .engine_session import DeviceTensor, EngineSession, LoadedEngine, load_engine
from .engines import EngineMiss, EngineSet, build_command, current_device, find_engines, rebuild_remedy
from .errors import BackendError, BundleError, InputError, TclkitError
from .onnxruntime_backend import OnnxRuntimeBackend

Size = tuple[int, int]
_MOST_FREE = 2  # sets of feature buffers that are kept for the next images


class TensorRTBackend:
    """Runs a bundle's engines; see `Backend`. Make it with `open_tensorrt`.

    Batches above the engine's are run in parts. More prompts than the engine takes are refused, not run in parts: the
    engine is to be built for what is asked of it. Any thread may use it: calls wait for each other. It stays on the
    device that was current when it was opened.

    Args:
        bundle: an opened bundle.
        found: its engines; all are deserialised now, so that one that does not fit shows at once.
        threads: CPU threads of the text graph; None takes every CPU this process may use.
        reason: why this backend was chosen.

    Raises:
        BundleError: an engine is damaged, or has another interface than the bundle.
        EngineMismatchError: TensorRT refuses an engine.
        BackendError: TensorRT, cuda-python or the device is missing.
    """

    name = "tensorrt"

    def __init__(
        self, bundle: Bundle, found: EngineSet, *, threads: int | None = None, reason: str = "asked for"
    ) -> None:
        self.precision = found.precision
        self.reason = reason
        self._bundle = bundle
        self._threads = threads
        self._remedy = rebuild_remedy(bundle, found.precision)
        self._stream = Stream()
        self._loaded: dict[Size, tuple[LoadedEngine, LoadedEngine]] = {}
        self._sizes: dict[Size, _Size] = {}
        self._texts: OnnxRuntimeBackend | None = None
        self._is_closed = False
        self._lock = threading.RLock()  # one stream; and what a run has made is overwritten by the next
        try:
            for size, files in found.engines.items():
                image, masks = (load_engine(file, device=found.device, remedy=self._remedy) for file in files)
                self._check_interfaces(image, masks)
                self._loaded[size] = (image, masks)
        except BaseException:
            self.close()
            raise

    def image_features(self, images_BHWC: NDArray[np.uint8]) -> "DeviceFeatures":
        """Run the image engine of the images' size; see `Backend.image_features`."""
        with self._alone():
            size = check_images(self._bundle, images_BHWC, self._loaded)
            part = self._opened(size)
            most = part.image.tensors["image"].largest[0]
            chunks = []
            for start in range(0, len(images_BHWC), most):
                buffers = part.pool.take()
                tensors = part.image.run({"image": images_BHWC[start : start + most]}, buffers)
                chunks.append(_Chunk(tensors, buffers, part.pool))
            self._stream.synchronize()
            return DeviceFeatures(self, size, tuple(chunks))

    def masks(self, features: Features, text_ND: NDArray[np.float32], kp_w: float) -> NDArray[np.float32]:
        """Compare features with text embeddings; see `Backend.masks`.

        Features of another backend are copied up.

        Raises:
            BackendError: more prompts than the engine was built for; names the number and the ways out.
        """
        with self._alone():
            check_prompts(self._bundle, text_ND, kp_w)
            is_own = isinstance(features, DeviceFeatures) and features.backend is self
            size = features.size if isinstance(features, DeviceFeatures) and is_own else self._size_of(features)
            session = self._opened(size).masks
            self._check_prompt_count(len(text_ND), session)
            shared: dict[str, NDArray[Any]] = {"text": text_ND}
            if self._bundle.manifest.has_kp:
                shared["kp_w"] = np.asarray(kp_w, np.float32)
            if isinstance(features, DeviceFeatures) and is_own:
                parts: Iterator[Mapping[str, NDArray[Any] | DeviceTensor]] = (one.tensors for one in features.chunks)
            else:
                parts = _host_parts(features, session.tensors["grounded"].largest[0])
            masks = [session.to_host(session.run({**part, **shared})["masks"]) for part in parts]
            return masks[0] if len(masks) == 1 else np.concatenate(masks)

    def encode_text(self, token_ids_ML: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run the text graph, on the CPU with ONNX Runtime; see `Backend.encode_text`."""
        with self._alone():
            if self._texts is None:
                self._texts = OnnxRuntimeBackend(self._bundle, precision=self.precision, threads=self._threads)
            return self._texts.encode_text(token_ids_ML)

    def to_host(self, size: Size, tensor: DeviceTensor) -> NDArray[Any]:
        """Copy an array that an engine of this image size has made from the device."""
        with self._alone():
            return self._opened(size).image.to_host(tensor)

    def close(self) -> None:
        """Release engines, buffers and the stream; features that are still held give theirs back when they go."""
        with self._lock:
            self._is_closed = True
            for part in self._sizes.values():
                part.close()
            self._sizes.clear()
            self._loaded.clear()
            self._stream.close()
            if self._texts is not None:
                self._texts.close()

    def _opened(self, size: Size) -> "_Size":
        """Sessions of one image size, made when they are first needed."""
        if size not in self._sizes:
            self._sizes[size] = _Size(*self._loaded[size], self._stream)
        return self._sizes[size]

    def _size_of(self, features: Features) -> Size:
        """Image size that features of another backend belong to."""
        check_features(self._bundle, features)
        model = self._bundle.manifest.model
        grid = features.grounded.shape[2:]
        for height, width in self._loaded:
            if grid == tuple(side // model.patch_size * model.mask_scale for side in (height, width)):
                return height, width
        sizes = ", ".join(f"{height}x{width}" for height, width in self._loaded)
        raise InputError(f"features of the grid {grid} belong to no image size of {self._bundle.name} ({sizes})")

    def _check_prompt_count(self, count: int, session: EngineSession) -> None:
        most = session.tensors["text"].largest[0]
        if count > most:
            wanted = 1 << (count - 1).bit_length()
            command = f"{build_command(self._bundle, self.precision)} --max-prompts {wanted}"
            raise BackendError(
                f"{count} prompts, but the engine was built for at most {most}: rebuild it with {command}, or use "
                "--backend onnxruntime",
                expected=most,
                found=count,
            )

    def _check_interfaces(self, image: LoadedEngine, masks: LoadedEngine) -> None:
        kp = ["kp"] if self._bundle.manifest.has_kp else []
        kp_w = ["kp_w"] if self._bundle.manifest.has_kp else []
        features = dict.fromkeys(["grounded", *kp], np.float32)
        texts = dict.fromkeys(["text", *kp_w], np.float32)
        self._check_interface(image, {"image": np.uint8}, features)
        self._check_interface(masks, features | texts, {"masks": np.float32})

    def _check_interface(
        self, loaded: LoadedEngine, inputs: Mapping[str, DTypeLike], outputs: Mapping[str, DTypeLike]
    ) -> None:
        for is_input, wanted in ((True, inputs), (False, outputs)):
            found = {info.name: info.dtype for info in loaded.tensors.values() if info.is_input is is_input}
            expected = {name: np.dtype(dtype) for name, dtype in wanted.items()}
            if found != expected:
                what = "inputs" if is_input else "outputs"
                message = f"{loaded.file.path} should have the {what} {_named(expected)}, found {_named(found)}"
                raise BundleError(f"{message}. {self._remedy}", file=loaded.file.path.name)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for the other threads, and keep them waiting; refuse to go on where it is closed."""
        with self._lock:
            if self._is_closed:
                raise TclkitError(f"the TensorRT backend of {self._bundle.name} is closed")
            yield


class DeviceFeatures:
    """Features that stay on the device for as long as this is held; see `Features`.

    They may be asked again at any time: later images never overwrite them.

    Attributes:
        backend: that made them.
        size: (H, W) in pixels of the images.
        chunks: as they lie on the device, a run of the image engine each.
    """

    def __init__(self, backend: TensorRTBackend, size: Size, chunks: "tuple[_Chunk, ...]") -> None:
        self.backend = backend
        self.size = size
        self.chunks = chunks

    @functools.cached_property
    def grounded(self) -> NDArray[np.float32]:
        """(B, D, 4h, 4w) float32; copied from the device when first read."""
        return self._on_host("grounded")

    @functools.cached_property
    def kp(self) -> NDArray[np.float32] | None:
        """(B, D, h, w) float32, None without the KP branch; copied from the device when first read."""
        return self._on_host("kp") if "kp" in self.chunks[0].tensors else None

    def _on_host(self, name: str) -> NDArray[np.float32]:
        parts = [self.backend.to_host(self.size, chunk.tensors[name]) for chunk in self.chunks]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def open_tensorrt(
    bundle: Bundle, *, precision: str = "auto", threads: int | None = None, reason: str = "asked for"
) -> TensorRTBackend:
    """Open a bundle's engines for this device.

    Args:
        bundle: opened.
        precision: of the image graphs, or "auto": the first of int8, fp16 and fp32 that every image size has.
        threads: CPU threads of the text graph.
        reason: why this backend was chosen; precision and device are added.

    Raises:
        BackendError: TensorRT, cuda-python or a device is missing, or no engine was built.
        EngineMismatchError: the engines are for another device or TensorRT version, or for another graph.
        BundleError: an engine is damaged.
    """
    found = find_engines(bundle, precision=precision, device=current_device())
    if isinstance(found, EngineMiss):
        raise found.error()
    return TensorRTBackend(bundle, found, threads=threads, reason=f"{reason} ({found.device}, {found.precision})")


class _Chunk:
    """Features of one run; the buffers go back to their pool when it is forgotten."""

    def __init__(self, tensors: Mapping[str, DeviceTensor], buffers: "_Buffers", pool: "_Pool") -> None:
        self.tensors = tensors
        weakref.finalize(self, pool.give_back, buffers).atexit = False  # buffers have a net of their own


_Buffers = dict[str, DeviceBuffer]


class _Pool:
    """Device buffers for the outputs of one engine, lent to features.

    Taking and closing is for who holds the backend's lock; giving back is anybody's, for the garbage collector calls
    it, at any time: it only puts the buffers aside, because to free memory during a graph's capture would spoil the
    capture.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._free: collections.deque[_Buffers] = collections.deque()
        self._is_closed = False

    def take(self) -> _Buffers:
        """Buffers that nobody else has; the ones used last first, whose addresses captured graphs know."""
        while len(self._free) > _MOST_FREE:
            _close(self._free.popleft())
        return self._free.pop() if self._free else {name: DeviceBuffer() for name in self._names}

    def give_back(self, buffers: _Buffers) -> None:
        """Take buffers back."""
        if self._is_closed:
            _close(buffers)
        else:
            self._free.append(buffers)

    def close(self) -> None:
        """Free what is not lent; what is lent is freed when it comes back."""
        self._is_closed = True
        while self._free:
            _close(self._free.pop())


class _Size:
    """What runs one image size."""

    def __init__(self, image: LoadedEngine, masks: LoadedEngine, stream: Stream) -> None:
        self.image = EngineSession(image, stream)
        self.masks = EngineSession(masks, stream)
        self.pool = _Pool([info.name for info in image.tensors.values() if not info.is_input])

    def close(self) -> None:
        self.masks.close()
        self.image.close()
        self.pool.close()


def _close(buffers: _Buffers) -> None:
    for buffer in buffers.values():
        buffer.close()


def _host_parts(features: Features, most: int) -> Iterator[dict[str, NDArray[Any] | DeviceTensor]]:
    for start in range(0, len(features.grounded), most):
        part: dict[str, NDArray[Any] | DeviceTensor] = {"grounded": features.grounded[start : start + most]}
        if features.kp is not None:
            part["kp"] = features.kp[start : start + most]
        yield part


def _named(tensors: Mapping[str, np.dtype[Any]]) -> str:
    return ", ".join(f"{name} {dtype}" for name, dtype in sorted(tensors.items()))
