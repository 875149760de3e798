"""Mapped files whose pages can be given back, and a heap that can be trimmed: measured where the system tells."""

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tclkit.runtime import memory
from tclkit.runtime.memory import MappedFile, trim_heap

MEGABYTE = 1 << 20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is resident, and of what kind")


def resident_mb(kind: str) -> float:
    """Resident memory of this process, "RssAnon" or "RssFile"."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"h" * 4096 + bytes(range(256)) * (64 * MEGABYTE // 256))
    return path


def mapped(path: Path, offset: int = 4096) -> MappedFile:
    with path.open("rb") as stream:
        return MappedFile(stream, offset)


@on_linux
def test_released_pages_are_not_resident_and_are_there_again_when_read(file: Path) -> None:
    one = mapped(file)
    total = int(one.content.sum(dtype=np.int64))
    before = resident_mb("RssFile")
    one.release_pages()
    assert before - resident_mb("RssFile") > 60
    assert int(one.content.sum(dtype=np.int64)) == total
    assert bytes(one.content[:256]) == bytes(range(256))


@on_linux
def test_a_file_that_is_read_once_is_never_resident_as_a_whole(file: Path) -> None:
    one = mapped(file)
    before, most = resident_mb("RssFile"), 0.0
    with one.releasing_pages():
        for part in np.split(one.content, 64):
            part.sum(dtype=np.int64)
            time.sleep(0.005)  # as a library that packs weights does, it takes its time
            most = max(most, resident_mb("RssFile") - before)
        part = one.content[:MEGABYTE].copy()
    assert most < 32
    assert abs(resident_mb("RssFile") - before) < 2
    assert bytes(part[-256:]) == bytes(range(256))


def test_releasing_ends_with_what_it_was_for(file: Path) -> None:
    before, during = threading.active_count(), 0

    def read() -> None:
        nonlocal during
        with mapped(file).releasing_pages():
            during = threading.active_count()
            raise RuntimeError("no model")

    with pytest.raises(RuntimeError, match="no model"):
        read()
    assert (during, threading.active_count()) == (before + 1, before)


def test_content_is_read_only_and_an_array_that_claims_otherwise_is_the_same_memory(file: Path) -> None:
    one = mapped(file)
    with pytest.raises(ValueError, match="read-only"):
        one.content[5] = 77
    insisted_on = one.insisted_on()
    assert insisted_on.flags.writeable
    assert insisted_on.ctypes.data == one.content.ctypes.data
    assert np.array_equal(insisted_on, one.content)


def test_nothing_behind_the_offset_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"h" * 4096)
    with pytest.raises(ValueError, match="nothing lies behind byte 4096"):
        mapped(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        mapped(path)


@on_linux
def test_a_trimmed_heap_is_smaller() -> None:
    blocks = [bytearray(64 * 1024) for _ in range(1024)]  # below the size that the C library maps and unmaps by itself
    kept = [bytearray(b"x" * 1000) for _ in range(10)]
    before = resident_mb("RssAnon")
    del blocks
    trim_heap()
    assert before - resident_mb("RssAnon") > 40
    assert kept[0][:1] == b"x"


def test_a_c_library_without_trim_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    trim_heap()
