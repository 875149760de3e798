"""Whether an ONNX file keeps weights in other files, found without onnx: a bundle's hashes say nothing of those.

The file is a protocol buffer. Only the headers of its fields are read; weights are passed over.

Source: onnx/onnx.proto3 (field numbers), and protobuf's encoding (protobuf.dev/programming-guides/encoding).
"""

import mmap
from pathlib import Path

# Message -> field -> message in it, as far as a tensor can lie in one.
_MESSAGES = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of a tensor
_VARINT, _EIGHT_BYTES, _SIZED, _FOUR_BYTES = 0, 1, 2, 5
_GROUPS = (3, 4)  # begin and end of one; nothing of ONNX, but parsers pass over them, so what is in them is looked at


def has_external_weights(path: str | Path) -> bool:
    """Whether a tensor of an ONNX file says that its values lie in another file.

    What is no ONNX file is left to the runtimes to refuse: the answer is False then.

    Raises:
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as stream:
        try:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file
            return False
        with content:
            try:
                return _has_external(content)
            except (IndexError, ValueError):  # it ends within a field, or there is no such kind of field
                return False


def _has_external(content: mmap.mmap) -> bool:
    waiting = [("model", 0, len(content))]
    while waiting:
        message, position, end = waiting.pop()
        while position < end:
            key, position = _number(content, position)
            field, kind = key >> 3, key & 7
            value, start = 0, position
            if kind == _VARINT:
                value, position = _number(content, position)
            elif kind == _SIZED:
                size, start = _number(content, position)
                position = start + size
            elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
                position += 8 if kind == _EIGHT_BYTES else 4
            elif kind not in _GROUPS:
                raise ValueError(f"a field of kind {kind}")
            if message == "tensor" and (field == _EXTERNAL_DATA or (field == _DATA_LOCATION and value)):
                return True
            inner = _MESSAGES[message].get(field)
            if inner is not None and kind == _SIZED:
                waiting.append((inner, start, min(position, end)))
    return False


def _number(content: mmap.mmap, position: int) -> tuple[int, int]:
    """A variable-length whole number, and where it ends."""
    value, shift = 0, 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
