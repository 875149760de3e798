"""Ending a run from outside: the first SIGINT or SIGTERM ends it after the step that is running, a second at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether a signal has asked the run to end.

    signal_number: the signal that has; 0 for none.
    """

    def __init__(self) -> None:
        self.signal_number = 0

    def ask(self, number: int) -> None:
        """Take note of a signal; the next one of its kind finds the handler it would have found without us."""
        self.signal_number = number


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request; in a thread that cannot handle signals, nothing asks."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        request.ask(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
