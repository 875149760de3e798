"""Where overlays go."""

import os
from pathlib import Path

import pytest

from tclkit.cli._outputs import plan_overlays, require_output_file, require_output_folder
from tclkit.cli._sources import Source
from tclkit.runtime.errors import InputError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sources(*paths: str) -> list[Source]:
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"input")
    return [Source(name=path, path=Path(path)) for path in paths]


def plan(*paths: str, output: str | None = None, many: bool = False) -> list[str]:
    planned = plan_overlays(sources(*paths), None if output is None else Path(output), many=many)
    return [path.as_posix() for path in planned]


def test_one_image() -> None:
    assert plan("in/a.jpg") == ["a-overlay.png"]
    assert plan("in/a.jpg", output="b.webp") == ["b.webp"]
    assert plan("in/a.jpg", output="new") == ["new/a-overlay.png"]
    assert plan("in/a.jpg", output="in") == ["in/a-overlay.png"]
    assert plan_overlays([Source(name="standard input", path=None)], None, many=False) == [Path("stdin-overlay.png")]


def test_many_images() -> None:
    assert plan("in/a.jpg", "in/b.jpg", many=True) == ["tclkit-overlays/a-overlay.png", "tclkit-overlays/b-overlay.png"]
    assert plan("in/a.jpg", output="out", many=True) == ["out/a-overlay.png"]


def test_no_two_overlays_share_a_name() -> None:
    assert plan("in/a.jpg", "in/a.png", "in/sub/a.png", output="out", many=True) == [
        "out/a.jpg-overlay.png",
        "out/a.png-overlay.png",
        "out/sub/a-overlay.png",
    ]


@pytest.mark.parametrize(
    "names", [("photo.jpg", "photo.png", "photo.jpg.png"), ("photo.jpg", "photo"), ("a.b.c", "a.b", "a", "a.d")]
)
def test_a_short_name_is_no_others_long_name(names: tuple[str, ...]) -> None:
    planned = plan(*(f"in/{name}" for name in names), output="out", many=True)
    assert len(set(planned)) == len(names)


@pytest.mark.parametrize("output", ["in/a.png", "in/../in/a.png", "link.png"])
def test_an_input_is_never_overwritten(output: str) -> None:
    Path("link.png").symlink_to("in/a.png")
    with pytest.raises(InputError, match=r"is an input and is not overwritten: give another -o"):
        plan("in/a.png", output=output)


def test_an_input_among_many_is_never_overwritten() -> None:
    with pytest.raises(InputError, match="is an input"):
        plan("in/a.jpg", "in/a-overlay.png", output="in", many=True)


def test_many_images_need_a_folder() -> None:
    sources("there")
    for output in ("there", "new.png"):
        with pytest.raises(InputError, match=rf"{output} names a file, but the overlays of 2 image\(s\) need a folder"):
            plan("in/a.jpg", "in/b.jpg", output=output, many=True)


def test_an_unknown_format_is_refused_before_any_work() -> None:
    with pytest.raises(InputError, match=r"out\.txt: an overlay is written as one of \.png"):
        plan("in/a.jpg", output="out.txt")


@pytest.mark.parametrize("folder", [".", "new", "new/deep", "old", "old/new"])
def test_a_folder_for_results_is_not_made_by_asking(folder: str) -> None:
    Path("old").mkdir()
    require_output_folder(Path(folder))
    require_output_file(Path(folder) / "report.md", "--report")
    assert [path.name for path in Path().iterdir()] == ["old"]


def test_a_file_in_the_way_of_results() -> None:
    sources("file")
    for folder in ("file", "file/inside/deep"):
        with pytest.raises(InputError, match=r"^file is a file, but the results need a folder: give another with -o$"):
            require_output_folder(Path(folder))
    with pytest.raises(InputError, match=r"file is a file, .* with --report"):
        require_output_file(Path("file/report.md"), "--report")
    with pytest.raises(InputError, match=r"^\. is a folder: give a file with --report, such as report\.md$"):
        require_output_file(Path(), "--report")


def test_a_folder_that_may_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("ro").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "ro")
    with pytest.raises(InputError, match=r"^the folder ro may not be written: give another place with -o$"):
        require_output_folder(Path("ro/new"))
