"""Which images IMAGE means."""

import sys
from pathlib import Path

import pytest

from tclkit.cli._sources import find_sources, stands_for_many
from tclkit.runtime.errors import InputError


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("b.JPG", "a.png", "notes.txt", "a-overlay.png", "sub/c.png", "odd[1].png", "dir[1]/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def names(image: str) -> list[str]:
    return [Path(source.name).as_posix() for source in find_sources(image)]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("a.png", ["a.png"]),
        ("notes.txt", ["notes.txt"]),  # reading it says what is wrong with it
        (".", ["a.png", "b.JPG", "odd[1].png"]),
        ("*.png", ["a.png", "odd[1].png"]),
        ("**/*.png", ["a.png", "dir[1]/d.png", "odd[1].png", "sub/c.png"]),
        ("odd[1].png", ["odd[1].png"]),  # a file before a pattern
        ("dir[1]/*.png", ["dir[1]/d.png"]),  # a folder, too
        ("dir[[]1]/*.png", ["dir[1]/d.png"]),
        ("./s*/*.png", ["sub/c.png"]),
        ("-", ["standard input"]),
    ],
)
def test_image_means(pictures: Path, image: str, expected: list[str]) -> None:
    assert names(image) == expected


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.png", r"nowhere\.png: no such file or folder"),
        ("*.webp", r"\*\.webp: no file matches"),
        ("empty", r"empty: no images in this folder \(looked for .*\.png"),
        ("", "IMAGE is empty"),
    ],
)
def test_nothing_there(pictures: Path, image: str, message: str) -> None:
    (pictures / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        find_sources(image)


@pytest.mark.parametrize(
    ("image", "many"), [("a.png", False), (".", True), ("*.jpg", True), ("-", False), ("odd[1].png", False)]
)
def test_a_folder_stands_for_many_even_with_one_image(pictures: Path, image: str, many: bool) -> None:
    assert stands_for_many(image) is many


def test_reading(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = find_sources("a.png")
    assert source.read() == Path("a.png")


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = find_sources("-")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="standard input is closed"):
        source.read()
