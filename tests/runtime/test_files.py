from pathlib import Path

import pytest

from tclkit.runtime.files import atomic_file, atomic_folder, cache_folder, models_folder, sha256_from_file


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


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_from_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_folders_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCLKIT_HOME", str(tmp_path))
    assert (models_folder(), cache_folder()) == (tmp_path / "models", tmp_path / "cache")
    monkeypatch.delenv("TCLKIT_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert models_folder() == tmp_path / "data" / "tclkit" / "models"
    assert cache_folder() == tmp_path / "cache" / "tclkit"
