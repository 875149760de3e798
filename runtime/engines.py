"""Compiled engines beside a bundle: what each was built from and for, how it is named, written, found and checked.

An engine fits one device and one TensorRT version, so engines are not files of the bundle: bundle.json does not list
them, and a bundle may be copied without them. They lie in BUNDLE/engines/ as pairs: NAME.engine, and NAME.json, the
side-car, which says all that has to agree. bundle.json has the hash of the graph; the side-car has the hash of the
graph that it was built from, and of the engine; both are compared before TensorRT sees a byte. That finds damage, not
malice: who can write the engine can write its side-car. A version-compatible engine carries code of its own, so it is
loaded only where this user built it, which a list in tclkit's own folder remembers.
"""

import dataclasses
import datetime as dt
import hashlib
import importlib.metadata
import json
import logging
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._section import AGAIN, Section
from .bundle import ENGINES_FOLDER, Bundle, find_bundle
from .errors import BackendError, BundleError, EngineMismatchError, TclkitError
from .files import atomic_file, models_folder
from .manifest import PRECISIONS

ENGINE_SCHEMA_VERSION = 1
GRAPHS = ("image", "masks")
FLAGS = ("hardware-compatible", "version-compatible", "dla")
PREFERRED_PRECISIONS = ("int8", "fp16", "fp32")
_FALLBACK = "or use --backend onnxruntime"
_NEAREST = (
    "graph changed",
    "damaged",
    "not trusted",
    "another TensorRT",
    "another device",
    "another system",
    "none built",
    "no graph",
)
_VERSION = re.compile(r"[0-9]+(\.[0-9A-Za-z]+)*")
_CAPABILITY = re.compile(r"[0-9]+\.[0-9]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)


def _this_system() -> str:
    return f"{platform.system()} {platform.machine()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceIdentity:
    """What an engine has to fit.

    tensorrt_version: as `tensorrt.__version__`, such as "10.3.0".
    compute_capability: of the current CUDA device, such as "8.7".
    device_name: as CUDA names it, such as "Orin".
    system: operating system and architecture, such as "Linux aarch64".
    """

    tensorrt_version: str
    compute_capability: str
    device_name: str
    system: str = dataclasses.field(default_factory=_this_system)

    def __str__(self) -> str:
        return _place(self)  # TensorRT 10.3.0 on sm_87 (Orin)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """The side-car of an engine: what it was built from, for what, and what its bytes have to be.

    graph: "image" or "masks".
    precision: "fp32", "fp16" or "int8"; of the masks graph always "fp32".
    height, width: the image size that it serves, in pixels.
    graph_sha256: of the ONNX file that it was built from, as bundle.json has it.
    tensorrt_version, compute_capability, device_name, system: where it was built; see `DeviceIdentity`.
    max_batch: images at once.
    max_prompts: prompts at once; concerns the masks graph.
    flags: of "hardware-compatible", "version-compatible" and "dla".
    build_s: seconds that the build took.
    created: ISO time.
    tclkit_version: that built it.
    engine_sha256: hex SHA-256 of the engine; `write_engine` fills it in.
    size_bytes: of the engine; `write_engine` fills it in.
    """

    graph: str
    precision: str
    height: int
    width: int
    graph_sha256: str
    tensorrt_version: str
    compute_capability: str
    device_name: str
    system: str
    max_batch: int
    max_prompts: int
    flags: tuple[str, ...] = ()
    build_s: float = 0.0
    created: str = ""
    tclkit_version: str = ""
    engine_sha256: str = ""
    size_bytes: int = 0

    def __post_init__(self) -> None:
        for key, expected, fits in self._rules():
            if not fits:
                raise BundleError(f"{key!r} should be {expected}, found {getattr(self, key)!r}", key=key)

    def _rules(self) -> list[tuple[str, str, bool]]:
        return [
            ("graph", f"one of {', '.join(GRAPHS)}", self.graph in GRAPHS),
            ("precision", f"one of {', '.join(PRECISIONS)}", self.precision in PRECISIONS),
            ("precision", "fp32 for the masks graph", self.graph != "masks" or self.precision == "fp32"),
            ("graph_sha256", "64 lower-case hexadecimal digits", _SHA256.fullmatch(self.graph_sha256) is not None),
            ("tensorrt_version", "a version", _VERSION.fullmatch(self.tensorrt_version) is not None),
            ("compute_capability", "such as 8.7", _CAPABILITY.fullmatch(self.compute_capability) is not None),
            ("flags", f"some of {', '.join(FLAGS)}", set(self.flags) <= set(FLAGS)),
            *((key, "above 0", getattr(self, key) > 0) for key in ("height", "width", "max_batch", "max_prompts")),
        ]

    @property
    def device(self) -> DeviceIdentity:
        """Where it was built."""
        return DeviceIdentity(
            tensorrt_version=self.tensorrt_version,
            compute_capability=self.compute_capability,
            device_name=self.device_name,
            system=self.system,
        )

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels of the images that it serves."""
        return self.height, self.width

    @property
    def place(self) -> str:
        """Where it was built, such as "TensorRT 10.3.0 on sm_87 (Orin)"."""
        return _place(self)

    @property
    def stem(self) -> str:
        """Name of both files without their suffix, such as "image-fp16-448x448-trt10.3.0-sm87"."""
        return _stem(self.graph, self.precision, self.size, self.tensorrt_version, self.compute_capability)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFile:
    """An engine that lies beside a bundle.

    path: of the .engine file.
    record: its side-car.
    """

    path: Path
    record: EngineRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMiss:
    """Why no engine can be used.

    reason: "no graph", "none built", "another TensorRT", "another device", "another system", "graph changed",
        "not trusted" or "damaged".
    why: the same as a sentence, with what was expected and what was found.
    remedy: what to do, with the fallback.
    record: side-car of the engine that came nearest; None where there is none.
    """

    reason: str
    why: str
    remedy: str
    record: EngineRecord | None = None

    @property
    def message(self) -> str:
        """Why and remedy."""
        return f"{self.why}. {self.remedy}"

    def error(self) -> TclkitError:
        """The error to raise where this engine is asked for.

        Returns:
            BundleError for damaged files, BackendError where nothing was built, else EngineMismatchError.
        """
        kind: type[TclkitError] = EngineMismatchError
        if self.reason == "damaged":
            kind = BundleError
        elif self.reason in ("no graph", "none built"):
            kind = BackendError
        return kind(self.message, reason=self.reason, record=self.record)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSet:
    """All that runs a bundle in one precision on one device.

    precision: of the image graphs.
    device: that all of them fit.
    engines: the image and the masks engine of each size (H, W).
    """

    precision: str
    device: DeviceIdentity
    engines: Mapping[tuple[int, int], tuple[EngineFile, EngineFile]]


def current_device() -> DeviceIdentity:
    """TensorRT's version and the current CUDA device; imports tensorrt and cuda-python.

    Raises:
        BackendError: one of them is not installed or cannot be loaded, or there is no device.
    """
    from .cuda_memory import device_name_and_capability

    name, capability = device_name_and_capability()
    version = str(import_tensorrt().__version__)
    return DeviceIdentity(tensorrt_version=version, compute_capability=capability, device_name=name)


def import_tensorrt() -> Any:
    """The module `tensorrt`.

    Raises:
        BackendError: it is not installed, or its libraries cannot be loaded.
    """
    try:
        import tensorrt
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"tensorrt cannot be imported ({error}). Jetson: it comes with JetPack (apt install python3-libnvinfer); "
            "make the virtual environment with --system-site-packages. Servers: pip install tensorrt"
        ) from error
    return tensorrt


def write_engine(bundle_folder: str | Path, record: EngineRecord, engine: bytes) -> EngineRecord:
    """Put an engine beside a bundle, in the place of an earlier one of the same name.

    The old side-car goes first and the new one comes last: a half-written pair is never found.

    Args:
        bundle_folder: the bundle's folder.
        record: what was built; hash and size are made here, time and version where they are empty.
        engine: as TensorRT serialised it; bytes, or another buffer.

    Returns:
        The complete record.
    """
    folder = Path(bundle_folder) / ENGINES_FOLDER
    complete = dataclasses.replace(
        record,
        engine_sha256=hashlib.sha256(engine).hexdigest(),
        size_bytes=memoryview(engine).nbytes,
        created=record.created or dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        tclkit_version=record.tclkit_version or importlib.metadata.version("tclkit"),
    )
    if "version-compatible" in complete.flags:  # only these are asked who built them
        _remember_built(complete.engine_sha256)
    side_car = folder / f"{complete.stem}.json"
    side_car.unlink(missing_ok=True)
    with atomic_file(folder / f"{complete.stem}.engine") as temporary:
        temporary.write_bytes(engine)
    values = {"schema_version": ENGINE_SCHEMA_VERSION, **dataclasses.asdict(complete)}
    with atomic_file(side_car) as temporary:
        temporary.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return complete


def was_built_here(record: EngineRecord) -> bool:
    """Whether this user's tclkit built an engine: what a side-car says of itself proves nothing."""
    try:
        return record.engine_sha256 in _built_here().read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError):
        return False


def _remember_built(engine_sha256: str) -> None:
    path = _built_here()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="ascii") as stream:
        stream.write(f"{engine_sha256}\n")


def _built_here() -> Path:
    return models_folder().parent / "engines-built-here.txt"


def read_engines(bundle: Bundle) -> tuple[EngineFile, ...]:
    """All engines beside a bundle, by name, for any device; a broken side-car is announced and left out."""
    engines, broken = _scan(bundle)
    for miss in broken.values():
        _log.warning("left out: %s", miss)
    return engines


def find_engine(
    bundle: Bundle, *, graph: str, precision: str, size: tuple[int, int], device: DeviceIdentity
) -> EngineFile | EngineMiss:
    """Find the engine of one graph that fits a device; its bytes are not read yet, see `read_engine_bytes`.

    Args:
        bundle: opened.
        graph: "image" or "masks".
        precision: of the graph; "fp32" for the masks graph.
        size: (H, W) in pixels of the images.
        device: where it is to run.

    Returns:
        The engine, or why there is none.
    """
    remedy = f"Build it here: {build_command(bundle, precision)}, {_FALLBACK}"
    if _graph_file(bundle, graph, precision, size) is None:
        have = ", ".join(_precisions_of(bundle, size)) or "no precision"
        why = f"{bundle.name} has no {graph} graph in {precision} for {_size_text(size)} (it has {have})"
        return EngineMiss(reason="no graph", why=why, remedy=remedy)
    engines, broken = _scan(bundle)
    found = [engine for engine in engines if _serves(engine.record, graph, precision, size)]
    exact = _stem(graph, precision, size, device.tensorrt_version, device.compute_capability)
    found.sort(key=lambda engine: engine.record.stem != exact)  # before one that is merely compatible
    misses = []
    for engine in found:
        miss = engine_misfit(bundle, engine, device)
        if miss is None:
            return engine
        misses.append(miss)
    if exact in broken:
        why = str(broken[exact])
        misses.append(EngineMiss(reason="damaged", why=why, remedy=rebuild_remedy(bundle, precision)))
    if misses:
        return min(misses, key=lambda miss: _NEAREST.index(miss.reason))
    why = f"no {graph} engine in {precision} was built for {bundle.name} at {_size_text(size)}"
    return EngineMiss(reason="none built", why=why, remedy=remedy)


def find_engines(bundle: Bundle, *, precision: str, device: DeviceIdentity) -> EngineSet | EngineMiss:
    """Find the image and the masks engine of every image size of a bundle.

    Args:
        bundle: opened.
        precision: of the image graphs, or "auto": the first of int8, fp16 and fp32 that is complete.
        device: where they are to run.

    Returns:
        The engines, or the nearest reason why they are not complete.
    """
    misses = []
    for name in PREFERRED_PRECISIONS if precision == "auto" else (precision,):
        found = _find_set(bundle, name, device)
        if isinstance(found, EngineSet):
            return found
        misses.append(found)
    nearest = min(misses, key=lambda miss: _NEAREST.index(miss.reason))
    if precision == "auto" and nearest.reason == "none built":
        why = f"no engines were built for {bundle.name}"
        return EngineMiss(
            reason=nearest.reason, why=why, remedy=f"Build them here: {build_command(bundle, 'fp16')}, {_FALLBACK}"
        )
    return nearest


def engine_misfit(bundle: Bundle, engine: EngineFile, device: DeviceIdentity) -> EngineMiss | None:
    """Why an engine cannot run a bundle on a device; None where nothing that shows from outside speaks against it.

    Args:
        bundle: that it lies beside.
        engine: from `read_engines`.
        device: where it is to run.
    """
    record = engine.record
    reason, why = _first_difference(bundle, engine, device)
    if not reason:
        return None
    return EngineMiss(reason=reason, why=why, remedy=rebuild_remedy(bundle, record.precision), record=record)


def read_engine_bytes(engine: EngineFile, *, remedy: str = "Build it again: tclkit build-engine") -> bytes:
    """Read an engine and compare it with its side-car.

    Args:
        engine: from `find_engine`.
        remedy: closes the message of an error.

    Raises:
        BundleError: it cannot be read, or its bytes are not those that were written.
    """
    try:
        content = engine.path.read_bytes()
    except OSError as error:
        message = f"{engine.path} cannot be read: {error.strerror}. {remedy}"
        raise BundleError(message, file=engine.path.name) from error
    found, expected = hashlib.sha256(content).hexdigest(), engine.record.engine_sha256
    if found != expected:
        raise BundleError(
            f"{engine.path} is damaged: expected SHA-256 {expected}, found {found}. {remedy}",
            file=engine.path.name,
            expected=expected,
            found=found,
        )
    return content


def build_command(bundle: Bundle, precision: str) -> str:
    """The command that builds a bundle's engines, to be pasted into a shell; what calibrates a new graph is named."""
    is_new = precision == "int8" and any(precision not in image.files for image in bundle.manifest.images)
    calibration = " --calibration IMAGES" if is_new else ""
    return f"tclkit build-engine --{precision} --model {shlex.quote(_model_argument(bundle))}{calibration}"


def _find_set(bundle: Bundle, precision: str, device: DeviceIdentity) -> EngineSet | EngineMiss:
    engines = {}
    for entry in bundle.manifest.images:
        size = (entry.height, entry.width)
        image = find_engine(bundle, graph="image", precision=precision, size=size, device=device)
        if isinstance(image, EngineMiss):
            return image
        masks = find_engine(bundle, graph="masks", precision="fp32", size=size, device=device)
        if isinstance(masks, EngineMiss):  # it is built along with the image engine
            return dataclasses.replace(masks, remedy=rebuild_remedy(bundle, precision))
        engines[size] = (image, masks)
    return EngineSet(precision=precision, device=device, engines=engines)


def _first_difference(bundle: Bundle, engine: EngineFile, device: DeviceIdentity) -> tuple[str, str]:
    """Reason and sentence; both empty where engine and device agree."""
    record, name = engine.record, engine.path.name
    both = f"{name} was built with {_place(record)}, but this machine has {_place(device)}"
    if record.system != device.system:
        why = f"{name} was built on {record.system}, but this machine is {device.system}; an engine fits one system"
        return "another system", why
    if not _fits_capability(record, device):
        return "another device", f"{both}; an engine fits one compute capability"
    if not _fits_version(record, device):
        return "another TensorRT", f"{both}; an engine fits one TensorRT version"
    expected = _graph_sha256(bundle, record)
    if record.graph_sha256 != expected:
        why = f"{name} was built from another {record.graph} graph ({record.graph_sha256[:12]}) than "
        return "graph changed", f"{why}{bundle.name} has now ({expected[:12] or 'none'})"
    damage = _damage(engine)
    if damage:
        return "damaged", damage
    if "version-compatible" in record.flags and not was_built_here(record):
        why = f"{name} is version-compatible, so it carries code that would run here, and it was not built by you here"
        return "not trusted", why
    return "", ""


def _damage(engine: EngineFile) -> str:
    """What can be seen without reading the engine."""
    path, record = engine.path, engine.record
    try:
        if not path.resolve(strict=True).is_relative_to(path.parent.parent.resolve()):
            return f"{path} leads outside the bundle"
        size = path.stat().st_size
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        return f"{path} is not there, though its side-car is"
    if not path.is_file():
        return f"{path} is not a regular file"
    if size != record.size_bytes:
        return f"{path} is damaged: expected {record.size_bytes} bytes, found {size}"
    return ""


def _fits_capability(record: EngineRecord, device: DeviceIdentity) -> bool:
    """Hardware-compatible engines (AMPERE_PLUS) run on every capability from 8.0 on."""
    if record.compute_capability == device.compute_capability:
        return True
    return "hardware-compatible" in record.flags and _numbers(device.compute_capability) >= (8, 0)


def _fits_version(record: EngineRecord, device: DeviceIdentity) -> bool:
    """Version-compatible engines run on later versions too, never on earlier ones."""
    if record.tensorrt_version == device.tensorrt_version:
        return True
    is_later = _numbers(device.tensorrt_version) >= _numbers(record.tensorrt_version)
    return "version-compatible" in record.flags and is_later


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _place(at: EngineRecord | DeviceIdentity) -> str:
    capability = at.compute_capability.replace(".", "")
    return f"TensorRT {at.tensorrt_version} on sm_{capability} ({at.device_name})"


def rebuild_remedy(bundle: Bundle, precision: str) -> str:
    """What to do about an engine that cannot be used, and the fallback; closes a message."""
    return f"Rebuild it here: {build_command(bundle, precision)}, {_FALLBACK}"


def _model_argument(bundle: Bundle) -> str:
    """The bundle's name where that finds it, else its folder."""
    try:
        is_found = find_bundle(bundle.name) == bundle.folder
    except BundleError:
        is_found = False
    return bundle.name if is_found else str(bundle.folder)


def _scan(bundle: Bundle) -> tuple[tuple[EngineFile, ...], dict[str, BundleError]]:
    """Engines by name, and what is wrong with the side-cars that cannot be used, by stem."""
    folder = bundle.folder / ENGINES_FOLDER
    engines: list[EngineFile] = []
    broken: dict[str, BundleError] = {}
    try:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise BundleError(f"{folder} cannot be read: {error.strerror}") from error
    for path in paths:
        if path.suffix != ".json" or path.name.startswith("."):
            continue
        try:
            engines.append(EngineFile(path=path.with_suffix(".engine"), record=_read_record(path)))
        except BundleError as error:
            broken[path.stem] = error
    return tuple(engines), broken


def _read_record(path: Path) -> EngineRecord:
    again = "Build the engine again: tclkit build-engine"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError(f"an object was expected, found {type(raw).__name__}")
        record = _record_from_section(Section(raw, str(path), ""))
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}", file=path.name) from error
    except BundleError as error:
        said = error.message.removesuffix(AGAIN).rstrip(". ")
        where = "" if str(path) in said else f"{path}: "
        raise BundleError(f"{where}{said}. {again}", file=path.name) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}). {again}", file=path.name) from error
    if record.stem != path.stem:  # so that no side-car can speak for another engine
        raise BundleError(f"{path} describes {record.stem}. {again}", file=path.name)
    return record


def _record_from_section(section: Section) -> EngineRecord:
    version = section.integer("schema_version")
    if version != ENGINE_SCHEMA_VERSION:
        raise section.wrong("schema_version", str(ENGINE_SCHEMA_VERSION), version)
    section.refuse_unknown(["schema_version", *EngineRecord.__dataclass_fields__])
    engine_sha256 = section.text("engine_sha256")
    if not _SHA256.fullmatch(engine_sha256):
        raise section.wrong("engine_sha256", "64 lower-case hexadecimal digits", engine_sha256)
    build_s = section.value("build_s")
    if type(build_s) not in (int, float) or not 0 <= build_s < float("inf"):
        raise section.wrong("build_s", "a number of seconds", build_s)
    texts: Sequence[str] = ("graph", "precision", "graph_sha256", "tensorrt_version", "compute_capability")
    texts = (*texts, "device_name", "system", "created", "tclkit_version")
    numbers = ("height", "width", "max_batch", "max_prompts", "size_bytes")
    values: dict[str, Any] = {key: section.text(key) for key in texts}
    values |= {key: section.positive(key) for key in numbers}
    return EngineRecord(flags=section.texts("flags"), build_s=float(build_s), engine_sha256=engine_sha256, **values)


def _serves(record: EngineRecord, graph: str, precision: str, size: tuple[int, int]) -> bool:
    return (record.graph, record.precision, record.size) == (graph, precision, size)


def _graph_sha256(bundle: Bundle, record: EngineRecord) -> str:
    """Hash of the graph in bundle.json; empty where the bundle no longer has it."""
    file = _graph_file(bundle, record.graph, record.precision, record.size)
    return bundle.manifest.files[file].sha256 if file is not None else ""


def _graph_file(bundle: Bundle, graph: str, precision: str, size: tuple[int, int]) -> str | None:
    entries = [entry for entry in bundle.manifest.images if (entry.height, entry.width) == size]
    if not entries:
        return None
    return bundle.manifest.masks if graph == "masks" else entries[0].files.get(precision)


def _precisions_of(bundle: Bundle, size: tuple[int, int]) -> list[str]:
    return [p for entry in bundle.manifest.images if (entry.height, entry.width) == size for p in entry.files]


def _stem(graph: str, precision: str, size: tuple[int, int], version: str, capability: str) -> str:
    return f"{graph}-{precision}-{_size_text(size)}-trt{version}-sm{capability.replace('.', '')}"


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
