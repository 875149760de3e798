import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tclkit.runtime.errors import InputError
from tclkit.runtime.files import atomic_file, atomic_folder, cache_folder, keep_within, models_folder, sha256_from_file


def _listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _fail_half_way(path: Path) -> None:
    path.write_text("half")
    raise ZeroDivisionError


def test_a_file_appears_whole(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert (tmp_path / "new" / "a.txt").read_text() == "new"
    assert _listing(tmp_path / "new") == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a.txt") as temporary:
        _fail_half_way(temporary)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert _listing(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_appears_whole(tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "bundle"
    if existing:
        target.mkdir()
        (target / "old.txt").write_text("old")
    with atomic_folder(target) as temporary:
        (temporary / "new.txt").write_text("new")
    assert _listing(target) == ["new.txt"]
    assert _listing(tmp_path) == ["bundle"]


def test_a_failed_folder_leaves_the_old_one_alone(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as temporary:
        _fail_half_way(temporary / "new.txt")
    assert _listing(target) == ["old.txt"]
    assert _listing(tmp_path) == ["bundle"]


def test_a_folder_left_aside_by_a_kill_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames: the old folder is aside, its successor not yet in place."""
    aside = tmp_path / ".bundle.old"
    aside.mkdir()
    (aside / "old.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "bundle"):
        raise ZeroDivisionError
    assert _listing(tmp_path / "bundle") == ["old.txt"]
    assert _listing(tmp_path) == ["bundle"]


@pytest.mark.parametrize("existing", [False, True])
def test_all_of_a_folder_is_flushed_before_it_takes_its_place(
    tmp_path: Path, existing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "bundle"
    if existing:
        target.mkdir()
    flushed: list[tuple[int, bool]] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        is_in_place = target.is_dir() and _listing(target) != []
        flushed.append((os.fstat(handle).st_ino, is_in_place))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_folder(target) as temporary:
        (temporary / "engines").mkdir()
        (temporary / "new.txt").write_text("new")
        (temporary / "engines" / "a.engine").write_bytes(b"a")
        (temporary / "dead").symlink_to("nowhere")
        os.mkfifo(temporary / "pipe")
        written = {p.lstat().st_ino for p in (temporary, *temporary.rglob("*")) if p.is_dir() or p.is_file()}
    assert {inode for inode, is_in_place in flushed if not is_in_place} == written
    assert [inode for inode, is_in_place in flushed if is_in_place] == [tmp_path.stat().st_ino]
    assert _listing(target) == ["dead", "engines", "new.txt", "pipe"]


def test_a_replaced_folder_that_cannot_be_removed_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    real = shutil.rmtree

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path.name == ".bundle.old" and not ignore_errors:
            raise PermissionError(13, "Permission denied")
        real(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with atomic_folder(target) as temporary:
        (temporary / "new.txt").write_text("new")
    assert _listing(target) == ["new.txt"]
    assert f"{tmp_path / '.bundle.old'} cannot be removed: Permission denied" in caplog.text


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_from_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_home_that_is_no_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TCLKIT_HOME", str(tmp_path / "file"))
    for folder in (models_folder, cache_folder):
        with pytest.raises(InputError, match=r"TCLKIT_HOME is .*file, which is no folder\. Name a folder, or unset it"):
            folder()
    monkeypatch.setenv("TCLKIT_HOME", str(tmp_path / "none yet"))
    assert models_folder() == tmp_path / "none yet" / "models"


def test_folders_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCLKIT_HOME", str(tmp_path))
    assert (models_folder(), cache_folder()) == (tmp_path / "models", tmp_path / "cache")
    monkeypatch.delenv("TCLKIT_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert models_folder() == tmp_path / "data" / "tclkit" / "models"
    assert cache_folder() == tmp_path / "cache" / "tclkit"


def test_a_cache_is_kept_within_its_size(tmp_path: Path) -> None:
    entries = [tmp_path / f"{number}.blob" for number in range(4)]
    for number, entry in enumerate(entries):
        entry.write_bytes(b"x" * 100)
        os.utime(entry, (number, number))
    (tmp_path / "other").write_bytes(b"x" * 1000)
    keep_within(tmp_path, "*.blob", 250, newest=entries[0])
    assert _listing(tmp_path) == ["0.blob", "3.blob", "other"]
    keep_within(tmp_path, "*.blob", 1, newest=entries[0])  # larger than all that may be kept: alone
    assert _listing(tmp_path) == ["0.blob", "other"]
    entries[0].unlink()
    keep_within(tmp_path, "*.blob", 1, newest=entries[0])  # another process was quicker
    assert _listing(tmp_path) == ["other"]


def test_a_cache_loses_what_killed_processes_left(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from tclkit.runtime.files import atomic_file, atomic_folder, cache_folder, keep_within, models_folder, sha256_from_file
with atomic_file(sys.argv[1]) as temporary:
    temporary.write_bytes(b"x" * 100)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.blob")], check=False)
    old, young = sorted(tmp_path.glob(".a.blob.*.tmp"))
    os.utime(old, (1, 1))
    newest = tmp_path / "b.blob"
    newest.write_bytes(b"x")
    keep_within(tmp_path, "*.blob", 1000, newest=newest)
    assert _listing(tmp_path) == [young.name, "b.blob"]  # somebody may be writing it


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_errors_name_the_target_not_the_temporary(tmp_path: Path, atomic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", refuse)
    if atomic is atomic_folder:
        monkeypatch.setattr(Path, "mkdir", lambda path, **how: None if how else refuse(path))
    with pytest.raises(PermissionError) as caught, atomic(tmp_path / "target") as temporary:
        temporary.write_text("new")
    assert caught.value.filename == str(tmp_path / "target")
