import logging
import threading
import time
from collections.abc import Iterator

import pytest

from tclkit.runtime import prefetch
from tclkit.runtime.prefetch import prefetched


def threads() -> int:
    return sum(thread.name == "tclkit-prefetch" for thread in threading.enumerate())


def test_order_and_values() -> None:
    assert list(prefetched(range(20), lambda x: x * x)) == [x * x for x in range(20)]
    assert list(prefetched([], str)) == []
    assert threads() == 0


def test_it_runs_one_ahead_and_no_further() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = prefetched(source(), str)
    assert taken == []  # nothing happens before the first is asked for
    next(results)
    time.sleep(0.05)
    assert 2 <= len(taken) <= 3  # one waits in the queue, one may wait for room
    results.close()
    assert threads() == 0


def test_work_overlaps() -> None:
    def slow(number: int) -> int:
        time.sleep(0.05)
        return number

    start = time.perf_counter()
    for _ in prefetched(range(6), slow):
        time.sleep(0.05)
    assert time.perf_counter() - start < 0.05 * 12 * 0.85


@pytest.mark.parametrize("where", ["source", "prepare"])
def test_exceptions_pass_through_in_their_place(where: str) -> None:
    def source() -> Iterator[int]:
        yield from (1, 2)
        if where == "source":
            raise OSError("camera unplugged")
        yield 3

    def prepare(number: int) -> int:
        if number == 3:
            raise OSError("camera unplugged")
        return number

    results = prefetched(source(), prepare)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(OSError, match="camera unplugged"):
        next(results)
    assert list(results) == []
    assert threads() == 0


@pytest.mark.parametrize("read", [0, 1, 3])
def test_closing_ends_the_thread(read: int) -> None:
    for _ in range(20):
        results = prefetched(iter(range(10)), str)
        for _ in range(read):
            next(results)
        results.close()
        assert threads() == 0


def test_an_abandoned_generator_ends_the_thread() -> None:
    for number in prefetched(iter(range(10**9)), int):
        if number == 2:
            break
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == 0


def test_a_source_that_blocks_is_left_and_announced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefetch, "_JOIN_SECONDS", 0.05)
    entered, release = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        yield 1
        entered.set()
        release.wait(10)

    results = prefetched(source(), int)
    next(results)
    assert entered.wait(10)
    with caplog.at_level(logging.WARNING):
        results.close()
    assert "source of frames has not answered" in caplog.text
    release.set()


@pytest.mark.parametrize("is_first", [True, False])
def test_closing_waits_for_a_function_that_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_first: bool
) -> None:
    monkeypatch.setattr(prefetch, "_JOIN_SECONDS", 0.2)
    entered = threading.Event()

    def slow(number: int) -> int:
        if number:
            entered.set()
            time.sleep(0.5)
        return number

    results = prefetched([0, 1], slow, int) if is_first else prefetched([0, 1], int, slow)
    next(results)
    assert entered.wait(10)
    with caplog.at_level(logging.WARNING):
        results.close()
    assert threads() == 0
    assert caplog.messages == []


def test_two_functions_run_in_two_threads_in_order() -> None:
    seen: dict[str, set[str]] = {"prepare": set(), "then": set()}

    def noting(what: str, value: int) -> int:
        seen[what].add(str(threading.get_ident()))
        return value + 1

    results = prefetched(range(50), lambda n: noting("prepare", n), lambda n: noting("then", n) * 10)
    assert list(results) == [(n + 2) * 10 for n in range(50)]
    assert len(seen["prepare"] | seen["then"] | {str(threading.get_ident())}) == 3
    assert threads() == 0


def test_two_functions_are_two_items_ahead_and_no_further() -> None:
    taken: list[int] = []
    results = prefetched(map(taken.append, range(100)), str, str)
    for number in range(3):
        next(results)
        time.sleep(0.05)
        assert len(taken) == number + 3
    results.close()
    assert threads() == 0


@pytest.mark.parametrize("read", [0, 1, 3])
def test_closing_ends_both_threads(read: int) -> None:
    for _ in range(20):
        results = prefetched(iter(range(10)), str, int)
        for _ in range(read):
            next(results)
        results.close()
        assert threads() == 0


def test_what_the_second_function_raises_passes_through_in_its_place() -> None:
    results = prefetched([4, 2, 0, 1], int, lambda number: 4 // number)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert threads() == 0
