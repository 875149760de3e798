"""One step ahead: the next items are prepared by a thread while the caller works on the current one."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
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


def prefetched(
    items: Iterable[Item], prepare: Callable[[Item], Prepared], *, ahead: int = 1
) -> Generator[Prepared, None, None]:
    """Yield `prepare(item)` of every item, in order, prepared by one thread that runs at most `ahead` items ahead.

    Items are taken from `items` by that thread. An exception of `items` or `prepare` is raised here, after all that
    came before it. Closing the generator ends the thread and waits for it, unless `items` itself does not return.
    """
    messages: queue.Queue[_Ready[Prepared] | _Failed | _Finished] = queue.Queue(maxsize=max(1, ahead))
    stop = threading.Event()
    thread = threading.Thread(target=_work, args=(items, prepare, messages, stop), name="tclkit-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            message = messages.get()
            if isinstance(message, _Finished):
                return
            if isinstance(message, _Failed):
                raise message.error
            yield message.value
    finally:
        stop.set()
        _drain(messages)  # the thread may wait for room; after this it puts one message at most, so it never waits
        thread.join(_JOIN_SECONDS)
        if thread.is_alive():
            logger.warning("the source of frames has not answered for %.0f s and was left to itself", _JOIN_SECONDS)


def _work(
    items: Iterable[Item],
    prepare: Callable[[Item], Prepared],
    messages: "queue.Queue[_Ready[Prepared] | _Failed | _Finished]",
    stop: threading.Event,
) -> None:
    try:
        for item in items:
            if stop.is_set():
                return
            messages.put(_Ready(prepare(item)))
            if stop.is_set():
                return
        messages.put(_Finished())
    except BaseException as error:
        if not stop.is_set():
            messages.put(_Failed(error))


def _drain(messages: "queue.Queue[_Ready[Prepared] | _Failed | _Finished]") -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            messages.get_nowait()
