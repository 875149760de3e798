"""The text cache saves work, survives damage and is shared by processes."""

import logging
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tclkit.runtime.files import cache_folder
from tclkit.runtime.text_cache import TextCache, cache_key


def vector(seed: int, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


def vectors(seeds: range) -> dict[str, np.ndarray]:
    return {f"key-{seed}": vector(seed) for seed in seeds}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "text.sqlite"


def test_round_trip_is_bit_exact_and_survives_the_process(path: Path) -> None:
    TextCache(path).write(vectors(range(3)))
    found = TextCache(path).read(["key-2", "absent", "key-0"])
    assert set(found) == {"key-0", "key-2"}
    for key, array in found.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, vector(int(key[-1])))
        array[0] = 1.0  # a reader's own copy
    assert TextCache(path).count() == 3


def test_many_keys_in_one_read(path: Path) -> None:
    cache = TextCache(path)
    cache.write(vectors(range(1500)))
    assert len(cache.read([f"key-{seed}" for seed in range(2000)])) == 1500


def test_nothing_is_made_before_the_first_write(path: Path) -> None:
    cache = TextCache(path)
    assert cache.read(["key-1"]) == {}
    assert cache.count() == 0
    cache.write({})
    assert not path.parent.exists()
    assert cache.problem is None


def test_the_default_place() -> None:
    assert TextCache().path == cache_folder() / "text-embeddings.sqlite"


def test_a_later_write_wins(path: Path) -> None:
    cache = TextCache(path)
    cache.write({"key": vector(1)})
    cache.write({"key": vector(2)})
    np.testing.assert_array_equal(cache.read(["key"])["key"], vector(2))
    assert cache.count() == 1


def test_the_oldest_entries_go(path: Path) -> None:
    cache = TextCache(path, max_entries=10)
    for start in range(0, 30, 3):
        cache.write(vectors(range(start, start + 3)))
    assert cache.count() == 10
    assert set(cache.read([f"key-{seed}" for seed in range(30)])) == {f"key-{seed}" for seed in range(20, 30)}


def test_it_is_a_wal_database(path: Path) -> None:
    TextCache(path).write(vectors(range(1)))
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert database.execute("PRAGMA user_version").fetchone() == (1,)
    database.close()


def test_keys_tell_encoders_and_texts_apart() -> None:
    keys = {cache_key("a", ["x"]), cache_key("b", ["x"]), cache_key("a", ["y"]), cache_key("a", ["x", "y"])}
    assert len(keys) == 4
    assert cache_key("a", ["x", "é"]) == cache_key("a", ["x", "é"])


def assert_goes_on_without(cache: TextCache, caplog: pytest.LogCaptureFixture) -> None:
    """One warning that names the file, and no exception however often it is asked."""
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            cache.write(vectors(range(2)))
            assert cache.read(["key-0"]) == {}
            assert cache.count() == 0
    assert cache.problem
    assert len(caplog.records) == 1
    assert str(cache.path) in caplog.text
    assert "Going on without it" in caplog.text


@pytest.mark.parametrize("content", [b"not a database at all, but text " * 40, b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_file_that_is_no_database(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    assert_goes_on_without(TextCache(path), caplog)
    assert path.read_bytes() == content


def test_a_damaged_database(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TextCache(path).write(vectors(range(500)))
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)
    assert_goes_on_without(TextCache(path), caplog)


def test_a_damaged_vector_counts_as_absent(path: Path) -> None:
    cache = TextCache(path)
    cache.write(vectors(range(2)))
    data = path.read_bytes()
    blob = vector(1).tobytes()
    assert data.count(blob) == 1
    path.write_bytes(data.replace(blob, blob[:-1] + bytes([blob[-1] ^ 1])))
    assert set(cache.read(["key-0", "key-1"])) == {"key-0"}
    cache.write(vectors(range(2)))
    assert set(cache.read(["key-0", "key-1"])) == {"key-0", "key-1"}


def test_a_database_of_another_schema(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TextCache(path).write(vectors(range(1)))
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 2")
    database.close()
    assert_goes_on_without(TextCache(path), caplog)
    assert "schema 2" in caplog.text


def test_a_file_in_the_place_of_the_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert_goes_on_without(TextCache(tmp_path / "file" / "text.sqlite"), caplog)


def test_a_folder_in_the_place_of_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert_goes_on_without(TextCache(tmp_path), caplog)


def test_a_full_disk(path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own limit on pages stands in for the disk: it answers with the same error."""
    connect = sqlite3.connect

    def connect_limited(*arguments: object, **options: object) -> sqlite3.Connection:
        database = connect(*arguments, **options)  # type: ignore[call-overload]
        database.execute("PRAGMA max_page_count = 8")
        return database

    monkeypatch.setattr(sqlite3, "connect", connect_limited)
    cache = TextCache(path)
    with caplog.at_level(logging.WARNING):
        cache.write(vectors(range(1000)))
    assert "full" in caplog.text
    monkeypatch.undo()
    assert TextCache(path).count() == 0


# Other processes run as scripts: a test module cannot be imported by name under --import-mode=importlib.
_UNWRITABLE = """
import logging, os, sqlite3, sys
import numpy as np
from tclkit.runtime.text_cache import TextCache
if os.geteuid() == 0:  # no permission stops root
    os.setegid(65534), os.seteuid(65534)
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
cache = TextCache(sys.argv[1])
cache.write({"key": np.ones(4, np.float32)})
print("read", cache.read(["key"]), "problem", cache.problem is not None)
"""

_FILL = """
import sys
import numpy as np
from tclkit.runtime.text_cache import TextCache
cache, first, count = TextCache(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for seed in range(first, first + count):
    vector = np.random.default_rng(seed).standard_normal(16).astype(np.float32)
    cache.write({f"key-{seed}": vector})
    assert f"key-{seed}" in cache.read([f"key-{seed}"])
assert cache.problem is None, cache.problem
"""

_FILL_FOREVER = """
import itertools, sys
import numpy as np
from tclkit.runtime.text_cache import TextCache
cache = TextCache(sys.argv[1])
for start in itertools.count(0, 50):
    cache.write({f"key-{seed}": np.ones(16, np.float32) for seed in range(start, start + 50)})
    print("written", flush=True)
"""


def started(script: str, *arguments: object) -> "subprocess.Popen[str]":
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], text=True, **pipes)  # type: ignore[call-overload,no-any-return]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    output, errors = started(_UNWRITABLE, folder / "text.sqlite").communicate(timeout=60)
    assert errors == ""
    assert "cannot be used" in output
    assert "read {} problem True" in output


@pytest.mark.parametrize("attempt", range(3))
def test_processes_that_fill_one_new_cache_at_once(path: Path, attempt: int) -> None:
    workers = [started(_FILL, path, first, 25) for first in (0, 20, 30)]  # some keys are written by two of them
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    assert not path.exists()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    results = [(worker.communicate(timeout=60)[1], worker.returncode) for worker in workers]
    assert results == [("", 0)] * 3
    found = TextCache(path).read([f"key-{seed}" for seed in range(55)])
    assert len(found) == 55
    for key, array in found.items():
        np.testing.assert_array_equal(array, vector(int(key.removeprefix("key-"))))


def test_a_process_killed_in_the_middle_of_writing(path: Path) -> None:
    worker = started(_FILL_FOREVER, path)
    assert worker.stdout is not None
    for _ in range(5):
        assert worker.stdout.readline() == "written\n"
    worker.kill()
    worker.communicate(timeout=60)
    cache = TextCache(path)
    count = cache.count()
    assert count >= 250
    assert count % 50 == 0  # a write is there whole or not at all
    cache.write({"after": vector(1)})
    assert cache.count() == count + 1
    assert cache.problem is None
