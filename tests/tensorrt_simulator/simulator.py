"""One simulated machine: a device, the `tensorrt` module of one version, and the stand-in for cuda.bindings.runtime."""

import importlib.machinery
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .api import api_enum, bound_class, load_api
from .cuda_runtime import Device, cuda_runtime_module
from .engine_format import CacheContents, EngineHeader
from .tensorrt_classes import CLASSES, IHostMemory, version_numbers

_SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
_DLA_CORES = {(7, 2): 2, (8, 7): 2}  # Xavier, Orin; Thor has none
_INTEGRATED = {(7, 2), (8, 7), (11, 0)}


class Simulator:
    """A simulated machine with TensorRT.

    Args:
        version: one of VERSIONS.
        compute_capability: of the device, as (8, 7) for Orin and (11, 0) for Thor.
        device_name: as the driver tells it.
        dla_cores: None takes what a Jetson of this compute capability has.
        memory_bytes: device memory.
        device_count: how many of these devices there are.

    Attributes:
        tensorrt, cudart: the modules.
        device: the device, with `faults` (what a real one would not have told, such as use after free or one
            execution context enqueued twice at once) and `calls` (how often something was called).
        log: (severity, message) of everything TensorRT said, whatever the logger made of it.
        builds: one entry a build, with the number of layers and of those that had to be timed.
        planted_build_error: the next builds fail with this message while it is set.
        planted_build_warnings: said during every build.
        before_step: called with the number of each step of a build.
    """

    def __init__(
        self,
        version: str = "10.3.0",
        *,
        compute_capability: tuple[int, int] = (8, 7),
        device_name: str = "Orin",
        dla_cores: int | None = None,
        memory_bytes: int = 8 << 30,
        device_count: int = 1,
    ) -> None:
        self.version = version
        self.major = version_numbers(version)[0]
        self.device = Device(
            name=device_name,
            compute_capability=compute_capability,
            memory_bytes=memory_bytes,
            count=device_count,
            integrated=compute_capability in _INTEGRATED,
            dla_cores=_DLA_CORES.get(compute_capability, 0) if dla_cores is None else dla_cores,
            cuda_version=12060 if version.startswith("10.3.") else 13000,
        )
        self.log: list[tuple[str, str]] = []
        self.builds: list[dict[str, int]] = []
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self.planted_build_error: str | None = None
        self.planted_build_warnings: list[str] = []
        self.before_step: Callable[[int], None] = lambda index: None
        self.api = load_api(version)
        self.tensorrt = self._tensorrt_module()
        self.cudart = cuda_runtime_module(self.device)

    def leaks(self) -> list[str]:
        """What is still allocated: memory, streams, events, graphs and execution contexts, one line each."""
        return self.device.leaks()

    @property
    def faults(self) -> list[str]:
        """See `device.faults`."""
        return self.device.faults

    def errors(self) -> list[str]:
        """Messages that TensorRT logged as errors."""
        return [message for severity, message in self.log if severity in ("ERROR", "INTERNAL_ERROR")]

    # for the simulated classes

    def say(self, logger: Any, severity: str, message: str) -> None:
        """Log as TensorRT: through the logger it was given."""
        if type(logger) is not self.tensorrt.Logger:
            self.log.append((severity, message))
        logger.log(getattr(self.tensorrt.ILogger.Severity, severity), message)

    def host_memory(self, data: bytes) -> Any:
        return self.tensorrt.IHostMemory._make(data)

    def own_cache(self) -> CacheContents:
        device = self.device
        return CacheContents(
            version=self.version, compute_capability=device.compute_capability, device_name=device.name
        )

    def owns_cache(self, cache: CacheContents) -> bool:
        """Whether a timing cache was made by this version on this kind of device."""
        own = self.own_cache()
        return (cache.version, cache.compute_capability, cache.device_name) == (
            own.version,
            own.compute_capability,
            own.device_name,
        )

    def engine_problem(self, header: EngineHeader, *, host_code_allowed: bool) -> str | None:
        """Why an engine does not run here, or None.

        A version-compatible engine runs on its own and on later versions, of the next major version too, if the
        runtime may load the code it carries. A hardware-compatible one runs on Ampere and later.
        """
        if header.version != self.version:
            later = version_numbers(header.version) < version_numbers(self.version)
            if not header.version_compatible or not later:
                numbers = f"Current Version: {self.version}, Serialized Engine Version: {header.version}"
                return f"Error Code 1: Serialization (Version tag does not match. {numbers})"
        if header.version_compatible and not host_code_allowed:
            return "Error Code 4: API Usage Error (the engine carries host code, and engine_host_code_allowed is False)"
        built_for, here = header.compute_capability, self.device.compute_capability
        ampere_plus = header.hardware_level == "AMPERE_PLUS" and here >= (8, 0)
        if built_for != here and not ampere_plus:
            wanted, found = (".".join(map(str, pair)) for pair in (here, built_for))
            text = f"the engine is generated on an incompatible device, expecting compute {wanted} got compute {found}"
            return f"Error Code 6: API Usage Error ({text}, please rebuild)"
        return None

    def _tensorrt_module(self) -> ModuleType:
        module = ModuleType("tensorrt", f"The simulator of TensorRT {self.version}.")
        module.__version__ = self.version  # type: ignore[attr-defined]
        module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
        module.__path__ = []
        for name, members in self.api["enums"].items():
            setattr(module, name, api_enum(name, members))
        severity = api_enum("Severity", _SEVERITIES)
        for body in CLASSES:
            kind = bound_class(module, self.api, body)
            kind._sim = self  # type: ignore[attr-defined]
            setattr(module, body.__name__, kind)
            if body.__name__ == "ILogger":
                kind.Severity = severity  # type: ignore[attr-defined]
                for member in severity:
                    setattr(kind, member.name, member)  # exported into the class, as by pybind11
        module.IHostMemory = _host_memory_class(module, self)  # type: ignore[attr-defined]
        module.init_libnvinfer_plugins = lambda logger, namespace: True  # type: ignore[attr-defined]
        module.volume = _volume  # type: ignore[attr-defined]
        module.nptype = _nptype  # type: ignore[attr-defined]

        def missing(name: str) -> Any:
            if name in self.api["classes"] or name in self.api["functions"]:
                raise NotImplementedError(f"TensorRT {self.version} has {name}, but the simulator does not offer it")
            raise AttributeError(f"module 'tensorrt' has no attribute {name!r}")

        module.__getattr__ = missing  # type: ignore[method-assign]
        return module


def _volume(iterable: Any) -> int:
    """As tensorrt.volume: the product of sizes."""
    product = 1
    for size in iterable:
        product *= size
    return product


def _nptype(trt_type: Any) -> Any:
    """As tensorrt.nptype: numpy's type for a DataType; TypeError where numpy has none."""
    from .tensorrt_classes import _NUMPY_TYPES

    if trt_type.name not in _NUMPY_TYPES:
        raise TypeError(f"Could not resolve TensorRT datatype to an equivalent numpy datatype: {trt_type}")
    return _NUMPY_TYPES[trt_type.name]


def _host_memory_class(module: ModuleType, sim: Simulator) -> type:
    """IHostMemory cannot be a `Bound`: the buffer protocol comes from bytes only, before Python 3.12."""
    shown = frozenset({"nbytes", "dtype"})

    def refuse(self: Any, *args: Any) -> Any:
        raise TypeError("IHostMemory has the buffer protocol only: take bytes(...) or memoryview(...) of it")

    def getattribute(self: Any, name: str) -> Any:
        if not name.startswith("_") and name not in shown:
            raise AttributeError(f"'tensorrt.IHostMemory' object has no attribute {name!r}")
        return bytes.__getattribute__(self, name)

    def construct(cls: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("tensorrt.IHostMemory: No constructor defined!")

    space: dict[str, Any] = {
        **{name: vars(IHostMemory)[name] for name in shown},
        **dict.fromkeys(("__len__", "__getitem__", "__iter__", "__contains__", "__add__", "__mul__"), refuse),
        "__bool__": lambda self: True,
        "__eq__": object.__eq__,
        "__hash__": object.__hash__,
        "__repr__": object.__repr__,
        "__getattribute__": getattribute,
        "__new__": construct,
        "__enter__": lambda self: self,
        "__exit__": lambda self, *args: None,
        "_make": classmethod(bytes.__new__),
        "_trt": module,
        "_sim": sim,
        "__module__": "tensorrt",
    }
    return type("IHostMemory", (bytes,), space)
