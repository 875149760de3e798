"""Graphs of a bundle compiled by OpenVINO for this processor: judged first, recorded beside the bundle, kept compiled.

What is compiled stays in the user's cache; a bundle, which travels, gets the gate's figures only (`cpu_records`).
"""

import importlib.util
import logging
from collections.abc import Sequence

from tclkit.runtime.bundle import Bundle
from tclkit.runtime.cpu_records import (
    CPU_RECORDS_FOLDER,
    GATE_FIGURES,
    CpuIdentity,
    CpuRecord,
    cpu_identity,
    cpu_misfit,
    graph_file,
    read_cpu_records,
    write_cpu_record,
)
from tclkit.runtime.errors import BackendError, BundleError
from tclkit.runtime.extras import install_command
from tclkit.runtime.openvino_backend import OpenVinoBackend, check_cpu_precision, openvino_core

from .gates import Verdict

Size = tuple[int, int]
_log = logging.getLogger(__name__)


def missing_for_cpu() -> str | None:
    """What this machine lacks to compile for its processor, as one sentence; None where it lacks nothing."""
    if importlib.util.find_spec("openvino") is None:
        return f"OpenVINO is not installed here ({install_command('openvino')})"
    try:
        openvino_core()
    except BackendError as error:
        return error.message
    return None


def require_cpu_precision(precision: str) -> None:
    """Refuse a precision that this processor does not compute in, before any work is done.

    Raises:
        BackendError: as said, or OpenVINO is missing.
    """
    check_cpu_precision(openvino_core(), precision)


def this_cpu() -> CpuIdentity:
    """This processor and OpenVINO.

    Raises:
        BackendError: OpenVINO is missing.
    """
    return cpu_identity(openvino_core())


def cpu_backend(bundle: Bundle, precision: str) -> OpenVinoBackend:
    """A bundle on this processor, to be judged: nothing is read from the cache, nothing is left in it."""
    backend = OpenVinoBackend(bundle, precision=precision, keep_compiled=False)
    backend.reason = f"{backend.identity}, {precision}"
    return backend


def record_verdict(bundle: Bundle, size: Size, verdict: Verdict, identity: CpuIdentity) -> CpuRecord:
    """Put beside a bundle that the gate passed what OpenVINO computes for one image size."""
    file = graph_file(bundle, verdict.precision, size)
    if file is None:
        raise BundleError(f"{bundle.name} has no image graph in {verdict.precision} for {size[0]}x{size[1]}")
    record = CpuRecord(
        precision=verdict.precision,
        height=size[0],
        width=size[1],
        graph_sha256=bundle.manifest.files[file].sha256,
        openvino_version=identity.openvino_version,
        processor=identity.processor,
        flags_sha256=identity.flags_sha256,
        system=identity.system,
        figures={name: min(1.0, getattr(verdict.figures, name)) for name in GATE_FIGURES},  # a cosine may round above 1
        thresholds={name: getattr(verdict.thresholds, name) for name in GATE_FIGURES},
    )
    return write_cpu_record(bundle.folder, record)


def keep_compiled(bundle: Bundle, precision: str, sizes: Sequence[Size]) -> None:
    """Compile for one image at a time and keep the result in the user's cache, so that the first start is quick."""
    backend = OpenVinoBackend(bundle, precision=precision)
    for size in sizes:
        backend.prepare(size)
    backend.close()


def remove_outdated_records(bundle: Bundle) -> list[str]:
    """Remove records whose graph is no longer the bundle's, and say so; returns their names."""
    misfits = {record.name: cpu_misfit(bundle, record, record.identity) for record in read_cpu_records(bundle)}
    outdated = {name: why for name, why in misfits.items() if why}
    for name, why in outdated.items():
        file = f"{CPU_RECORDS_FOLDER}/{name}.json"
        (bundle.folder / file).unlink(missing_ok=True)
        _log.warning("removed: %s: %s", file, why)
    return list(outdated)
