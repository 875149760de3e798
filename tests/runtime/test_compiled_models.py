"""Compiled models in the user's cache: found by all that makes them, never read when damaged, not without bound."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from tclkit.runtime import compiled_models
from tclkit.runtime.compiled_models import CompiledKey, drop_compiled, load_compiled, store_compiled
from tclkit.runtime.cpu_records import CpuIdentity
from tclkit.runtime.files import cache_folder

HERE = CpuIdentity(openvino_version="2026.4.1-1", processor="EPYC", flags_sha256="a" * 64, system="Linux x86_64")
KEY = CompiledKey(graph_sha256="c" * 64, hint="f32", batch=1, identity=HERE)
CONTENT = bytes(range(256)) * 40


def test_what_is_stored_is_loaded() -> None:
    assert load_compiled(KEY) is None
    store_compiled(KEY, memoryview(CONTENT))
    loaded = load_compiled(KEY)
    assert loaded is not None
    assert bytes(loaded.content) == CONTENT
    assert KEY.path.parent == cache_folder() / "openvino"
    drop_compiled(KEY)
    assert load_compiled(KEY) is None


@pytest.mark.parametrize(
    "change",
    [
        {"graph_sha256": "d" * 64},
        {"hint": "bf16"},
        {"batch": 0},
        {"identity": dataclasses.replace(HERE, openvino_version="2026.4.1-2")},
        {"identity": dataclasses.replace(HERE, flags_sha256="b" * 64)},
    ],
    ids=str,
)
def test_another_key_is_another_entry(change: dict[str, object]) -> None:
    store_compiled(KEY, CONTENT)
    assert load_compiled(dataclasses.replace(KEY, **change)) is None  # type: ignore[arg-type]


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:6000])


def without_content(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4096])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def of_another_key(path: Path) -> None:
    other = dataclasses.replace(KEY, batch=7)
    store_compiled(other, CONTENT)
    path.write_bytes(other.path.read_bytes())


@pytest.mark.parametrize("harm", [flipped, truncated, without_content, empty, of_another_key])
def test_a_damaged_entry_is_announced_and_counts_as_none(harm: object, caplog: pytest.LogCaptureFixture) -> None:
    store_compiled(KEY, CONTENT)
    harm(KEY.path)  # type: ignore[operator]
    assert load_compiled(KEY) is None
    assert "is damaged: the graph is compiled anew" in caplog.text
    store_compiled(KEY, CONTENT)
    assert load_compiled(KEY) is not None


def test_the_least_recently_used_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_models, "LARGEST_CACHE_BYTES", 2 * (4096 + len(CONTENT)))
    first, second, third = (dataclasses.replace(KEY, batch=batch) for batch in (1, 2, 3))
    store_compiled(first, CONTENT)
    store_compiled(second, CONTENT)
    os.utime(first.path, (1, 1))
    os.utime(second.path, (2, 2))
    assert load_compiled(first) is not None  # used: now the youngest
    store_compiled(third, CONTENT)
    assert [key.path.exists() for key in (first, second, third)] == [True, False, True]
    monkeypatch.setattr(compiled_models, "LARGEST_CACHE_BYTES", 1)
    store_compiled(second, CONTENT)
    assert [key.path.exists() for key in (first, second, third)] == [False, True, False]


def test_a_cache_that_cannot_be_written_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    (cache_folder()).mkdir(parents=True)
    (cache_folder() / "openvino").write_text("in the way")
    store_compiled(KEY, np.frombuffer(CONTENT, np.uint8))
    assert "cannot be written" in caplog.text
    assert "compiled at every start" in caplog.text
