import logging
from pathlib import Path

import pytest

from tclkit.calib.journal import Journal, LineCounter, journal_files, read_journals

KEY, OTHER = "ab" * 32, "cd" * 32


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with Journal(tmp_path / "new", KEY, {"benchmark": "voc"}) as journal:
        journal.add_image(3, "c", {"fp32": {"all": {"ms": 1.5}}})
        journal.add_problem(1, "b", "it is broken")
    findings = read_journals(tmp_path / "new", KEY)
    assert findings.images == {3: {"fp32": {"all": {"ms": 1.5}}}}
    assert findings.problems == {1: ("b", "it is broken")}
    assert read_journals(tmp_path / "new", OTHER).images == {}


def test_lines_are_there_before_the_file_is_closed(tmp_path: Path) -> None:
    journal = Journal(tmp_path, KEY, {})
    journal.add_image(0, "a", {})
    assert list(read_journals(tmp_path, KEY).images) == [0]
    journal.close()
    journal.close()


def test_files_of_several_processes_are_read_together(tmp_path: Path) -> None:
    with Journal(tmp_path, OTHER, {}) as other:
        other.add_image(5, "e", {})
    with Journal(tmp_path, KEY, {}) as first, Journal(tmp_path, KEY, {}) as second:
        first.add_problem(0, "a", "unreadable")
        first.add_image(1, "b", {"n": 1})
        second.add_image(0, "a", {"n": 2})
        second.add_image(1, "b", {"n": 1})
    findings = read_journals(tmp_path, KEY)
    assert findings.images == {0: {"n": 2}, 1: {"n": 1}}
    assert findings.problems == {}  # it was repaired in between
    assert len(journal_files(tmp_path, KEY)) == 2


@pytest.mark.parametrize("cut", [1, 10])
def test_a_line_that_a_kill_left_unfinished_is_not_there(tmp_path: Path, cut: int) -> None:
    with Journal(tmp_path, KEY, {}) as journal:
        journal.add_image(0, "a", {"n": 1})
        journal.add_image(1, "b", {"n": 2})
    (path,) = journal_files(tmp_path, KEY)
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(read_journals(tmp_path, KEY).images) == [0]


def test_a_damaged_line_is_counted_anew_and_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Journal(tmp_path, KEY, {}) as journal:
        journal.add_image(0, "a", {"n": 1})
        journal.add_image(1, "b", {"n": 2})
    (path,) = journal_files(tmp_path, KEY)
    path.write_bytes(path.read_bytes().replace(b'{"index":0', b'{"in\0ex"'))
    with caplog.at_level(logging.WARNING):
        assert list(read_journals(tmp_path, KEY).images) == [1]
    assert "damaged line" in caplog.text


def test_lines_are_counted_as_they_come(tmp_path: Path) -> None:
    with Journal(tmp_path, KEY, {}) as old:
        old.add_image(0, "a", {})
        counter = LineCounter(tmp_path, KEY)
        assert counter.count() == 0
        old.add_image(1, "b", {})
        with Journal(tmp_path, KEY, {}) as new:
            assert counter.count() == 1
            new.add_image(2, "c", {})
            new.add_problem(3, "d", "no")
            assert counter.count() == 3
    assert counter.count() == 3
