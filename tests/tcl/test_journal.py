"""Files of JSON lines that grow while a run does."""

import json
import logging
from pathlib import Path

import pytest

from tclkit.tcl.journal import add_to_journal, cut_journal, read_journal


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert read_journal(path) == []
    add_to_journal(path, {"step": 1, "loss": 0.5, "name": "a"})
    add_to_journal(path, {"step": 2, "loss": float("nan"), "norm": float("inf")})
    assert read_journal(path) == [{"step": 1, "loss": 0.5, "name": "a"}, {"step": 2, "loss": None, "norm": None}]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "3", "\x00\x00", "\udcff"])
def test_a_torn_line_is_left_out_aloud_and_goes_at_the_next_cut(
    torn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(f'{{"step": 1}}\n{torn}'.encode(errors="surrogateescape"))
    with caplog.at_level(logging.WARNING):
        assert read_journal(path) == [{"step": 1}]
    assert "line 2 is torn" in caplog.text
    cut_journal(path, lambda row: True)
    add_to_journal(path, {"step": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]


def test_a_cut_of_nothing_makes_nothing(tmp_path: Path) -> None:
    cut_journal(tmp_path / "log.jsonl", lambda row: True)
    assert list(tmp_path.iterdir()) == []
