"""`tclkit verify`: the gate once more, on this machine, for all that a bundle may be run as; and a report to paste.

What a bundle says of itself was measured where it was built. Here each artefact is run again, on the processor or the
GPU at hand, against the float32 graph in ONNX Runtime.
"""

import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from tclkit.calib.progress import silent
from tclkit.runtime.bundle import Bundle, open_bundle
from tclkit.runtime.cpu_records import CpuIdentity, cpu_misfit, outdated_graphs, read_cpu_records
from tclkit.runtime.engines import (
    DeviceIdentity,
    EngineMiss,
    current_device,
    engine_misfit,
    find_engine,
    read_engines,
)
from tclkit.runtime.errors import TclkitError
from tclkit.runtime.manifest import ImageEntry
from tclkit.runtime.onnxruntime_backend import OnnxRuntimeBackend

from .cpu_build import cpu_backend, missing_for_cpu, this_cpu
from .engine_build import engine_backend, missing_for_engines
from .gate_inputs import embedded_prompts, gate_on, kept_thresholds, sample_batches
from .gates import THRESHOLDS, Gate, GateThresholds, Verdict
from .graph_runner import GraphRunner

Progress = Callable[[str, int, int], None]
_PACKAGES = (
    "tclkit",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "polygraphy",
    "cuda-python",
    "opencv-python-headless",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What `verify_bundle` found.

    bundle: name and hash of its bundle.json's seal. machine: versions and device. images: what was judged on.
    verdicts: of each artefact that ran. problems: artefact -> why it could not run although it should.
    not_for_here: (precision, size) -> why it has no engine for this machine, as a sentence.
    """

    bundle: Mapping[str, str]
    machine: Mapping[str, str]
    images: str
    verdicts: Sequence[Verdict]
    problems: Mapping[str, str]
    not_for_here: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """Whether everything that should run ran, and passed."""
        return not self.problems and all(verdict.passed for verdict in self.verdicts)

    @property
    def outcome(self) -> str:
        """In a word or two."""
        if not self.passed:
            return "FAILED"
        return "passed" if self.verdicts else "nothing to judge here"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        verdicts = [asdict(verdict) | {"passed": verdict.passed} for verdict in self.verdicts]
        values: dict[str, Any] = _finite(asdict(self) | {"verdicts": verdicts, "passed": self.passed})
        return values

    def report(self) -> str:
        """Markdown to paste into a bug report: a table for people, JSON for machines."""
        rows = [
            f"| {v.artefact} | {v.figures.label_agreement:.4f} | {v.figures.mask_iou:.4f} | "
            f"{v.figures.features_cosine:.5f} | {'pass' if v.passed else 'FAIL'} | {v.ran_on} |"
            for v in self.verdicts
        ]
        lines = [
            f"# tclkit verify: {self.bundle['name']}: {self.outcome}",
            "",
            *(f"- {name}: {value}" for name, value in {**self.machine, "images": self.images}.items()),
            "",
            "| artefact | label agreement | mask IoU | cosine | | ran on |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            *(f"- **{name}**: {why}" for name, why in self.problems.items()),
            *(f"- {name}: {why}" for name, why in self.not_for_here.items()),
            "",
            "```json",
            json.dumps(self.to_dict(), indent=1, allow_nan=False),
            "```",
            "",
        ]
        return "\n".join(lines)


def verify_bundle(
    model: str | Path,
    *,
    calibration: str | None = None,
    images: int = 16,
    prompts: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Judge every graph and every engine of a bundle on this machine, and what OpenVINO computes on its processor.

    Graphs for processors are judged as they are, in ONNX Runtime, and as what OpenVINO runs. One that is outdated is
    named and left out, for nothing runs it.

    OpenVINO is judged in float32, in which it needs no build, and in every precision that was built on this machine.

    Args:
        model: name or folder of a bundle; its files are compared with their hashes first.
        calibration: images to judge on, see `select_images`; None: the sample scenes of tclkit.
        images: how many of them.
        prompts: to judge with; None: a list that fits the model.
        progress: called as progress(what, done, in_all).

    Raises:
        BundleError: unknown or damaged bundle.
        InputError: images or prompts cannot be used.
    """
    bundle = open_bundle(model)
    report = progress or silent
    device, cpu = _device(), _cpu()
    text_ND = embedded_prompts(bundle, prompts, most=_most_prompts(bundle, device))
    backend = OnnxRuntimeBackend(bundle)
    verdicts: list[Verdict] = []
    problems: dict[str, str] = {}
    not_for_here: dict[str, str] = {}
    for entry in bundle.manifest.images:
        size = (entry.height, entry.width)
        batches = sample_batches(bundle, size) if calibration is None else _selected(bundle, size, calibration, images)
        gate = gate_on(bundle, backend, batches, text_ND, report)
        for precision, file in entry.files.items():
            thresholds = kept_thresholds(bundle, precision, file)
            if precision != "fp32":
                runner = GraphRunner(onnx.load(bundle.path(file)), backend)
                verdicts.append(_verdict(gate, runner, file, precision, thresholds, runner.name, report))
            if isinstance(device, str):
                continue
            name = f"{precision} engine {size[0]}x{size[1]}"
            try:
                verdicts += _engine_verdicts(bundle, entry, precision, device, gate, thresholds, report)
            except _NotBuiltError as error:
                not_for_here[name] = str(error)
            except TclkitError as error:  # an engine that should run here, and does not
                problems[name] = error.message.replace(str(bundle.folder), bundle.name)
        verdicts += _processor_verdicts(bundle, entry, gate, backend, report)
        for precision in _cpu_precisions(bundle, size, cpu):
            name = f"{precision} in OpenVINO {size[0]}x{size[1]}"
            try:
                verdicts.append(_cpu_verdict(bundle, size, precision, gate, report))
            except TclkitError as error:
                problems[name] = error.message.replace(str(bundle.folder), bundle.name)
    if isinstance(device, str):
        not_for_here["engines"] = device
    not_for_here |= outdated_graphs(bundle) | _cpu_misfits(bundle, cpu)
    return Verification(
        bundle={"name": bundle.name, "created": bundle.manifest.created, "tclkit": bundle.manifest.tclkit_version},
        machine=_machine(device, cpu),
        images="sample scenes of tclkit" if calibration is None else f"{Path(calibration).name} ({images} asked for)",
        verdicts=verdicts,
        problems=problems,
        not_for_here=not_for_here,
    )


def _most_prompts(bundle: Bundle, device: DeviceIdentity | str) -> int | None:
    """As many prompts as every engine takes that runs here; None where none does."""
    if isinstance(device, str):
        return None
    fitting = [engine.record for engine in read_engines(bundle) if engine_misfit(bundle, engine, device) is None]
    return min((record.max_prompts for record in fitting), default=None)


class _NotBuiltError(Exception):
    """No engine for this machine, for a reason that is no fault."""


def _engine_verdicts(
    bundle: Bundle,
    entry: ImageEntry,
    precision: str,
    device: DeviceIdentity,
    gate: Gate,
    thresholds: GateThresholds,
    report: Progress,
) -> Iterator[Verdict]:
    size = (entry.height, entry.width)
    for graph, kind in (("image", precision), ("masks", "fp32")):
        found = find_engine(bundle, graph=graph, precision=kind, size=size, device=device)
        if isinstance(found, EngineMiss):
            if found.reason == "damaged":
                raise found.error()
            raise _NotBuiltError(found.why)
        if graph == "image":
            name = found.path.name
    with closing(engine_backend(bundle, precision, [size])) as backend:
        yield _verdict(gate, backend, name, precision, thresholds, backend.reason, report)


def _processor_verdicts(
    bundle: Bundle, entry: ImageEntry, gate: Gate, backend: OnnxRuntimeBackend, report: Progress
) -> Iterator[Verdict]:
    """Of the graphs that only processors run, as ONNX Runtime computes them."""
    for precision in entry.processor:
        graph = bundle.manifest.processor_graph(entry, precision)
        if graph is None:
            continue
        path = bundle.path(graph.file)
        runner = GraphRunner(path if precision == "fp32" else onnx.load(path), backend)
        thresholds = kept_thresholds(bundle, precision, graph.file)
        yield _verdict(gate, runner, graph.file, precision, thresholds, runner.name, report)


def _cpu_precisions(bundle: Bundle, size: tuple[int, int], cpu: CpuIdentity | str) -> list[str]:
    """What OpenVINO is judged in: float32, and what was built here for this size."""
    if isinstance(cpu, str):
        return []
    fitting = [
        one.precision for one in read_cpu_records(bundle) if one.size == size and not cpu_misfit(bundle, one, cpu)
    ]
    return list(dict.fromkeys(["fp32", *fitting]))


def _cpu_verdict(bundle: Bundle, size: tuple[int, int], precision: str, gate: Gate, report: Progress) -> Verdict:
    kept = {(one.precision, one.size): one.thresholds for one in read_cpu_records(bundle)}.get((precision, size))
    thresholds = GateThresholds(**kept) if kept else THRESHOLDS[precision]
    with closing(cpu_backend(bundle, precision)) as backend:
        name = f"image-{precision}-{size[0]}x{size[1]} in OpenVINO"
        return _verdict(gate, backend, name, precision, thresholds, backend.reason, report)


def _cpu_misfits(bundle: Bundle, cpu: CpuIdentity | str) -> dict[str, str]:
    """What was built for a processor and says nothing here, with the reason."""
    records = read_cpu_records(bundle)
    if isinstance(cpu, str):
        return {"processor": cpu} if records else {}
    misfits = {f"{one.name} in OpenVINO": cpu_misfit(bundle, one, cpu) for one in records}
    return {name: why for name, why in misfits.items() if why}


def _verdict(
    gate: Gate, judged: Any, artefact: str, precision: str, thresholds: GateThresholds, ran_on: str, report: Progress
) -> Verdict:
    figures = gate.judge(judged, progress=lambda done: report(f"gate of {artefact}", done, gate.images))
    return Verdict(artefact=artefact, precision=precision, figures=figures, thresholds=thresholds, ran_on=ran_on)


def _selected(bundle: Bundle, size: tuple[int, int], calibration: str, images: int) -> list[Any]:
    from tclkit.calib import select_images

    chosen = select_images(
        calibration,
        size=size,
        count=images,
        held_back=0,
        mean_rgb=bundle.manifest.preprocessing.mean,
        patch_size=bundle.manifest.model.patch_size,
        batch_size=1,
    )
    return list(chosen.calibration)


def _device() -> DeviceIdentity | str:
    """The device that engines would run on, or why there is none."""
    missing = missing_for_engines()
    return current_device() if missing is None else missing


def _cpu() -> CpuIdentity | str:
    """The processor that OpenVINO would run on, or why it does not."""
    missing = missing_for_cpu()
    return this_cpu() if missing is None else missing


def _machine(device: DeviceIdentity | str, cpu: CpuIdentity | str) -> dict[str, str]:
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203
            continue
    return {
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "packages": ", ".join(versions),
        "device": str(device),
        "processor": str(cpu),
    }


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
