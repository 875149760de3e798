"""One engine from one ONNX graph, by TensorRT on this machine, for this machine. No torch: devices build their own.

Precision lives in the graph: networks are strongly typed (asked for on TensorRT 10, always so on 11), and no precision
flag is ever set; TensorRT 11 has none. TF32 is switched off, because it keeps 10 bits of mantissa, as half precision
does: an fp32 engine computes in fp32, and who wants speed takes fp16.

Polygraphy makes the profile and the configuration and runs the build, since it knows both majors of TensorRT (11 from
Polygraphy 0.50.3 on: earlier ones read a property of layers that 11 dropped, as the simulator showed). Four
things go to TensorRT directly: builder and network, so that what TensorRT says comes here and not to Polygraphy's
logger, which prints; the parser, whose errors carry the node's name only there; the timing cache, since Polygraphy does
not look whether TensorRT took it, nor writes it atomically; and DLA, for which Polygraphy sets a precision flag that
contradicts strong typing.

It ran on the simulator only (tests/tensorrt_simulator), for TensorRT 10.3, 10.13, 10.16 and 11.4; no GPU was at hand.
"""

import contextlib
import importlib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tclkit.runtime.errors import BuildError, ConfigError, InputError
from tclkit.runtime.extras import install_command
from tclkit.runtime.files import atomic_file
from tclkit.runtime.manifest import Manifest

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]
"""Input -> its smallest, most usual and largest shape."""
Progress = Callable[[str, int, int], None]

_USUAL_PROMPTS = 16
_ERRORS_TOLD = 3
_POLL_S = 0.1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """What an engine is to allow for.

    max_batch: images at once.
    max_prompts: prompts at once.
    workspace_mb: megabytes of scratch memory a layer may use; None lets TensorRT take what the device has.
    timing_cache: file that keeps what TensorRT measured, for quicker builds on the same kind of device; made if absent.
    hardware_compatible: the engine runs on every GPU from Ampere on, and slower; not on Jetson.
    version_compatible: the engine runs on later TensorRT versions too, and slower.
    dla: run what a deep-learning accelerator (Orin, Xavier) can run on it, the rest on the GPU.
    """

    max_batch: int = 8
    max_prompts: int = 256
    workspace_mb: int | None = None
    timing_cache: Path | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    dla: bool = False

    def __post_init__(self) -> None:
        for key in ("max_batch", "max_prompts", "workspace_mb"):
            value = getattr(self, key)
            if key == "workspace_mb" and value is None:
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{key} should be a whole number from 1, found {value!r}", key=key)
        if self.timing_cache is not None and self.timing_cache.is_dir():
            raise ConfigError(f"timing_cache should be a file, {self.timing_cache} is a folder", key="timing_cache")


def image_profile(height: int, width: int, max_batch: int) -> Profile:
    """Shapes of the image graph's input: 1 to `max_batch` images of one size, usually one."""
    return {"image": _batches((height, width, 3), max_batch)}


def masks_profile(manifest: Manifest, height: int, width: int, max_batch: int, max_prompts: int) -> Profile:
    """Shapes of the masks graph's inputs for one image size.

    Args:
        manifest: of the bundle.
        height, width: of the images, in pixels.
        max_batch: 1 to this many images at once, usually one.
        max_prompts: 1 to this many prompts at once, usually 16 or fewer.

    Raises:
        InputError: the size is no multiple of the patch.
    """
    model = manifest.model
    if height % model.patch_size or width % model.patch_size:
        raise InputError(f"{height}x{width} is no multiple of the patch, {model.patch_size} pixels")
    h, w, width_d = height // model.patch_size, width // model.patch_size, model.embed_dim
    usual = min(_USUAL_PROMPTS, max_prompts)
    profile = {
        "grounded": _batches((width_d, h * model.mask_scale, w * model.mask_scale), max_batch),
        "text": ((1, width_d), (usual, width_d), (max_prompts, width_d)),
    }
    if manifest.has_kp:
        profile["kp"] = _batches((width_d, h, w), max_batch)
    return profile


def build_engine_bytes(
    onnx_bytes: bytes, profile: Profile, options: EngineOptions, *, progress: Progress | None
) -> bytes:
    """Compile a graph. Ctrl-C stops TensorRT at its next step.

    Args:
        onnx_bytes: the graph, whole.
        profile: shapes of every input with a dynamic axis.
        options: see `EngineOptions`; `max_batch` and `max_prompts` are in the profile already.
        progress: called from another thread as progress(phase, steps done, steps in all); None for no report.

    Returns:
        The engine, as TensorRT serialised it.

    Raises:
        InputError: the profile does not fit the graph, or the timing cache cannot be read.
        BuildError: TensorRT is not there, cannot read the graph, or could not build it; names what it said.
    """
    _check_profile(profile)
    monitor, done = _Monitor(progress), threading.Event()
    outcome: list[Any] = []

    def build() -> None:
        try:
            outcome.append(_Build(onnx_bytes, profile, options, monitor).run())
        except BaseException as error:  # raised again where the caller can see it
            outcome.append(error)
        finally:
            done.set()

    # In a thread of its own, so that Ctrl-C reaches this one while TensorRT is at work: Python tells no other thread,
    # and TensorRT calls back from whichever it likes. An event, because Thread.join takes an interrupted wait for the
    # thread's end, before Python 3.13.
    worker = threading.Thread(target=build, name="tclkit-build-engine", daemon=True)
    worker.start()
    try:
        while not done.wait(_POLL_S):
            pass
    except KeyboardInterrupt:
        monitor.cancel()
        done.wait()
        raise
    finally:
        if done.is_set():
            worker.join()
    if monitor.error is not None:
        raise monitor.error
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    engine: bytes = outcome[0]
    return engine


def _batches(item: Shape, max_batch: int) -> tuple[Shape, Shape, Shape]:
    return (1, *item), (1, *item), (max_batch, *item)


def _check_profile(profile: Profile) -> None:
    for name, shapes in profile.items():
        ranks = {len(shape) for shape in shapes}
        if len(ranks) != 1 or any(not 0 < low <= usual <= high for low, usual, high in zip(*shapes, strict=True)):
            low, usual, high = shapes
            raise InputError(f"shapes of {name} should grow from smallest to largest, found {low}, {usual}, {high}")


class _Monitor:
    """Hands TensorRT's progress on, and asks it to stop."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._steps: dict[str, int] = {}
        self._cancelled = threading.Event()
        self.error: BaseException | None = None

    def cancel(self) -> None:
        self._cancelled.set()

    def start(self, phase: str, steps: int) -> None:
        self._steps[phase] = steps
        self._report(phase, 0)

    def step(self, phase: str, step: int) -> bool:
        """Whether to go on."""
        self._report(phase, step + 1)
        return not self._cancelled.is_set()

    def finish(self, phase: str) -> None:
        self._report(phase, self._steps.pop(phase, 0))

    def _report(self, phase: str, done: int) -> None:
        """What goes wrong in here must not pass through TensorRT, which would abort the process."""
        total = self._steps.get(phase, 0) or done
        if self._progress is None or total == 0 or self.error is not None:
            return
        try:
            self._progress(phase, done, total)
        except BaseException as error:
            self.error = error
            self._cancelled.set()


class _Build:
    """One build, in the thread that does it."""

    def __init__(self, onnx_bytes: bytes, profile: Profile, options: EngineOptions, monitor: _Monitor) -> None:
        self.onnx_bytes, self.profile, self.options, self.monitor = onnx_bytes, profile, options, monitor
        self.trt = _imported("tensorrt", "it comes with JetPack; on a server: pip install tensorrt")
        self.polygraphy = _imported("polygraphy.backend.trt", install_command("build"))
        self.said: list[str] = []
        self.logger = _tensorrts_logger(self.trt, self.said)
        self.callbacks: Any = None  # TensorRT calls them until the engine is built

    def run(self) -> bytes:
        polygraphys_log = importlib.import_module("polygraphy.logger").G_LOGGER
        with polygraphys_log.verbosity(polygraphys_log.CRITICAL + 1):  # it prints; what it raises says the same
            return self._run()

    def _run(self) -> bytes:
        strongly_typed = 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        builder = self._attempt("start", lambda: self.trt.Builder(self.logger))
        network = builder.create_network(strongly_typed)
        parser = self._parse(network)  # kept until the engine is built: it owns the weights
        self._compare_inputs(network)
        config = self._attempt("configure the build", lambda: self._config(builder, network))
        if self.options.timing_cache is not None:
            _load_timing_cache(config, self.options.timing_cache)
        plan = self._attempt(
            "build the engine",
            lambda: self.polygraphy.engine_bytes_from_network((builder, network, parser), config=config),
        )
        if self.options.timing_cache is not None:
            _save_timing_cache(config, self.options.timing_cache)
        return bytes(plan)

    def _attempt(self, what: str, action: Callable[[], Any]) -> Any:
        """Run it; turn what Polygraphy and TensorRT's bindings raise into a BuildError with what TensorRT said."""
        exceptions = importlib.import_module("polygraphy.exception")
        try:
            return action()
        except AttributeError as error:
            message = f"this Polygraphy does not know TensorRT {self.trt.__version__} ({error})"
            raise BuildError(f'{message}. Upgrade it: pip install -U "polygraphy>=0.50.3"') from error
        except (exceptions.PolygraphyException, TypeError, ValueError, RuntimeError) as error:
            reasons = list(dict.fromkeys(self.said))[-_ERRORS_TOLD:] or [str(error)]
            said = "; ".join(reason.strip().rstrip(".") for reason in reasons)
            remedy = "Check the driver and the device: nvidia-smi" if what == "start" else self._remedies()
            message = f"TensorRT {self.trt.__version__} could not {what}: {said}. {remedy}"
            raise BuildError(message, reasons=reasons) from error

    def _remedies(self) -> str:
        options = self.options
        remedies = ["a smaller --max-batch or --max-prompts"]
        if options.workspace_mb is not None:
            remedies.insert(0, "more memory to work with (--workspace)")
        for name, is_on in (
            ("--hardware-compatible", options.hardware_compatible),
            ("--version-compatible", options.version_compatible),
            ("--dla", options.dla),
        ):
            if is_on:
                remedies.append(f"to leave out {name}")
        return f"Try {', '.join(remedies)}"

    def _parse(self, network: Any) -> Any:
        """The parser, after it filled the network."""
        parser = self.trt.OnnxParser(network, self.logger)
        if parser.parse(self.onnx_bytes):
            return parser
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        told = "; ".join(_error_text(error) for error in errors[:_ERRORS_TOLD]) or "no reason given"
        more = f" (and {len(errors) - _ERRORS_TOLD} more)" if len(errors) > _ERRORS_TOLD else ""
        raise BuildError(
            f"TensorRT {self.trt.__version__} cannot read the graph: {told}{more}. Export the bundle again with this "
            "tclkit: tclkit export CHECKPOINT -o FOLDER",
            nodes=[error.node_name() for error in errors],
        )

    def _compare_inputs(self, network: Any) -> None:
        """Every input with a dynamic axis has its shapes; Polygraphy would quietly fix the others at 1."""
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        names = [tensor.name for tensor in inputs]
        if unknown := sorted(set(self.profile) - set(names)):
            raise InputError(f"the profile names {', '.join(unknown)}, the graph's inputs are {', '.join(names)}")
        for tensor in inputs:
            if tensor.name not in self.profile and any(size < 0 for size in tuple(tensor.shape)):
                raise InputError(f"the profile lacks {tensor.name}, whose shape is {tuple(tensor.shape)}")

    def _config(self, builder: Any, network: Any) -> Any:
        trt, options = self.trt, self.options
        shapes = self.polygraphy.Profile()
        for name, (low, usual, high) in self.profile.items():
            shapes.add(name, low, usual, high)
        self.callbacks = _tensorrts_monitor(trt, self.monitor)
        level = trt.HardwareCompatibilityLevel.AMPERE_PLUS if options.hardware_compatible else None
        pools = None if options.workspace_mb is None else {trt.MemoryPoolType.WORKSPACE: options.workspace_mb << 20}
        config = self.polygraphy.CreateConfig(
            profiles=[shapes],
            tf32=False,
            memory_pool_limits=pools,
            hardware_compatibility_level=level,
            version_compatible=options.version_compatible,
            progress_monitor=self.callbacks,
        )(builder, network)
        if options.dla:
            _use_dla(trt, builder, config)
        return config


def _use_dla(trt: Any, builder: Any, config: Any) -> None:
    if not builder.num_DLA_cores:
        raise BuildError("this device has no deep-learning accelerator (DLA); Orin and Xavier have. Leave out --dla")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = 0
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def _tensorrts_logger(trt: Any, errors: list[str]) -> Any:
    """Keeps errors for the message, and hands everything to tclkit's log, where nobody sees it unless asked."""
    severity_of = trt.ILogger.Severity
    levels = {
        severity_of.WARNING: logging.INFO,
        severity_of.ERROR: logging.INFO,
        severity_of.INTERNAL_ERROR: logging.INFO,
    }

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (severity_of.ERROR, severity_of.INTERNAL_ERROR):
                errors.append(msg)
            _log.log(levels.get(severity, logging.DEBUG), "TensorRT: %s", msg)

    return Logger()


def _tensorrts_monitor(trt: Any, monitor: _Monitor) -> Any:
    """`monitor` as TensorRT calls it; the class can be made only once TensorRT is there."""

    class ProgressMonitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            monitor.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return monitor.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            monitor.finish(phase_name)

    return ProgressMonitor()


def _load_timing_cache(config: Any, path: Path) -> None:
    """Give the build what was measured before; a cache that does not fit is set aside and a new one begun."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"the timing cache {path} cannot be read: {error.strerror}") from error
    cache = config.create_timing_cache(data)
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return
    aside = path.with_name(f"{path.name}.other")
    with contextlib.suppress(OSError):
        path.replace(aside)
    _log.warning(
        "timing cache %s is damaged, or of another TensorRT version or device: set aside as %s, a new one is begun",
        path,
        aside.name,
    )


def _save_timing_cache(config: Any, path: Path) -> None:
    """Keep what was measured; the engine is built, so that a full disk here costs time later and no more."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    try:
        with atomic_file(path) as temporary:
            temporary.write_bytes(cache.serialize())
    except OSError as error:
        _log.warning("the timing cache %s could not be written: %s", path, error)


def _imported(module: str, remedy: str) -> Any:
    name = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise BuildError(f"{name} cannot be imported ({error}). Install it: {remedy}", module=name) from error


def _error_text(error: Any) -> str:
    """A parser's error with the node it is about."""
    name, operator = error.node_name(), error.node_operator()
    where = f"node {name or error.node()} ({operator}): " if operator else ""
    return f"{where}{str(error.desc()).strip().rstrip('.')}"
