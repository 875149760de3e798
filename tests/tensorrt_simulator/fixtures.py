"""What puts a simulator into sys.modules and takes it out again; tests/conftest.py makes a fixture of it."""

import contextlib
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from .simulator import Simulator

_NOTHING: Any = object()


@contextlib.contextmanager
def simulators() -> Iterator[Callable[..., Simulator]]:
    """A function that installs a simulated machine; it takes what `Simulator` takes.

    A second call in the same test replaces the first machine, as if its files were carried to another one. After the
    test the modules are gone, and a fault that no machine of the test should have (`Simulator.faults`) fails it; a test
    that provokes one takes it out: `simulator.faults.clear()`.
    """
    with contextlib.ExitStack() as stack:
        made: list[Simulator] = []

        def install(version: str = "10.3.0", **options: Any) -> Simulator:
            stack.close()
            made.append(Simulator(version, **options))
            stack.enter_context(installed(made[-1]))
            return made[-1]

        yield install
    if faults := [fault for simulator in made for fault in simulator.faults]:
        raise AssertionError(f"what a real device would not have told: {'; '.join(faults)}")


@contextlib.contextmanager
def installed(simulator: Simulator) -> Iterator[None]:
    """Have `import tensorrt` and `cuda.bindings.runtime` give the simulator, and importlib.metadata its version."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        metadata = folder / f"tensorrt-{simulator.version}.dist-info"
        metadata.mkdir()
        text = f"Metadata-Version: 2.1\nName: tensorrt\nVersion: {simulator.version}\n"
        (metadata / "METADATA").write_text(text, encoding="utf-8")
        sys.path.insert(0, str(folder))
        stack.callback(sys.path.remove, str(folder))
        stack.enter_context(_module("tensorrt", simulator.tensorrt))
        for name in ("cuda", "cuda.bindings"):
            if not _importable(name):
                stack.enter_context(_module(name, _package(name)))
        stack.enter_context(_module("cuda.bindings.runtime", simulator.cudart))
        _forget_tensorrt()
        stack.callback(_forget_tensorrt)
        yield


@contextlib.contextmanager
def _module(name: str, module: ModuleType) -> Iterator[None]:
    """In sys.modules and as an attribute of its package: `from package import module` looks there first."""
    before = sys.modules.get(name, _NOTHING)
    package, _, short = name.rpartition(".")
    parent = sys.modules[package] if package else None
    attribute = _NOTHING if parent is None else getattr(parent, short, _NOTHING)
    sys.modules[name] = module
    if parent is not None:
        setattr(parent, short, module)
    try:
        yield
    finally:
        if before is _NOTHING:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        if parent is not None and attribute is _NOTHING:
            delattr(parent, short)
        elif parent is not None:
            setattr(parent, short, attribute)


def _importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def _package(name: str) -> ModuleType:
    package = ModuleType(name)
    package.__path__ = []
    return package


def _forget_tensorrt() -> None:
    """Make Polygraphy, if it is loaded, import tensorrt afresh: it keeps the module and a logger of its own."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "polygraphy" or module is None:
            continue
        for value in list(vars(module).values()):
            kept = vars(value).get("module") if type(value).__name__ == "LazyModule" else None
            if isinstance(kept, ModuleType) and kept.__name__ == "tensorrt":
                object.__setattr__(value, "module", None)
        if name == "polygraphy.backend.trt.util":
            module.TRT_LOGGER = None  # type: ignore[attr-defined]
