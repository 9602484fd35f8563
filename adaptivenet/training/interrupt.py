"""Ctrl-C and SIGTERM: finish the epoch, save, say how to go on."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and stopped after a whole epoch.

    It is a `KeyboardInterrupt`, so that `except Exception` does not swallow it. `str(error)` says
    what was saved and how to go on; `error.name` is the run and `error.epochs` counts the epochs
    that are done.
    """

    def __init__(self, message: str, *, name: str = "", epochs: int = 0):
        super().__init__(message)
        self.name = name
        self.epochs = epochs


class StopRequest:
    """Whether a signal has asked to stop; `name` is the signal's name, empty before."""

    def __init__(self) -> None:
        self.name = ""

    def __bool__(self) -> bool:
        return bool(self.name)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request that the block reads.

    A second signal acts as it did before. The handlers are put back at the end. Outside the main
    thread Python allows no handlers, and the request stays unset.

    Yields:
        The request, true once a signal has come.

    >>> with stop_on_signal() as stop:
    ...     before = bool(stop)
    ...     signal.raise_signal(signal.SIGINT)
    ...     before, stop.name
    (False, 'SIGINT')
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def put_back() -> None:
        for number, handler in before.items():
            # None stands for a handler that C code installed; Python cannot set it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def handle(number: int, frame: Any) -> None:
        request.name = signal.Signals(number).name
        put_back()
        text = f"\n{request.name}: finishing this epoch to save it (once more stops at once)"
        # The signal may have come in the middle of another write to the same stream.
        with suppress(RuntimeError):
            print(text, file=sys.stderr, flush=True)

    for number in _SIGNALS:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        put_back()
