"""`tclkit data world`: files that training and evaluation take, going on, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import Result

from tclkit.tcl.pairs import PairReader, PairsConfig
from tclkit.tcl.world import OBJECT_NAMES

Invoke = Callable[..., Result]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which is the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_in_the_way(invoke: Invoke) -> None:
    Path("file").write_text("")
    result = invoke("data", "world", "-o", "file", "--scenes", "1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: file is a file, but the results need a folder: give another with -o\n"


def test_from_the_world_to_pairs_and_figures(invoke: Invoke) -> None:
    arguments = ("data", "world", "-o", "world", "--scenes", "7", "--per-shard", "3", "--size", "64")
    result = invoke(*arguments, "--labelled", "2")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [
        "world/*.tar: 7 pairs in 3 shards, 0 of which were there",
        "world/labelled: 2 labelled scenes",
    ]
    assert "next: tclkit eval --benchmark folder --data world/labelled" in result.stderr
    pairs = iter(PairReader(PairsConfig(sources=["world/*.tar"])))
    assert next(pairs).image_hwc.shape == (64, 64, 3)
    judged = invoke("eval", "-b", "folder", "--data", "world/labelled", "--json", "--no-pictures")
    assert judged.exit_code == 0, judged.stderr
    (evaluation,) = json.loads(judged.stdout)["evaluations"]
    assert evaluation["images"] == {"total": 2, "counted": 2, "pending": 0}
    assert evaluation["unknown_pixels"] == 0
    again = invoke(*arguments, "--labelled", "2", "--json")
    assert json.loads(again.stdout) == {
        "source": "world/*.tar",
        "scenes": 7,
        "shards": {"written": 0, "kept": 3},
        "labelled": {"folder": "world/labelled", "scenes": 2},
    }


def test_new_colours(invoke: Invoke) -> None:
    colours = "pink=ff8ac4, light blue=#78BEFA"
    result = invoke("data", "world", "-o", "w", "--scenes", "3", "--colours", colours, "--labelled", "1", "--json")
    assert result.exit_code == 0, result.stderr
    names = Path("w/labelled/names.txt").read_text().splitlines()
    assert len(names) == 17
    assert names[:2] == ["background", "pink circle"]
    assert not set(names) & set(OBJECT_NAMES)
    written = json.loads(Path("w/world.json").read_text())
    assert written["colours"] == {"pink": "ff8ac4", "light blue": "78befa"}
    assert written["world"]["size"] == 128
    plain = invoke("data", "world", "-o", "plain", "--scenes", "3", "--json")
    assert json.loads(plain.stdout)["labelled"] is None
    assert not Path("plain/labelled").exists()


def test_a_source_is_given_to_the_one_of_all_that_has_two(invoke: Invoke, mini: ModuleType, tmp_path: Path) -> None:
    mini.write_all(tmp_path / "data")
    result = invoke("data", "prepare", "all", "--root", str(tmp_path / "data"), "--source", "pixelmaps")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 8
    alone = invoke("data", "prepare", "cityscapes", "--root", str(tmp_path / "data"), "--source", "pixelmaps")
    assert alone.exit_code == 1
    assert "only coco_object can be made from two sources" in " ".join(alone.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "exit_code", "text"),
    [
        (["--scenes", "0"], 2, "scenes"),
        (["--scenes", "many"], 2, "integer"),
        ([], 2, "--scenes"),
        (["--scenes", "3", "--per-shard", "0"], 2, "per-shard"),
        (["--scenes", "3", "--per-shard", "20000"], 2, "per-shard"),
        (["--scenes", "3", "--size", "8"], 2, "size"),
        (["--scenes", "3", "--seed", "-1"], 2, "seed"),
        (["--scenes", "3", "--labelled", "-1"], 2, "labelled"),
        (["--scenes", "3", "--colours", "pink"], 2, "form NAME=RRGGBB"),
        (["--scenes", "3", "--colours", "pink=ff8ac"], 2, "form NAME=RRGGBB"),
        (["--scenes", "3", "--colours", "pink=ff8ac4,"], 2, "form NAME=RRGGBB"),
        (["--scenes", "3", "--colours", "Pink=ff8ac4"], 2, "no name of a colour"),
        (["--scenes", "3", "--colours", "pink=ff8ac4,pink=000000"], 2, "pink is there twice"),
        (["--scenes", "200000", "--per-shard", "1"], 1, "raise per_shard"),
        (["--scenes", "3", "--seed", "1000003"], 1, "nothing may learn from"),
    ],
)
def test_bad_input_writes_nothing(invoke: Invoke, arguments: list[str], exit_code: int, text: str) -> None:
    result = invoke("data", "world", "-o", "out", *arguments)
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert text in " ".join(result.stderr.replace("│", " ").split())
    assert not Path("out").exists()


def test_what_stands_there_is_not_overwritten(invoke: Invoke) -> None:
    assert invoke("data", "world", "-o", "w", "--scenes", "3").exit_code == 0
    other = invoke("data", "world", "-o", "w", "--scenes", "3", "--seed", "9")
    assert other.exit_code == 1
    assert "w was written with another world" in other.stderr
    Path("file").write_text("x")
    assert invoke("data", "world", "-o", "file", "--scenes", "3").exit_code == 1
    assert Path("file").read_text() == "x"
