"""Signals become requests, and everything is put back."""

from __future__ import annotations

import signal
import threading

import pytest

from adaptivenet.training import Interrupted
from adaptivenet.training.interrupt import stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_a_request_and_handlers_come_back(number, capsys):
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert not stop
        signal.raise_signal(number)
        assert stop
        assert stop.name == number.name
        assert signal.getsignal(number) == before  # the second acts as ever
    assert signal.getsignal(number) == before
    assert "once more stops at once" in capsys.readouterr().err


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), stop_on_signal():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) == before


def test_other_threads_get_a_request_that_stays_unset():
    seen = []

    def work():
        with stop_on_signal() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_interrupted_is_not_swallowed_by_except_exception():
    assert not issubclass(Interrupted, Exception)
    error = Interrupted("why", name="arm", epochs=3)
    assert (str(error), error.name, error.epochs) == ("why", "arm", 3)
