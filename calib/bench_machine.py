"""The machine a benchmark ran on: what it is, and whether it had anything else to do."""

import importlib.metadata
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tclkit.runtime.processor import usable_cpus

_PACKAGES = ("tclkit", "numpy", "onnxruntime", "openvino", "tensorrt", "torch", "opencv-python-headless")
_BUSY_BEFORE = 0.5  # processes that wanted to run, on average of the last minute
_KIBIBYTES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a benchmark ran on.

    processor: its model name.
    usable_cpus: how many this process may use; logical ones, so two may share a core.
    system: name, release and architecture.
    python: version.
    packages: version by name, of those installed.
    load_before, load_after: processes that wanted to run, mean over a minute; None where the system does not say.
    """

    processor: str
    usable_cpus: int
    system: str
    python: str
    packages: dict[str, str]
    load_before: float | None
    load_after: float | None

    def warnings(self) -> tuple[str, ...]:
        """What speaks against the figures: other work on the machine."""
        found = []
        if self.load_before is not None and self.load_before > _BUSY_BEFORE:
            found.append(
                f"the machine was not quiet: a load of {self.load_before:.1f} before the first run. Trust ratios "
                "between rows of this run only; end what else is running and run again"
            )
        if self.load_after is not None and self.load_after > self.usable_cpus + 1:
            found.append(
                f"the machine was not quiet: a load of {self.load_after:.1f} on {self.usable_cpus} CPUs at the end"
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def describe_machine(*, load_before: float | None) -> Machine:
    """Describe this machine once the work is done; `load_before` is `current_load` from before it."""
    return Machine(
        processor=_processor(),
        usable_cpus=usable_cpus(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES if (version := _version(name)) is not None},
        load_before=load_before,
        load_after=current_load(),
    )


def current_load() -> float | None:
    """Processes that wanted to run, mean over the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def peak_memory_bytes() -> int | None:
    """Most memory this process ever held at once (resident); None where the system does not say.

    On Linux it is VmHWM: getrusage's figure starts, after a fork and exec, from what the parent held.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * _KIBIBYTES
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * _KIBIBYTES)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):  # boards with ARM say Model
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
