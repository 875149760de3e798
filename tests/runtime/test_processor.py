import os

import pytest

from tclkit.runtime.processor import usable_cpus


def test_cpus_that_are_closed_to_the_process_do_not_count() -> None:
    before = os.sched_getaffinity(0)
    assert usable_cpus() == len(before)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("counted", "usable"), [(3, 3), (None, 1)])
def test_where_nothing_says_which_all_count(monkeypatch: pytest.MonkeyPatch, counted: int | None, usable: int) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert usable_cpus() == usable
