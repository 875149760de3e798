"""What a TensorRT version's Python bindings offer, read from tests/tensorrt_api, and classes that hold to it.

A simulated class is written once, for all versions. `bound_class` gives it the members that the imitated version has:
a method that the version lacks is not there, a call with a keyword or a type that its bindings refuse is a TypeError, a
read-only property cannot be set, and an unknown attribute can neither be read nor set. A member that the real class
has and the simulator does not is a NotImplementedError that says so.
"""

import enum
import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

API_FOLDER = Path(__file__).resolve().parents[1] / "tensorrt_api"
VERSIONS = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.4.0.106")

# The api files hold names only. What is listed here has the value of TensorRT's headers, other members are numbered
# in alphabetical order, so nothing may lean on their values.
_VALUES = {
    "DataType": "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4 FP4 E8M0",
    "NetworkDefinitionCreationFlag": (
        "EXPLICIT_BATCH STRONGLY_TYPED PREFER_JIT_PYTHON_PLUGINS PREFER_AOT_PYTHON_PLUGINS"
    ),
    "TensorIOMode": "NONE INPUT OUTPUT",
    "TensorLocation": "DEVICE HOST",
    "DeviceType": "GPU DLA",
    "HardwareCompatibilityLevel": "NONE AMPERE_PLUS SAME_COMPUTE_CAPABILITY",
    "ProfilingVerbosity": "LAYER_NAMES_ONLY NONE DETAILED",
    "ExecutionContextAllocationStrategy": "STATIC ON_PROFILE_CHANGE USER_MANAGED",
    "EngineCapability": "STANDARD SAFETY DLA_STANDALONE",
    "Severity": "INTERNAL_ERROR ERROR WARNING INFO VERBOSE",
}


class PybindEnum(enum.Enum):
    """Base of the enums: as pybind11's, members convert to int but are none."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


@dataclass(frozen=True)
class Parameter:
    """One parameter of a bound method; `name` starts with "arg" and a digit where pybind11 knows none."""

    name: str
    kind: str
    optional: bool

    @property
    def nameless(self) -> bool:
        return re.fullmatch(r"arg\d+", self.name) is not None


def load_api(version: str) -> dict[str, Any]:
    """The api file of one version: "enums", "classes", "functions"."""
    if version not in VERSIONS:
        raise ValueError(f"the simulator imitates TensorRT {', '.join(VERSIONS)}, not {version}")
    return json.loads((API_FOLDER / f"api-{version}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def api_enum(name: str, members: Sequence[str]) -> type[PybindEnum]:
    """An enum with these members."""
    known = _VALUES.get(name, "").split()
    order = [member for member in known if member in members] + [m for m in sorted(members) if m not in known]
    values = {member: known.index(member) if member in known else index for index, member in enumerate(order)}
    return PybindEnum(name, values, module="tensorrt")  # type: ignore[return-value]


def overloads(lines: Sequence[str]) -> list[list[Parameter]]:
    """Parameters (without self) of each overload in a docstring of pybind11."""
    found = []
    for line in lines:
        if "(*args, **kwargs)" in line:
            continue
        inside = re.sub(r"^(\d+\. )?\w+\(", "", line)
        inside = inside[: _closing(inside)]
        pieces = [piece for piece in _split(inside) if piece and not piece.startswith("self:")]
        found.append([_parameter(piece) for piece in pieces])
    return found


def _closing(text: str) -> int:
    depth = 0
    for index, character in enumerate(text):
        if character in "([<":
            depth += 1
        elif character == ")" and depth == 0:
            return index
        elif character in ")]>":
            depth -= 1
    raise ValueError(f"no closing bracket in {text!r}")


def _split(text: str) -> list[str]:
    pieces, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if character in "([<":
            depth += 1
        elif character in ")]>":
            depth -= 1
        elif character == "," and depth == 0:
            pieces.append(text[start:index].strip())
            start = index + 1
    return [*pieces, text[start:].strip()]


def _parameter(piece: str) -> Parameter:
    name, _, rest = piece.partition(":")
    kind, equals, _ = rest.partition(" = ")
    return Parameter(name.strip(), kind.strip(), bool(equals))


def _accepts(module: ModuleType, kind: str, value: Any) -> bool:
    """Whether pybind11 would convert this value for a parameter of this type, as far as it matters here."""
    if kind in ("int", "typing.SupportsInt"):
        return hasattr(value, "__index__") and not isinstance(value, PybindEnum)
    if kind in ("float", "typing.SupportsFloat"):
        return hasattr(value, "__float__")
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str) or value is None
    if kind in ("buffer", "typing_extensions.Buffer"):
        try:
            memoryview(value)
        except TypeError:
            return False
        return True
    if kind in ("tuple", "list"):
        return isinstance(value, tuple if kind == "tuple" else list)
    if kind == "trt.Dims":
        return isinstance(value, module.Dims) or _is_integers(value)
    if kind.startswith(("List[int]", "list[int]", "collections.abc.Sequence[typing.SupportsInt]")):
        return _is_integers(value)
    match = re.fullmatch(r"(?:trt|nvinfer1|nvonnxparser)(?:\.|::)(\w+(?:\.Severity)?)", kind)
    if match is None:
        return True
    expected: Any = module
    for part in match.group(1).split("."):
        expected = vars(expected).get(part)
        if expected is None:  # a class that the simulator has not: nobody can have made one
            return value is None
    return isinstance(value, expected) or (value is None and not issubclass(expected, PybindEnum))


def _is_integers(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(hasattr(item, "__index__") for item in value)


def bind(
    module: ModuleType, parameters: Sequence[Parameter], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]] | None:
    """Match a call with one overload: (positional, by name), or None if the bindings would refuse it."""
    if len(args) > len(parameters):
        return None
    given = {parameter.name: value for parameter, value in zip(parameters, args, strict=False)}
    names = {parameter.name for parameter in parameters if not parameter.nameless}
    if set(kwargs) - names or set(kwargs) & set(given):
        return None
    given |= kwargs
    for parameter in parameters:
        if parameter.name not in given:
            if not parameter.optional:
                return None
        elif not _accepts(module, parameter.kind, given[parameter.name]):
            return None
    nameless = [parameter.name for parameter in parameters if parameter.nameless]
    return [given.pop(name) for name in nameless if name in given], given


def takes(body: Callable[..., Any], positional: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Whether a body, written for all versions, can be called so."""
    try:
        inspect.signature(body).bind(None, *positional, **named)
    except TypeError:
        return False
    return True


def bound_method(module: ModuleType, owner: str, name: str, lines: Sequence[str], body: Callable[..., Any]) -> Any:
    """A method that takes what the bindings of this version take and hands it to `body`."""
    signatures = overloads(lines)

    @functools.wraps(body)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        for parameters in signatures:
            if (call := bind(module, parameters, args, kwargs)) is not None:
                if not takes(body, call[0], call[1]):
                    raise NotImplementedError(f"the simulator does not offer this overload of {owner}.{name}")
                return body(self, *call[0], **call[1])
        types = ", ".join([*(type(a).__name__ for a in args), *(f"{k}={type(v).__name__}" for k, v in kwargs.items())])
        supported = "\n    ".join(line for line in lines if "*args" not in line)
        raise TypeError(
            f"{owner}.{name}(): incompatible function arguments ({types}). The following argument types are supported:"
            f"\n    {supported}"
        )

    del method.__wrapped__  # type: ignore[attr-defined]
    return method


class _Meta(type):
    """Refuses what pybind11 refuses: unknown attributes, and subclasses that forget the base's __init__."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__call__(*args, **kwargs)
        if not instance.__dict__.get("_constructed"):
            raise TypeError(f"{cls.__name__}.__init__() must be called when overriding __init__")
        return instance


class Bound(metaclass=_Meta):
    """Base of every bound class."""

    _api_members: frozenset[str] = frozenset()
    _api_name = ""
    _api_version = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"tensorrt.{self._api_name}: No constructor defined!")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def __setattr__(self, name: str, value: Any) -> None:
        subclassed = "_api_members" not in type(self).__dict__
        if name.startswith("_") or subclassed or isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
        else:
            raise AttributeError(f"'tensorrt.{self._api_name}' object has no attribute {name!r}")

    def __getattr__(self, name: str) -> Any:
        if name in type(self)._api_members:
            raise NotImplementedError(
                f"TensorRT {self._api_version} has {self._api_name}.{name}, but the simulator does not offer it"
            )
        raise AttributeError(f"'tensorrt.{self._api_name}' object has no attribute {name!r}")


def bound_class(module: ModuleType, api: Mapping[str, Any], body: type) -> type:
    """The class `body` with the members that this version has.

    `body` defines methods, properties, `_setup` (what __init__ does) and `_stored` (name -> first value of properties
    that only keep what they are given). It must not use super().
    """
    name = body.__name__
    entry = api["classes"][name]
    properties = {text.removesuffix(" (read-only)"): text.endswith(" (read-only)") for text in entry["properties"]}
    space: dict[str, Any] = {
        key: value
        for key, value in vars(body).items()
        if key.startswith("_") and key not in ("__dict__", "__weakref__")
    }
    for key, value in vars(body).items():
        if key in entry["methods"] and callable(value) and entry["methods"][key]:
            space[key] = bound_method(module, name, key, entry["methods"][key], value)
        elif key in properties and isinstance(value, property):
            setter = None if properties[key] else value.fset or _not_offered(name, key)
            space[key] = property(value.fget, setter, None, value.__doc__)
    for key in getattr(body, "_stored", {}):
        if key in properties:
            space[key] = _stored_property(key, read_only=properties[key])
    for key in ("__getitem__", "__len__"):
        if key in vars(body) and key in entry["methods"]:
            space[key] = bound_method(module, name, key, entry["methods"][key], vars(body)[key])
    if entry["methods"].get("__init__"):
        space["__init__"] = bound_method(module, name, "__init__", entry["methods"]["__init__"], _constructor(body))
    space |= {
        "_api_members": frozenset(properties) | frozenset(entry["methods"]),
        "_api_name": name,
        "_api_version": api["version"],
        "_trt": module,
        "__module__": "tensorrt",
        "__doc__": body.__doc__,
    }
    bases = tuple(getattr(module, base) for base in entry["bases"] if hasattr(module, base)) or (Bound,)
    return _Meta(name, bases, space)


def _not_offered(owner: str, name: str) -> Callable[[Any, Any], None]:
    def fset(self: Any, value: Any) -> None:
        raise NotImplementedError(f"{owner}.{name} can be set in TensorRT, but not in the simulator")

    return fset


def _constructor(body: type) -> Callable[..., None]:
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        self._constructed = True
        self._values = dict(getattr(body, "_stored", {}))
        if hasattr(body, "_setup"):
            body._setup(self, *args, **kwargs)

    return construct


def make(kind: type, *args: Any, **kwargs: Any) -> Any:
    """An instance of a bound class that Python cannot construct, as TensorRT makes them itself."""
    instance = object.__new__(kind)
    instance._constructed = True
    instance._values = dict(getattr(kind, "_stored", {}))
    if hasattr(kind, "_setup"):
        instance._setup(*args, **kwargs)
    return instance


def _stored_property(name: str, *, read_only: bool) -> property:
    def fget(self: Any) -> Any:
        return self._values[name]

    def fset(self: Any, value: Any) -> None:
        self._values[name] = value

    return property(fget, None if read_only else fset)
