"""What is noted and kept on the way."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tclkit.tcl.watch as watch_module
from tclkit.tcl.config import load_config
from tclkit.tcl.watch import Watch


class Score:
    """A validation's result."""

    def __init__(self, benchmark: str, miou: float, total: int = 2) -> None:
        self.miou, self._benchmark, self._total = miou, benchmark, total

    def to_dict(self) -> dict[str, Any]:
        return {"benchmark": self._benchmark, "images": {"total": self._total, "counted": 1}}


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """note(step, score, data): whether best.pt was written."""
    saved: list[str] = []

    def noted(step: int, score: Score, data: str = "here") -> bool:
        options = ["monitoring.validate_every=1", "monitoring.validation=folder", f"monitoring.validation_data={data}"]
        monkeypatch.setattr(watch_module, "open_validation", lambda *_, **__: None)
        stage: Any = SimpleNamespace(model=None)
        facts: Any = None
        watch = Watch(
            load_config("tcl-shapes", options),
            tmp_path,
            stage,
            facts,
            averaged=lambda: pytest.fail("unused"),
            save=lambda path, *_: saved.append(path.name),
        )
        saved.clear()
        watch.before_steps(step - 1)
        watch._note(step, score)  # type: ignore[arg-type]
        return saved == ["best.pt"]

    return noted


def test_the_best_is_that_of_the_same_images(note) -> None:
    assert note(1, Score("shapes", 68.0))
    assert not note(2, Score("shapes", 60.0))
    assert note(3, Score("voc", 30.0))
    assert note(4, Score("voc", 20.0), data="elsewhere")
    assert note(5, Score("voc", 10.0, total=1))
    assert not note(6, Score("voc", 29.0))
    assert not note(7, Score("voc", float("nan"), total=9))


def test_rows_of_steps_that_are_taken_again_and_torn_ones_go(note, tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    for step in (1, 2, 3):
        note(step, Score("voc", step))
    path.write_text(path.read_text()[:-9])  # the power went while the last line was written
    assert note(3, Score("voc", 9))
    assert note(2, Score("voc", 8))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
