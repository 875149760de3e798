"""`tclkit build-engine`: a bundle gets graphs of another precision, and what a device makes of them.

On a GPU that is TensorRT's engines; on a processor, the gate's word that OpenVINO may compute them in that precision,
and a graph of its own, whose decoder takes fewer products.

Nothing degraded ships: every graph and every engine passes the gate before the bundle changes, and the bundle changes
as a whole. A bundle that ships inside the package is copied to the models folder first. No torch: devices run this.
"""

import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from tclkit import runtime
from tclkit.calib.progress import silent
from tclkit.runtime.bundle import Bundle, open_bundle, write_manifest
from tclkit.runtime.cpu_records import CpuRecord
from tclkit.runtime.engines import current_device
from tclkit.runtime.errors import BundleError, ConfigError, ExportError, InputError
from tclkit.runtime.files import cache_folder, models_folder
from tclkit.runtime.manifest import ImageEntry, graph_precision
from tclkit.runtime.onnxruntime_backend import OnnxRuntimeBackend

from .bundle_folder import carry_over, keep_other_files, new_folder, require_replaceable, write_errors
from .cpu_build import (
    cpu_backend,
    keep_compiled,
    missing_for_cpu,
    record_verdict,
    remove_outdated_records,
    require_cpu_precision,
)
from .decoder import DecoderForm, require_known_form
from .decoder_graph import rewrite_decoder
from .engine_build import EngineBuild, build_engines, engine_backend, missing_for_engines, remove_outdated_engines
from .engine_builder import EngineOptions
from .gate_inputs import embedded_prompts, gate_on, kept_thresholds, sample_batches
from .gates import THRESHOLDS, Gate, GateFigures, GateThresholds, Judged, Verdict, require_parity
from .graph_runner import GraphRunner
from .precision import PrecisionConfig, PreparedGraph, prepare_graph
from .processor_graph import (
    install_graph,
    processor_form,
    read_raw_manifest,
    remove_outdated_graphs,
    remove_processor_graph,
)

BuildProgress = Callable[[str, int, int], None]
"""Called as progress(what, done, in_all); every `what` counts for itself."""

_log = logging.getLogger(__name__)
_SEARCH_IMAGES = 8
_PRECISIONS_OF = {"gpu": ("fp32", "fp16", "int8"), "cpu": ("fp32", "bf16", "int8")}


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """What to build.

    precision: "fp32" (no graph is made), "fp16", "int8", or on the CPU "bf16" (the float32 graph in bfloat16).
    device: "gpu" for engines of TensorRT, "cpu" for OpenVINO on this processor.
    decoder: form of the decoder in the graph that processors run; "direct": none of their own, they run the graph of
        every device. None: the form that is there, else `PROCESSOR_FORM`. Not for GPUs.
    tier: of INT8: "all" layers, "decoder-only" (the transformer in half precision), or "auto", the most that passes.
    calibration: a folder, glob, video, shards or list of images; INT8 needs it, FP16 takes the sample scenes without.
    calibration_images, seed: how many of them, and which.
    range_method: how activation ranges are found: "mse", "entropy", "minmax" or "percentile".
    smoothing: strength of SmoothQuant in 0..1; None leaves it out.
    sizes: (H, W) of the image graphs to build; None: all of the bundle.
    prompts: what the gate asks for; None: a list that fits the model.
    thresholds: of the gate; None: those of the precision.
    prepare_only: write the graphs, build no engines.
    engine: options of TensorRT's builder.
    """

    precision: Literal["fp32", "fp16", "bf16", "int8"]
    device: Literal["gpu", "cpu"] = "gpu"
    decoder: DecoderForm | None = None
    tier: Literal["all", "decoder-only", "auto"] = "all"
    calibration: str | None = None
    calibration_images: int = 256
    seed: int = 0
    range_method: Literal["mse", "entropy", "minmax", "percentile"] = "minmax"
    smoothing: float | None = 0.5
    sizes: tuple[tuple[int, int], ...] | None = None
    prompts: tuple[str, ...] | None = None
    thresholds: GateThresholds | None = None
    prepare_only: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        if self.precision not in THRESHOLDS:
            raise ConfigError(f"precision is {self.precision!r}; choose {', '.join(THRESHOLDS)}", key="precision")
        if self.precision not in _PRECISIONS_OF[self.device]:
            have = ", ".join(_PRECISIONS_OF[self.device])
            raise ConfigError(f"on the {self.device} there is {have}, but not {self.precision}", key="precision")
        if self.tier != "all" and self.precision != "int8":
            raise ConfigError(f"{self.tier} chooses layers for INT8, but the precision is {self.precision}", key="tier")
        if self.decoder is not None:
            require_known_form(self.decoder)
        if self.decoder is not None and self.device == "gpu":
            raise ConfigError(
                "other forms of the decoder are for processors: add --device cpu. GPUs have kernels for the form that "
                "a bundle was exported in, and none was timed with another; tclkit export --decoder writes one",
                key="decoder",
            )
        makes_none = self.device == "gpu" or self.decoder == "direct"
        if graph_precision(self.precision) == "fp32" and self.prepare_only and makes_none:
            raise ConfigError("the float32 graph is in every bundle: there is nothing to prepare", key="prepare_only")
        if self.smoothing is not None and not 0 <= self.smoothing <= 1:
            raise ConfigError(f"smoothing is {self.smoothing}; a strength is in 0..1", key="smoothing")


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildResult:
    """What a build left behind.

    bundle: the bundle's folder. verdicts: of every graph and engine. graphs: those prepared now.
    engines: those built now. records: of what may be computed on this processor from now on.
    missing: why nothing was compiled although it was wanted; None otherwise.
    """

    bundle: Path
    verdicts: Sequence[Verdict]
    graphs: Sequence[PreparedGraph]
    engines: Sequence[EngineBuild]
    records: Sequence[CpuRecord]
    missing: str | None


def build_engine(
    model: str | Path,
    config: BuildConfig,
    *,
    output: str | Path | None = None,
    progress: BuildProgress | None = None,
) -> BuildResult:
    """Give a bundle graphs of a precision, and engines where TensorRT is.

    A graph that the bundle holds already (prepared on another machine) is taken as it is when no calibration images are
    given; an engine is then judged against that graph, what OpenVINO makes of it against the float32 one.

    What processors run has its decoder rewritten, and stands beside the graph of every device. Such a graph is removed
    when it was made from another float32 graph than the bundle has. Engines and records of a graph that changed are
    removed too. What else lies in the folder stays, whether or not bundle.json lists it. What goes is announced.

    Args:
        model: name or folder of a bundle.
        config: what to build.
        output: folder of the resulting bundle; None changes the bundle itself, or for one that ships inside the
            package, a copy in the models folder.
        progress: called as the work goes on.

    Raises:
        BundleError: unknown or damaged bundle.
        InputError: calibration images are missing or cannot be used, a size the bundle does not have, or a form of the
            decoder that cannot be made of it.
        ExportError: the bundle's graph has no decoder to rewrite, or the folder cannot be written.
        ParityError: an artefact is below the gate; the bundle is as it was.
        BuildError: TensorRT could not build an engine.
        BackendError: the processor does not compute in this precision, or OpenVINO cannot compile the graph.
    """
    source = open_bundle(model)
    target = _target(source, output)
    entries = _entries(source, config)
    missing = None if config.prepare_only else _missing(config)
    compiles = not config.prepare_only and missing is None
    form = processor_form(source, config.decoder) if config.device == "cpu" else None
    if missing is not None and graph_precision(config.precision) == "fp32" and form is None:
        return BuildResult(bundle=source.folder, verdicts=(), graphs=(), engines=(), records=(), missing=missing)
    report = progress or silent
    most = config.engine.max_prompts if compiles and config.device == "gpu" else None
    text_ND = embedded_prompts(source, config.prompts, most=most)
    graphs: list[PreparedGraph] = []
    engines: list[EngineBuild] = []
    records: list[CpuRecord] = []
    verdicts: list[Verdict] = []
    with write_errors(target), new_folder(target) as folder:
        source = open_bundle(model, verify=False)  # as it is now that nobody else changes it
        carry_over(source, folder, replaces=target)
        remove_outdated_graphs(folder)
        for entry in entries:
            work = _SizeWork(source, entry, config, form, text_ND, report)
            graph = work.prepare(folder)
            if graph is not None:
                work.install(folder, graph)
                graphs.append(graph)
            if config.device == "cpu" and form is None:
                _take_common_graph(folder, entry, config)
            if compiles and config.device == "gpu":
                engines += work.build_engines(folder)
            elif compiles:
                records.append(work.judge_on_cpu(folder))
            verdicts += work.verdicts
        keep_other_files(target, folder)
        remove_outdated_engines(open_bundle(folder, verify=False))
        remove_outdated_records(open_bundle(folder, verify=False))
    if output is None and target != source.folder:
        _log.warning("%s ships inside tclkit; what was built is in a copy of it, %s", source.name, target)
    if records:
        keep_compiled(open_bundle(target, verify=False), config.precision, [record.size for record in records])
    return BuildResult(
        bundle=target, verdicts=verdicts, graphs=graphs, engines=engines, records=records, missing=missing
    )


class _SizeWork:
    """What is done for one image size: images, the reference, the graph, the engines.

    `verdicts` are those of the gate so far, all of them passed.
    """

    def __init__(
        self,
        bundle: Bundle,
        entry: ImageEntry,
        config: BuildConfig,
        form: DecoderForm | None,
        text_ND: NDArray[np.float32],
        report: BuildProgress,
    ) -> None:
        self.verdicts: list[Verdict] = []
        self._entry, self._size, self._form = entry, entry.size, form
        self._bundle, self._config, self._text, self._report = bundle, config, text_ND, report
        self._kind: Literal["fp32", "fp16", "int8"] = "fp32" if config.precision == "bf16" else config.precision
        self._thresholds = config.thresholds or THRESHOLDS[config.precision]
        self._backend = OnnxRuntimeBackend(bundle)
        self._calibration: Iterable[NDArray[np.uint8]]
        self._content_hash: str | None = None
        self._own = self._own_file()
        self._takes_own = self._own is not None and (self._kind == "fp32" or config.calibration is None)
        if config.calibration is None:
            self._take_samples()
        else:
            self._select(config.calibration)
        reference: Judged = self._backend
        self._against = "the float32 graph"
        if self._own is not None and self._takes_own:
            self._announce(self._own)
            if config.device == "gpu":  # it passed the gate where the images were; the engine must give what it gives
                reference = GraphRunner(onnx.load(bundle.path(self._own)), self._backend)
                self._thresholds = config.thresholds or THRESHOLDS["fp16"]
                self._against = "its own graph"
            else:  # OpenVINO rounds INT8 in other places than the emulation does
                self._thresholds = config.thresholds or kept_thresholds(bundle, config.precision, self._own)
        self._gate = gate_on(bundle, reference, self._held_back, text_ND, report)
        self._backend.close()  # what follows wants the memory

    def _own_file(self) -> str | None:
        """The graph that the bundle holds already in the place of what is built; None where it is float32's own."""
        if self._form is None:
            return self._entry.files.get(self._kind) if self._kind != "fp32" else None
        graph = self._bundle.manifest.processor_graph(self._entry, self._kind)
        return graph.file if graph is not None and self._config.decoder in (None, graph.decoder) else None

    def _announce(self, file: str) -> None:
        """Say which graph is taken.

        Raises:
            InputError: another tier is asked for than the graph was made with.
        """
        if self._kind == "fp32":
            decoder = self._entry.processor[self._kind].decoder
            _log.warning("%s, with its decoder in the form %s, is taken as the bundle holds it", file, decoder)
            return
        made = self._bundle.manifest.checks.get(self._config.precision, {}).get(file, {}).get("made", {})
        tier = made.get("tier", "all")
        if self._config.tier not in ("all", tier):
            raise InputError(
                f"{file} of {self._bundle.name} quantises {tier}, not {self._config.tier}. To make it anew, "
                "give images: --calibration FOLDER"
            )
        kind = f" (INT8: {tier})" if self._config.precision == "int8" else ""
        _log.warning("no calibration images were given: %s is taken as the bundle holds it%s", file, kind)

    def _take_samples(self) -> None:
        if self._config.precision == "int8" and self._own is None:
            raise InputError(
                "INT8 needs images to calibrate on, of the kind the robot will see: --calibration FOLDER (or a quoted "
                f"glob, a video, a .tar of images, a list of paths){self._other_int8()}"
            )
        if not self._takes_own or self._kind == "fp32":
            _log.warning(
                "no calibration images were given: values are measured and judged on the sample scenes of tclkit only"
            )
        self._calibration = self._held_back = sample_batches(self._bundle, self._size)
        self.description: Mapping[str, Any] = {"source": {"kind": "samples", "name": "tclkit"}}

    def _other_int8(self) -> str:
        """What there is in INT8 in the place of what is asked for, and how to have it, as a sentence."""
        graph = self._bundle.manifest.processor_graph(self._entry, "int8")
        if self._form is not None and graph is not None:
            return f". {graph.file} has its decoder in the form {graph.decoder}: leave --decoder out to take it"
        if self._form is not None and "int8" in self._entry.files:
            return f". {self._entry.files['int8']} is for every device, and slower here: --decoder direct takes it"
        return ""

    def _select(self, calibration: str) -> None:
        from tclkit.calib import select_images

        chosen = select_images(
            calibration,
            size=self._size,
            count=self._config.calibration_images,
            seed=self._config.seed,
            mean_rgb=self._bundle.manifest.preprocessing.mean,
            patch_size=self._bundle.manifest.model.patch_size,
            batch_size=1,
            progress=self._report,
        )
        self._calibration, self._held_back = chosen.calibration, list(chosen.held_back)
        self._content_hash, self.description = chosen.content_hash, chosen.describe()

    def prepare(self, folder: Path) -> PreparedGraph | None:
        """The graph to install; None when the bundle's own is taken, or the float32 graph is what is compiled.

        Args:
            folder: the staged bundle.
        """
        config = self._config
        if self._takes_own or (self._kind == "fp32" and self._form is None):
            return None
        return prepare_graph(
            self._source(folder),
            PrecisionConfig(
                precision=self._kind,
                tier=config.tier,
                range_method=config.range_method,
                smoothing=config.smoothing,
                decoder=self._form,
            ),
            self._calibration,
            content_hash=self._content_hash,
            judge=self._search_judge(),
            thresholds=self._thresholds,
            progress=self._report,
        )

    def _source(self, folder: Path) -> onnx.ModelProto:
        """The float32 graph that a precision is made from, its decoder rewritten where processors are to run it.

        One that is not kept itself passes the gate here, so that INT8's loss is not another's.

        Raises:
            ExportError: its decoder cannot be rewritten.
        """
        file = self._entry.files["fp32"]
        model = onnx.load(self._bundle.path(file))
        if self._form is None:
            return model
        self._report(f"decoder to {self._form}", 0, 1)
        try:
            model = rewrite_decoder(model, self._form)
        except ExportError as error:
            message = f"{file} of {self._bundle.name}: {error.message.rstrip('.')}"
            raise ExportError(f"{message}. Or have processors run it as it is: --decoder direct", file=file) from error
        self._report(f"decoder to {self._form}", 1, 1)
        if self._kind != "fp32":
            with tempfile.TemporaryDirectory(dir=folder) as place:
                path = Path(place) / file
                path.write_bytes(model.SerializeToString())
                self._judge_float32(path, f"{file} in {self._form}")
        return model

    def _search_judge(self) -> Callable[[onnx.ModelProto], GateFigures]:
        """Judges the search's graphs on calibration images, so that the held-back ones stay unseen until the end."""
        gates: list[Gate] = []

        def judge(model: onnx.ModelProto) -> GateFigures:
            if not gates:
                images = list(islice(self._calibration, _SEARCH_IMAGES))
                gates.append(gate_on(self._bundle, self._backend, images, self._text, self._report))
            return gates[0].judge(GraphRunner(model, self._backend))

        return judge

    def install(self, folder: Path, graph: PreparedGraph) -> None:
        """Put a new graph into a staged bundle, pass it through the gate, and note what that said."""
        file = install_graph(folder, self._entry, graph)
        path = folder / file
        if self._kind == "fp32":
            verdict = self._judge_float32(path, file)
        else:
            runner = GraphRunner(onnx.load(path), self._backend)
            verdict = self._judge(runner, file, runner.name)
        _note(folder, verdict, graph.describe() | {"images": dict(self.description)})

    def build_engines(self, folder: Path) -> list[EngineBuild]:
        """Compile the engines of this size and pass them, image and masks together, through the gate."""
        self._backend.close()  # TensorRT wants the memory
        staged, config = open_bundle(folder, verify=False), self._config
        options = _with_timing_cache(config.engine)
        builds = build_engines(staged, self._size, config.precision, options, progress=self._report)
        with closing(engine_backend(staged, config.precision, [self._size])) as backend:
            self._judge(backend, builds[0].file, backend.reason)
        return builds

    def judge_on_cpu(self, folder: Path) -> CpuRecord:
        """Pass what OpenVINO computes on this processor through the gate, and record that it passed."""
        self._backend.close()
        staged, precision = open_bundle(folder, verify=False), self._config.precision
        with closing(cpu_backend(staged, precision)) as backend:
            name = f"image-{precision}-{_size_text(self._size)}"
            verdict = self._judge(backend, f"{name} in OpenVINO", backend.reason)
            return record_verdict(staged, self._size, verdict, backend.identity)

    def _judge_float32(self, path: Path, artefact: str) -> Verdict:
        """Pass a float32 graph whose decoder was rewritten through the gate of float32."""
        thresholds = self._thresholds if self._config.precision == "fp32" else THRESHOLDS["fp32"]
        runner = GraphRunner(path, self._backend)
        return self._judge(runner, artefact, runner.name, precision="fp32", thresholds=thresholds, tier="rewritten")

    def _judge(
        self,
        judged: Judged,
        artefact: str,
        ran_on: str,
        *,
        precision: str | None = None,
        thresholds: GateThresholds | None = None,
        tier: str | None = None,
    ) -> Verdict:
        """Pass an artefact through the gate; precision, thresholds and tier are those of the build unless given.

        Raises:
            ParityError: it is below the gate.
        """

        def done(count: int) -> None:
            self._report(f"gate of {artefact}", count, self._gate.images)

        precision, thresholds = precision or self._config.precision, thresholds or self._thresholds
        figures = self._gate.judge(judged, progress=done)
        require_parity(
            figures,
            thresholds,
            what=artefact,
            precision=precision,
            tier=tier or self._config.tier,
            against=self._against,
        )
        verdict = Verdict(
            artefact=artefact,
            precision=precision,
            figures=figures,
            thresholds=thresholds,
            ran_on=ran_on,
            against=self._against,
        )
        self.verdicts.append(verdict)
        return verdict


def _missing(config: BuildConfig) -> str | None:
    """Why nothing can be compiled here, as a sentence; None where it can.

    Raises:
        BackendError: the processor does not compute in this precision.
    """
    if config.device == "gpu":
        return missing_for_engines()
    missing = missing_for_cpu()
    if missing is None:
        require_cpu_precision(config.precision)
    return missing


def _with_timing_cache(options: EngineOptions) -> EngineOptions:
    """The options with a timing cache of this very device, unless one is named."""
    if options.timing_cache is not None:
        return options
    device = current_device()
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device.device_name}-sm{device.compute_capability}")
    path = cache_folder() / "timing" / f"{name}-trt{device.tensorrt_version}.cache"
    return replace(options, timing_cache=path)


def _target(source: Bundle, output: str | Path | None) -> Path:
    if output is not None:
        target = Path(output).expanduser().resolve()
        require_replaceable(target)
        return target
    shipped = Path(runtime.__file__).resolve().parent
    if not source.folder.is_relative_to(shipped):
        return source.folder
    return models_folder() / source.folder.name


def _entries(bundle: Bundle, config: BuildConfig) -> list[ImageEntry]:
    every = {(entry.height, entry.width): entry for entry in bundle.manifest.images}
    wanted = list(every) if config.sizes is None else list(dict.fromkeys(config.sizes))
    for size in wanted:
        if size not in every:
            have = ", ".join(_size_text(one) for one in every)
            raise InputError(
                f"{bundle.name} has image graphs for {have}, not for {_size_text(size)}. Export it: "
                f"tclkit export CHECKPOINT -o FOLDER --size {_size_text(size)}"
            )
        if "fp32" not in every[size].files:
            raise BundleError(f"{bundle.name} has no float32 graph for {_size_text(size)} to start from")
    return [every[size] for size in wanted]


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _take_common_graph(folder: Path, entry: ImageEntry, config: BuildConfig) -> None:
    """Have processors run the graph of every device in this precision: one of their own is removed, which is said."""
    file = remove_processor_graph(folder, entry.size, graph_precision(config.precision))
    if file is not None:
        also = "; float32 and bfloat16 share it" if graph_precision(config.precision) == "fp32" else ""
        _log.warning("%s is removed: processors take the graph of every device%s", file, also)


def _note(folder: Path, verdict: Verdict, made: Mapping[str, Any]) -> None:
    """Keep in bundle.json how a graph was made and what the gate said of it."""
    raw = read_raw_manifest(folder)
    raw["checks"].setdefault(verdict.precision, {})[verdict.artefact] = {
        **verdict.figures.to_dict(),
        "thresholds": asdict(verdict.thresholds),
        "ran_on": verdict.ran_on,
        "made": dict(made),
    }
    write_manifest(folder, raw)
