import os
import signal
import threading

import pytest

from tclkit.tcl.stopping import StopRequest, stop_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with stop_on_signals() as request:
        assert request.signal_number == 0
        os.kill(os.getpid(), number)
        assert request.signal_number == number
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def test_the_second_interrupt_is_the_usual_one():
    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_go_without():
    found: list[StopRequest] = []

    def body() -> None:
        with stop_on_signals() as request:
            found.append(request)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found[0].signal_number == 0
