"""How the simulator writes engines and timing caches: a header that says for what they are, the contents, a digest.

A real engine file carries no digest, and TensorRT promises nothing about one with flipped bits. The simulator refuses
such a file, as TensorRT does in the good case; code under test should have compared the file's hash before.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

_ENGINE_MAGIC = b"SIMPLAN\0"
_CACHE_MAGIC = b"SIMCACH\0"
_LENGTH_BYTES = 8


class FormatError(Exception):
    """The bytes are no engine, or no timing cache, of the simulator."""


@dataclass(frozen=True, kw_only=True)
class EngineHeader:
    """What an engine was built for.

    version: TensorRT's.
    compute_capability, device_name: of the device that built it.
    hardware_level: name of the HardwareCompatibilityLevel.
    version_compatible: whether later versions may run it.
    strongly_typed, tf32, dla, workspace_bytes: how it was built.
    profile: input -> [min, opt, max].
    """

    version: str
    compute_capability: tuple[int, int]
    device_name: str
    hardware_level: str
    version_compatible: bool
    strongly_typed: bool
    tf32: bool
    dla: bool
    workspace_bytes: int
    profile: dict[str, list[list[int]]]


@dataclass(kw_only=True)
class CacheContents:
    """A timing cache: whose it is, and the layers it has timings for."""

    version: str
    compute_capability: tuple[int, int]
    device_name: str
    keys: set[str] = field(default_factory=set)


def engine_to_bytes(header: EngineHeader, onnx_bytes: bytes) -> bytes:
    return _pack(_ENGINE_MAGIC, asdict(header), onnx_bytes)


def engine_from_bytes(data: bytes) -> tuple[EngineHeader, bytes]:
    """Header and graph.

    Raises:
        FormatError: not an engine, cut short or changed.
    """
    raw, contents = _unpack(_ENGINE_MAGIC, data)
    raw["compute_capability"] = tuple(raw["compute_capability"])
    return EngineHeader(**raw), contents


def cache_to_bytes(cache: CacheContents) -> bytes:
    return _pack(_CACHE_MAGIC, asdict(cache) | {"keys": sorted(cache.keys)}, b"")


def cache_from_bytes(data: bytes) -> CacheContents:
    """A timing cache.

    Raises:
        FormatError: not a timing cache, cut short or changed.
    """
    raw, _ = _unpack(_CACHE_MAGIC, data)
    return CacheContents(
        version=raw["version"],
        compute_capability=tuple(raw["compute_capability"]),
        device_name=raw["device_name"],
        keys=set(raw["keys"]),
    )


def _pack(magic: bytes, header: dict[str, Any], contents: bytes) -> bytes:
    text = json.dumps(header, sort_keys=True).encode()
    body = magic + len(text).to_bytes(_LENGTH_BYTES, "little") + text + contents
    return body + hashlib.sha256(body).digest()


def _unpack(magic: bytes, data: bytes) -> tuple[dict[str, Any], bytes]:
    if not data.startswith(magic):
        raise FormatError("magicTag == kMAGIC_TAG")
    body, digest = data[:-32], data[-32:]
    if hashlib.sha256(body).digest() != digest:
        raise FormatError("plan is cut short or damaged")
    start = len(magic) + _LENGTH_BYTES
    end = start + int.from_bytes(body[len(magic) : start], "little")
    return json.loads(body[start:end]), body[end:]
