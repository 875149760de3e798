"""Progress goes to stderr: bars at a terminal, a line now and then elsewhere."""

import io
import sys

import pytest

from tclkit.cli import _progress
from tclkit.tcl.loop import TrainProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make stderr a terminal; inside the test, because pytest's capture replaces it before each."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return stream


def steps(stage: str, count: int) -> list[TrainProgress]:
    return [
        TrainProgress(stage=stage, step=step, steps=count, losses={"total": 1 / step}) for step in range(1, count + 1)
    ]


def test_training_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    with _progress.training_display() as progress:
        for at in [*steps("clip", 50), *steps("grounder", 3)]:
            progress(at)
    assert capsys.readouterr().err.splitlines() == [
        "clip 1/50  total 1",
        "clip 50/50  total 0.02",
        "grounder 3/3  total 0.333",
    ]


def test_training_bars(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stream = terminal(monkeypatch)
    with _progress.training_display() as progress:
        for at in [*steps("clip", 50), *steps("grounder", 3)]:
            progress(at)
    drawn = stream.getvalue()
    assert "clip" in drawn
    assert "50/50" in drawn
    assert "3/3" in drawn
    assert capsys.readouterr().out == ""


def work(display: _progress.WorkDisplay) -> None:
    for done in range(0, 2001, 100):
        display.download("tcl.pth", done, 2000)
    display.download("other", 5, None)
    display.step("text graph", 1, 2)
    display.step("done", 2, 2)


def test_work_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    with _progress.work_display() as display:
        work(display)
    assert capsys.readouterr().err.splitlines() == [
        "tcl.pth: 0 B of 2.0 kB",
        "tcl.pth: 2.0 kB of 2.0 kB",
        "[1/2] text graph",
        "[2/2] done",
    ]


def test_work_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch)
    with _progress.work_display() as display:
        work(display)
    for text in ("tcl.pth", "2.0 kB of 2.0 kB", "other", "5 B", "done", "2/2"):
        assert text in stream.getvalue()


def test_tracked_gives_every_item_and_leaves_stdout_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = terminal(monkeypatch)
    for item in _progress.tracked([1, 2, 3], "segmenting"):
        print(item)
    assert capsys.readouterr().out == "1\n2\n3\n"
    assert "segmenting" in stream.getvalue()


@pytest.mark.parametrize("shown", [True, False])
def test_tracked_is_silent_without_a_terminal(shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(_progress.tracked([1, 2], "segmenting", shown=shown)) == [1, 2]
    assert capsys.readouterr().err == ""
