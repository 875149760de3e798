"""One step ahead: the next items are prepared by threads while the caller works on the current one."""

import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Middle = TypeVar("Middle")
Prepared = TypeVar("Prepared")
_JOIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Ready(Generic[Prepared]):
    value: Prepared


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


class _Finished:
    pass


class _Stage:
    """What one thread has made: messages, and room for as many as it may be ahead.

    Attributes:
        takes: whether it waits for room or for its source, rather than prepares.
    """

    def __init__(self, ahead: int) -> None:
        self.takes = True
        self._messages: queue.SimpleQueue[_Ready[Any] | _Failed | _Finished] = queue.SimpleQueue()
        self._room = threading.Semaphore(ahead)
        self._is_stopped = False

    def work(self, items: Iterable[Any], prepare: Callable[[Any], Any]) -> None:
        """Prepare items, each taken only when there is room for it."""
        try:
            source = iter(items)
            while self._has_room():
                try:
                    item = next(source)
                except StopIteration:
                    self._messages.put(_Finished())
                    return
                if self._is_stopped:
                    return
                self.takes = False
                self._messages.put(_Ready(prepare(item)))
                self.takes = True
        except BaseException as error:
            self._messages.put(_Failed(error))

    def received(self) -> Iterator[Any]:
        """Yield what was prepared, in order; raise what was raised."""
        while True:
            message = self._messages.get()
            if isinstance(message, _Finished):
                return
            if isinstance(message, _Failed):
                raise message.error
            self._room.release()
            yield message.value

    def stop(self) -> None:
        """Wake the thread that works and the one that receives, and let both end."""
        self._is_stopped = True
        self._room.release()
        self._messages.put(_Finished())

    def _has_room(self) -> bool:
        self._room.acquire()
        return not self._is_stopped


@overload
def prefetched(
    items: Iterable[Item], prepare: Callable[[Item], Prepared], *, ahead: int = ...
) -> Generator[Prepared, None, None]: ...
@overload
def prefetched(
    items: Iterable[Item], prepare: Callable[[Item], Middle], then: Callable[[Middle], Prepared], *, ahead: int = ...
) -> Generator[Prepared, None, None]: ...
def prefetched(
    items: Iterable[Any], prepare: Callable[[Any], Any], then: Callable[[Any], Any] | None = None, *, ahead: int = 1
) -> Generator[Any, None, None]:
    """Yield `prepare(item)` of every item, or `then(prepare(item))`, in order, each function in a thread of its own.

    Every thread is at most `ahead` items ahead of what takes from it. Items are taken from `items` by the first thread.
    An exception of `items` or a function is raised here, after all that came before it. Closing the generator ends the
    threads and waits for them, however long a function runs; only where `items` itself does not return for a while, its
    thread is left to itself, with a warning. A function that may wait for the caller should be woken first.

    Args:
        items: what to prepare.
        prepare: in the first thread.
        then: in the second thread, on what `prepare` made of an earlier item.
        ahead: items, 1 or more.
    """
    functions = [prepare] if then is None else [prepare, then]
    stages = [_Stage(max(1, ahead)) for _ in functions]
    sources = [items, *(stage.received() for stage in stages[:-1])]
    threads = [
        threading.Thread(target=stage.work, args=(source, function), name="tclkit-prefetch", daemon=True)
        for stage, source, function in zip(stages, sources, functions, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        yield from stages[-1].received()
    finally:
        for stage in stages:
            stage.stop()
        first, *others = threads
        first.join(_JOIN_SECONDS)
        if first.is_alive() and stages[0].takes:  # it has no room to wait for any more
            logger.warning("the source of frames has not answered for %.0f s and was left to itself", _JOIN_SECONDS)
        else:
            first.join()
        for thread in others:
            thread.join()
