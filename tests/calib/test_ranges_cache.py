import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tclkit.calib.ranges_cache import Values, remembered
from tclkit.runtime.files import cache_folder

KEY = {"model": "m", "images": "i", "tensors": ["a", "b"]}
VALUES: Values = {"a": 0.1, "b": [1.0, 1e-30, 3.4028234663852886e38]}


class Measure:
    def __init__(self, values: Values = VALUES) -> None:
        self.values, self.calls = values, 0

    def __call__(self) -> Values:
        self.calls += 1
        return self.values


def entry() -> Path:
    (path,) = (cache_folder() / "calibration").iterdir()
    return path


def test_what_was_measured_is_not_measured_again() -> None:
    measure = Measure()
    assert remembered(KEY, measure) == remembered(KEY, measure) == VALUES
    assert measure.calls == 1
    assert remembered({**KEY, "images": "others"}, measure) == VALUES
    assert measure.calls == 2


def test_what_overflows_is_not_measured_again_either() -> None:
    measure = Measure({"a": float("nan"), "b": [float("inf"), float("nan")]})
    for _ in range(2):
        assert str(remembered(KEY, measure)) == str(measure.values)
    assert measure.calls == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda whole: "",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: "[]",
        lambda whole: "null",
        lambda whole: "[" * 100_000,
        lambda whole: json.dumps({**json.loads(whole), "key": {}}),
        lambda whole: json.dumps({**json.loads(whole), "values": {"a": 1.0}}),
        lambda whole: json.dumps({**json.loads(whole), "values": {"a": 1.0, "b": []}}),
        lambda whole: json.dumps({**json.loads(whole), "values": {"a": 1.0, "b": [[1.0]]}}),
        lambda whole: json.dumps({**json.loads(whole), "values": {"a": "1", "b": [1.0]}}),
        lambda whole: json.dumps({**json.loads(whole), "values": {"a": -1.0, "b": [1.0]}}),
    ],
)
def test_damaged_entries_are_announced_and_remade(change: Any, caplog: pytest.LogCaptureFixture) -> None:
    measure = Measure()
    remembered(KEY, measure)
    whole = entry().read_text(encoding="utf-8")
    entry().write_text(change(whole), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert remembered(KEY, measure) == VALUES
    assert measure.calls == 2
    assert "is damaged" in caplog.text
    assert "measured again" in caplog.text
    assert entry().read_text(encoding="utf-8") == whole


def test_bytes_that_are_no_text(caplog: pytest.LogCaptureFixture) -> None:
    remembered(KEY, Measure())
    entry().write_bytes(b"\xff\xfe\x00")
    assert remembered(KEY, Measure()) == VALUES
    assert "is damaged" in caplog.text


def test_a_folder_that_cannot_be_written_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setenv("TCLKIT_HOME", str(tmp_path))
    assert remembered(KEY, Measure()) == VALUES
    assert "cannot be kept" in caplog.text
    assert "measured again" in caplog.text


def test_failed_measuring_leaves_no_entry() -> None:
    def fail() -> Values:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        remembered(KEY, fail)
    assert not (cache_folder() / "calibration").exists()
