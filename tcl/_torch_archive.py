"""Read the zip archives that torch writes without running any code that they contain.

A pickle names functions to call and classes to build. Here every name is looked up in a short table of our own
functions; a name that is not in it becomes an inert stand-in that keeps what it was given and does nothing. So a
TorchScript archive (whose modules are classes of their own) and the authors' training checkpoint (OmegaConf config,
numpy scalars) both give up their tensors, and a hostile file gives up nothing.
"""

import collections
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from tclkit.runtime.errors import CheckpointError

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

_MOST_VALUES, _DEEPEST = 100_000, 100

_NUMPY_SCALARS = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "u1": "B", "b1": "?"}


# What reading a damaged or hostile archive may raise.
DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Inert:
    """Stands for an object whose class is not on the allow-list: keeps what the pickle gave it, does nothing."""

    name = "?"

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        """Accept any arguments, as a pickle may pass any."""
        self = super().__new__(cls)
        self.args, self.state, self.items = args, None, []
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple[Any, ...]
        self.state: Any
        self.items: list[Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        """Take a list item, as pickle's APPENDS does."""
        self.items.append(value)

    def extend(self, values: Sequence[Any]) -> None:
        """Take several list items, as pickle's APPENDS does."""
        self.items.extend(values)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<inert {self.name}>"


def _inert_class(name: str) -> type[Inert]:
    return type("Inert", (Inert,), {"name": name})


def _tensor(storage: Any, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any) -> torch.Tensor:
    if not isinstance(storage, torch.Tensor):
        raise pickle.UnpicklingError("a tensor without a storage")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    count = math.prod(size)  # a stride of 0 could claim more numbers than there are
    if min([offset, *size, *stride]) < 0 or count > storage.numel() or (count and last >= storage.numel()):
        raise pickle.UnpicklingError(f"a tensor of size {tuple(size)} reaches outside its storage")
    return torch.as_strided(storage, tuple(size), tuple(stride), offset)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _numpy_scalar(dtype: Any, data: Any = None) -> Any:
    code = _NUMPY_SCALARS.get(dtype.args[0]) if isinstance(dtype, Inert) and dtype.args else None
    if code is None or not isinstance(data, bytes) or len(data) != struct.calcsize(f"<{code}"):
        return _inert_class("numpy scalar")(dtype, data)
    return struct.unpack(f"<{code}", data)[0]


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    return str(text).encode("latin1")  # how protocol 2 spells bytes; no other codec is ever asked for


def _plain_list(*args: Any) -> list[Any]:
    return list(args[0]) if args and isinstance(args[0], (list, tuple)) else []


def _plain_dict(*args: Any) -> dict[Any, Any]:
    return {}


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): _plain_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("_codecs", "encode"): _encode,
}
_ALLOWED.update(
    {("torch.jit._pickle", f"build_{kind}list"): _plain_list for kind in ("int", "double", "bool", "tensor")}
)


class _Unpickler(pickle._Unpickler):  # in Python: the one in C gives memory to any memo index a file names
    stack: list[Any]

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        pickled = archive.getinfo(f"{root}/data.pkl")
        if pickled.compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile(f"{pickled.filename} is compressed")
        super().__init__(archive.open(pickled), encoding="utf-8")
        self._archive = archive
        self._root = root
        self._storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return _ALLOWED.get((module, name)) or _inert_class(f"{module}.{name}")

    def _load_build(self) -> None:
        """BUILD gives an object its state: here only stand-ins take one, which would else change our own functions."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].__setstate__(state)
        elif not isinstance(self.stack[-1], (dict, torch.Tensor)):  # what torch adds to those is nothing to us
            raise pickle.UnpicklingError(f"a state for {self.stack[-1]!r:.80}")

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _load_build}

    def persistent_load(self, pid: Any) -> torch.Tensor:
        kind, dtype, key, _device, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown kind of storage {dtype!r}")
        if key not in self._storages:
            info = self._archive.getinfo(f"{self._root}/data/{key}")
            size_bytes = count * dtype.itemsize
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != size_bytes:
                raise pickle.UnpicklingError(f"storage {key} has {info.file_size} bytes, expected {size_bytes}")
            data = bytearray(self._archive.read(info))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]


def archive_root(path: str | Path) -> str | None:
    """Name of the folder inside torch's zip archive that holds data.pkl; None when `path` is no such archive."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        roots = [
            name[: -len("/data.pkl")]
            for name in archive.namelist()
            if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
    return roots[0] if len(roots) == 1 else None


def is_torchscript(path: str | Path) -> bool:
    """Whether `path` is a TorchScript archive, as OpenAI ships CLIP (it carries code; we read its tensors only)."""
    root = archive_root(path)
    if root is None:
        return False
    with zipfile.ZipFile(path) as archive:
        return f"{root}/constants.pkl" in archive.namelist()


def require_whole(path: str | Path) -> None:
    """Compare every record of what torch.save wrote with its checksum, as torch.load does not.

    A flipped bit would pass for a weight, and a compressed record may unpack to more than there is memory: torch.save
    compresses none.

    Raises:
        zipfile.BadZipFile, or others of `DAMAGE`: a record is broken or compressed, or two share their bytes.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        compressed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
        if compressed:
            raise zipfile.BadZipFile(f"{compressed[0]} is compressed")
        if sum(record.file_size for record in records) > Path(path).stat().st_size:
            raise zipfile.BadZipFile("its records overlap")
        broken = archive.testzip()
    if broken is not None:
        raise zipfile.BadZipFile(f"checksum of {broken}")


def read_archive(path: str | Path) -> Any:
    """Read what torch.save or torch.jit.save wrote, with `Inert` in place of every object that is not plain data.

    Raises:
        CheckpointError: not torch's zip archive, or damaged.
    """
    root = archive_root(path)
    if root is None:
        raise CheckpointError(
            f"{path} is not a file written by torch.save (torch 1.6 or later); fetch it again.", path=str(path)
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _Unpickler(archive, root).load()
    except DAMAGE as error:
        raise CheckpointError(f"{path} is damaged ({error}); fetch it again.", path=str(path)) from error


def state_dict_from_modules(module: Any) -> dict[str, torch.Tensor]:
    """Names and tensors of a TorchScript module tree, as `read_archive` gives it: {"visual.proj": tensor, ...}.

    Raises:
        CheckpointError: modules hold themselves, or each other many times over.
    """
    tensors: dict[str, torch.Tensor] = {}
    visits = _Visits()

    def collect(module: Inert, prefix: str, depth: int) -> None:
        visits.count(depth)
        for name, value in module.state.items() if isinstance(module.state, dict) else ():
            if isinstance(name, str) and isinstance(value, torch.Tensor):
                tensors[prefix + name] = value
            elif isinstance(name, str) and isinstance(value, Inert):
                collect(value, f"{prefix}{name}.", depth + 1)

    if isinstance(module, Inert):
        collect(module, "", 0)
    return tensors


def plain_from_inert(value: Any) -> Any:
    """Turn a tree of OmegaConf stand-ins into dicts, lists and plain values; other stand-ins become their names.

    Raises:
        CheckpointError: values hold themselves, or each other many times over; or a container is a key.
    """
    visits = _Visits()

    def plain(value: Any, depth: int) -> Any:
        visits.count(depth)
        if isinstance(value, Inert):
            state = value.state if isinstance(value.state, dict) else {}
            inner = state.get("_content", state.get("_val", repr(value)))  # a container of OmegaConf, or a leaf
            return plain(inner, depth + 1)
        if isinstance(value, dict):
            return {key_of(key, depth): plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item, depth + 1) for item in value]
        return value

    def key_of(key: Any, depth: int) -> Any:
        found = plain(key, depth + 1)
        if isinstance(found, (dict, list)):
            raise CheckpointError("this file has a container for the name of a value; it is damaged.")
        return found

    return plain(value, 0)


class _Visits:
    """Bounds a walk over values that a file may have tied to themselves, or to each other many times over."""

    def __init__(self) -> None:
        self._left = _MOST_VALUES

    def count(self, depth: int) -> None:
        self._left -= 1
        if self._left < 0 or depth > _DEEPEST:
            raise CheckpointError(
                f"this file holds values more than {_DEEPEST} deep, or more than {_MOST_VALUES:,} of them, as no "
                "config or model does; it is damaged, or made to do harm."
            )
