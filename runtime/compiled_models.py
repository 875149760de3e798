"""What OpenVINO compiled, kept in the user's cache so that the next start is quick.

OpenVINO's compiled model is its own transformed graph with the weights, read by native code. So nobody's but this
user's is ever read: entries lie in the cache folder of the user that compiled them, never in a bundle, which travels.
An entry is found by all that makes it: the graph's SHA-256, the precision, the batch, OpenVINO's version, the processor
and its instruction sets. Its own SHA-256 is compared before OpenVINO sees a byte; one that is damaged is announced and
compiled anew. Beyond `LARGEST_CACHE_BYTES` the entries used least recently go.

Measured on two cores (read and compile against map, hash and import): ViT-B/16 1.2 s against 0.45 s in float32, 0.7 s
against 0.35 s in INT8; tcl-shapes 0.23 s against 0.08 s. OpenVINO's CACHE_DIR is as quick and checks no hash.
"""

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .cpu_records import CpuIdentity
from .files import atomic_file, cache_folder, keep_within, sha256_from_stream
from .memory import MappedFile

LARGEST_CACHE_BYTES = 4 << 30
_FORMAT = 2  # of what is compiled and how: entries of other formats are never found
_HEADER_BYTES = 4096  # a page, so that what follows is aligned when it is mapped
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledKey:
    """All that makes a compiled model.

    graph_sha256: of the ONNX file.
    hint: type that OpenVINO computes floats in, "f32" or "bf16".
    batch: images the model takes, 0 for any number.
    identity: the processor and OpenVINO.
    """

    graph_sha256: str
    hint: str
    batch: int
    identity: CpuIdentity

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the key."""
        return hashlib.sha256(json.dumps([_FORMAT, asdict(self)], sort_keys=True).encode()).hexdigest()

    @property
    def path(self) -> Path:
        """Where the entry lies, or would."""
        name = f"{self.graph_sha256[:12]}-{self.hint}-b{self.batch}-{self.digest[:16]}.blob"
        return cache_folder() / "openvino" / name


def load_compiled(key: CompiledKey) -> MappedFile | None:
    """A compiled model's bytes, mapped from the cache and compared with their hash; None where there are none.

    A damaged entry is announced as a warning, and counts as none. To be kept for as long as a model that was imported
    from it.
    """
    path = key.path
    try:
        with path.open("rb") as stream:
            header = json.loads(stream.read(_HEADER_BYTES))
            found = sha256_from_stream(stream)  # read, not mapped: what is looked at once needs no place in memory
            mapped = MappedFile(stream, _HEADER_BYTES)
        fits = header == _header(key, found, mapped.content.nbytes)
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("%s cannot be read (%s): the graph is compiled anew", path, error.strerror or error)
        return None
    except ValueError:  # no JSON, no text, or nothing behind the header
        fits = False
    if not fits:
        _log.warning("%s is damaged: the graph is compiled anew", path)
        return None
    with contextlib.suppress(OSError):  # a cache that may be read only is one all the same
        os.utime(path)
    return mapped


def store_compiled(key: CompiledKey, content: Any) -> None:
    """Keep a compiled model; where it cannot be written, that is announced and nothing else happens.

    Args:
        key: all that makes it.
        content: its bytes, a buffer.
    """
    digest, size = hashlib.sha256(content).hexdigest(), memoryview(content).nbytes
    header = json.dumps(_header(key, digest, size)).encode().ljust(_HEADER_BYTES)
    try:
        with atomic_file(key.path) as temporary, temporary.open("wb") as stream:
            stream.write(header)
            stream.write(content)
        keep_within(key.path.parent, "*.blob", LARGEST_CACHE_BYTES, newest=key.path)
    except OSError as error:
        reason = error.strerror or error
        _log.warning("%s cannot be written (%s): the graph is compiled at every start", key.path, reason)


def drop_compiled(key: CompiledKey) -> None:
    """Remove an entry, if it is there and can be removed."""
    with contextlib.suppress(OSError):
        key.path.unlink(missing_ok=True)


def _header(key: CompiledKey, sha256: str, size_bytes: int) -> dict[str, Any]:
    return {"key": key.digest, "sha256": sha256, "size_bytes": size_bytes}
