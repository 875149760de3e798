"""What OpenVINO may compute on this processor: records beside a bundle that a graph passed the gate here.

OpenVINO compiles a bundle's own graphs when they are opened, so there is no engine to keep beside a bundle, only the
knowledge that this graph, in this precision, with this OpenVINO, on this processor, gives what the float32 graph gives.
A record is JSON and holds figures, never code; it lies in BUNDLE/engines/openvino/, which bundle.json does not list.
Another machine's record fits nothing here. What was compiled is kept by `compiled_models`, in the user's own cache.
"""

import dataclasses
import datetime as dt
import hashlib
import importlib.metadata
import json
import logging
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._section import Section
from .bundle import ENGINES_FOLDER, Bundle
from .errors import BundleError
from .files import atomic_file
from .manifest import RUN_PRECISIONS, graph_precision

CPU_RECORD_SCHEMA_VERSION = 1
CPU_RECORDS_FOLDER = f"{ENGINES_FOLDER}/openvino"
PREFERRED_CPU_PRECISIONS = ("int8", "bf16", "fp32")
GATE_FIGURES = ("label_agreement", "mask_iou", "features_cosine")
_CPUINFO = Path("/proc/cpuinfo")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEXTS = ("precision", "graph_sha256", "openvino_version", "processor", "flags_sha256", "system")
_AGAIN = "Build it again: tclkit build-engine --device cpu"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuIdentity:
    """What a record, and a compiled model, has to fit.

    openvino_version: with its build, such as "2026.4.1-22050-...".
    processor: its name.
    flags_sha256: hash of the instruction sets that it has, as the operating system and OpenVINO list them.
    system: operating system and architecture, such as "Linux x86_64".
    """

    openvino_version: str
    processor: str
    flags_sha256: str
    system: str

    def __str__(self) -> str:
        return f"OpenVINO {self.openvino_version.split('-')[0]} on {self.processor}"


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuRecord:
    """That an image graph passed the gate in a precision, and where.

    precision: computed in, "fp32", "bf16" or "int8".
    height, width: of the images, in pixels.
    graph_sha256: of the ONNX file that was compiled, as bundle.json has it.
    openvino_version, processor, flags_sha256, system: where; see `CpuIdentity`.
    figures, thresholds: of the gate, figure -> value.
    created: ISO time. tclkit_version: that judged it. `write_cpu_record` fills both in.
    """

    precision: str
    height: int
    width: int
    graph_sha256: str
    openvino_version: str
    processor: str
    flags_sha256: str
    system: str
    figures: Mapping[str, float]
    thresholds: Mapping[str, float]
    created: str = ""
    tclkit_version: str = ""

    def __post_init__(self) -> None:
        rules = [
            ("precision", f"one of {', '.join(RUN_PRECISIONS)}", self.precision in RUN_PRECISIONS),
            ("graph_sha256", "64 lower-case hexadecimal digits", _SHA256.fullmatch(self.graph_sha256) is not None),
            ("flags_sha256", "64 lower-case hexadecimal digits", _SHA256.fullmatch(self.flags_sha256) is not None),
        ]
        rules += [
            ("thresholds", "those of the gate", set(self.thresholds) == set(GATE_FIGURES)),
            ("figures", "those of the gate", set(self.figures) == set(GATE_FIGURES)),
        ]
        for key, expected, fits in rules:
            if not fits:
                raise BundleError(f"{key!r} should be {expected}, found {getattr(self, key)!r}", key=key)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels of the images."""
        return self.height, self.width

    @property
    def identity(self) -> CpuIdentity:
        """Where it was judged."""
        return CpuIdentity(
            openvino_version=self.openvino_version,
            processor=self.processor,
            flags_sha256=self.flags_sha256,
            system=self.system,
        )

    @property
    def name(self) -> str:
        """Name of the file without its suffix, such as "image-bf16-448x448"; one a precision and size."""
        return f"image-{self.precision}-{self.height}x{self.width}"


def cpu_identity(core: Any) -> CpuIdentity:
    """Identify this processor and OpenVINO.

    Args:
        core: an `openvino.Core`.
    """
    import openvino

    capabilities = sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    flags = json.dumps([capabilities, _processor_flags()])
    return CpuIdentity(
        openvino_version=str(openvino.get_version()),
        processor=str(core.get_property("CPU", "FULL_DEVICE_NAME")).strip() or "an unnamed processor",
        flags_sha256=hashlib.sha256(flags.encode()).hexdigest(),
        system=f"{platform.system()} {platform.machine()}",
    )


def write_cpu_record(bundle_folder: str | Path, record: CpuRecord) -> CpuRecord:
    """Put a record beside a bundle, in the place of an earlier one of the same precision and size.

    Returns:
        The complete record.
    """
    complete = dataclasses.replace(
        record,
        created=record.created or dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        tclkit_version=record.tclkit_version or importlib.metadata.version("tclkit"),
    )
    values = {"schema_version": CPU_RECORD_SCHEMA_VERSION, **dataclasses.asdict(complete)}
    with atomic_file(Path(bundle_folder) / CPU_RECORDS_FOLDER / f"{complete.name}.json") as temporary:
        temporary.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return complete


def read_cpu_records(bundle: Bundle) -> tuple[CpuRecord, ...]:
    """All records beside a bundle, by name, of any machine; a broken one is announced and left out.

    Raises:
        BundleError: the folder cannot be read.
    """
    folder = bundle.folder / CPU_RECORDS_FOLDER
    try:
        paths = sorted(folder.glob("[!.]*.json")) if folder.is_dir() else []
    except OSError as error:
        raise BundleError(f"{folder} cannot be read: {error.strerror}") from error
    return tuple(record for record in map(_read_or_announced, paths) if record is not None)


def cpu_misfit(bundle: Bundle, record: CpuRecord, identity: CpuIdentity) -> str:
    """Why a record says nothing about this bundle on this machine, as a sentence; empty where it does."""
    what = f"{record.precision} for {record.height}x{record.width}"
    file = graph_file(bundle, record.precision, record.size)
    if file is None or bundle.manifest.files[file].sha256 != record.graph_sha256:
        return f"{what} was judged with another image graph than {bundle.name} has now"
    if record.identity != identity:
        found = "another processor of this name" if str(record.identity) == str(identity) else str(identity)
        return f"{what} was judged with {record.identity}, but this machine has {found}"
    return ""


def fitting_precisions(bundle: Bundle, identity: CpuIdentity) -> tuple[str, ...]:
    """Precisions, the fastest first, that passed the gate here for every image size of a bundle."""
    fitting = {(one.precision, one.size) for one in read_cpu_records(bundle) if not cpu_misfit(bundle, one, identity)}
    sizes = [(entry.height, entry.width) for entry in bundle.manifest.images]
    return tuple(p for p in PREFERRED_CPU_PRECISIONS if all((p, size) in fitting for size in sizes))


def graph_file(bundle: Bundle, precision: str, size: tuple[int, int]) -> str | None:
    """Name of the file that a processor runs to compute in a precision; None where the bundle has none.

    That is the graph for processors where there is one, else the one for every device.
    """
    entry = next((entry for entry in bundle.manifest.images if entry.size == size), None)
    if entry is None:
        return None
    kind = graph_precision(precision)
    own = bundle.manifest.processor_graph(entry, kind)
    return entry.files.get(kind) if own is None else own.file


def outdated_graphs(bundle: Bundle) -> dict[str, str]:
    """Graphs for processors that are not run, by file name: why, and how to have them again, as a sentence."""
    why = f"was made from another float32 graph than {bundle.name} has now, and is not run"
    return {file: f"{file} {why}. {_AGAIN}" for file in bundle.manifest.outdated_files}


def _processor_flags() -> list[str]:
    """Instruction sets of the first processor as Linux lists them, sorted; elsewhere the processor's description."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return [platform.processor()]
    listed = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return sorted(listed.partition(":")[2].split())


def _read_or_announced(path: Path) -> CpuRecord | None:
    try:
        return _read(path)
    except BundleError as error:
        _log.warning("left out: %s", error)
        return None


def _read(path: Path) -> CpuRecord:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"an object was expected, found {type(raw).__name__}")
        record = _record_from_section(Section(raw, str(path), ""))
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", file=path.name) from error
    except BundleError as error:
        where = "" if str(path) in error.message else f"{path}: "
        raise BundleError(f"{where}{error.message.rstrip('. ')}. {_AGAIN}", file=path.name) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}). {_AGAIN}", file=path.name) from error
    if record.name != path.stem:  # so that no record can speak for another
        raise BundleError(f"{path} describes {record.name}. {_AGAIN}", file=path.name)
    return record


def _record_from_section(section: Section) -> CpuRecord:
    version = section.integer("schema_version")
    if version != CPU_RECORD_SCHEMA_VERSION:
        raise section.wrong("schema_version", str(CPU_RECORD_SCHEMA_VERSION), version)
    section.refuse_unknown(["schema_version", *CpuRecord.__dataclass_fields__])
    values: dict[str, Any] = {key: section.text(key) for key in (*_TEXTS, "created", "tclkit_version")}
    values |= {key: section.positive(key) for key in ("height", "width")}
    for key in ("figures", "thresholds"):
        inner = section.section(key)
        values[key] = {name: inner.fraction(name) for name in inner.raw}
    return CpuRecord(**values)
