"""Engines of a bundle: compiled by TensorRT on this machine, for this machine, and put beside the bundle's graphs."""

import importlib.util
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tclkit.runtime.bundle import Bundle
from tclkit.runtime.engines import (
    DeviceIdentity,
    EngineFile,
    EngineMiss,
    EngineRecord,
    EngineSet,
    current_device,
    engine_misfit,
    find_engine,
    read_engines,
    write_engine,
)
from tclkit.runtime.errors import BackendError, BuildError
from tclkit.runtime.extras import install_command
from tclkit.runtime.tensorrt_backend import TensorRTBackend

from .engine_builder import EngineOptions, build_engine_bytes, image_profile, masks_profile

_log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineBuild:
    """One engine just built.

    file: its name. record: its side-car.
    """

    file: str
    record: EngineRecord


def missing_for_engines() -> str | None:
    """What this machine lacks to compile engines, as one sentence; None where it lacks nothing."""
    absent = [name for name in ("tensorrt", "polygraphy", "cuda") if importlib.util.find_spec(name) is None]
    if "tensorrt" in absent:
        return "TensorRT is not installed here"
    if absent:
        return f"{' and '.join(absent)} is not installed here ({install_command('build')})"
    try:
        current_device()
    except BackendError as error:
        return error.message
    return None


def build_engines(
    bundle: Bundle, size: Size, precision: str, options: EngineOptions, *, progress: Progress
) -> list[EngineBuild]:
    """Compile the image graph of a size and precision and the masks graph for that size.

    Args:
        bundle: opened; its engines folder gets both engines.
        size: (H, W) of the image graph.
        precision: of the image graph; the masks graph is float32 always, it is a thousandth of the work.
        options: of TensorRT's builder.
        progress: called as progress(what, done, in_all).

    Raises:
        BuildError: TensorRT could not build one.
        BackendError: there is no usable device.
    """
    device = current_device()
    manifest = bundle.manifest
    entry = next(one for one in manifest.images if (one.height, one.width) == size)
    if options.dla and options.max_batch > 1:
        _log.warning("the accelerator takes one batch size: the image engine is built for one image at a time")
        options = replace(options, max_batch=1)
    profiles = {
        "image": image_profile(*size, options.max_batch),
        "masks": masks_profile(manifest, *size, options.max_batch, options.max_prompts),
    }
    builds = []
    for graph, file in (("image", entry.files[precision]), ("masks", manifest.masks)):
        chosen = options if graph == "image" else replace(options, dla=False)  # prompts vary, which DLA does not allow
        began = time.monotonic()
        onnx_bytes = bundle.path(file).read_bytes()
        engine = build_engine_bytes(
            onnx_bytes, profiles[graph], chosen, progress=_prefixed(f"{graph} engine", progress)
        )
        record = EngineRecord(
            graph=graph,
            precision=precision if graph == "image" else "fp32",
            height=size[0],
            width=size[1],
            graph_sha256=manifest.files[file].sha256,
            tensorrt_version=device.tensorrt_version,
            compute_capability=device.compute_capability,
            device_name=device.device_name,
            system=device.system,
            max_batch=options.max_batch,
            max_prompts=options.max_prompts,
            flags=_flags(chosen),
            build_s=round(time.monotonic() - began, 1),
        )
        written = write_engine(bundle.folder, record, engine)
        builds.append(EngineBuild(file=f"{written.stem}.engine", record=written))
    return builds


def _prefixed(prefix: str, progress: Progress) -> Progress:
    return lambda what, done, in_all: progress(f"{prefix}: {what}", done, in_all)


def engine_backend(bundle: Bundle, precision: str, sizes: Sequence[Size]) -> TensorRTBackend:
    """Open the engines of some image sizes, whether or not the bundle's other sizes have any.

    Raises:
        BuildError: one that was just built is not found.
        EngineMismatchError: TensorRT refuses one.
    """
    device = current_device()
    engines = {
        size: (_found(bundle, "image", precision, size, device), _found(bundle, "masks", "fp32", size, device))
        for size in sizes
    }
    reason = f"TensorRT {device.tensorrt_version} on {device.device_name}"
    return TensorRTBackend(bundle, EngineSet(precision=precision, device=device, engines=engines), reason=reason)


def _found(bundle: Bundle, graph: str, precision: str, size: Size, device: DeviceIdentity) -> EngineFile:
    found = find_engine(bundle, graph=graph, precision=precision, size=size, device=device)
    if isinstance(found, EngineMiss):
        raise BuildError(f"the {graph} engine was built, but cannot be used: {found.message}")
    return found


def remove_outdated_engines(bundle: Bundle) -> list[str]:
    """Remove engines whose graph is no longer the bundle's, and say so; returns their names."""
    removed = []
    for engine in read_engines(bundle):
        miss = engine_misfit(bundle, engine, engine.record.device)
        if miss is not None and miss.reason in ("graph changed", "no graph"):
            engine.path.with_suffix(".json").unlink(missing_ok=True)
            engine.path.unlink(missing_ok=True)
            removed.append(engine.path.name)
            _log.warning("removed: %s", miss.why)
    return removed


def _flags(options: EngineOptions) -> tuple[str, ...]:
    chosen = {
        "hardware-compatible": options.hardware_compatible,
        "version-compatible": options.version_compatible,
        "dla": options.dla,
    }
    return tuple(name for name, is_on in chosen.items() if is_on)
