"""Signals: the first one ends a run in order.

SIGINT (Ctrl-C) and SIGTERM become a KeyboardInterrupt in the main thread. While that is on its way out, and everything
is put in order, more of them are ignored; only the third ends the process at once.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_STATUS = 130
_ENOUGH = 3


class Interrupt:
    """What the signals have said so far."""

    def __init__(self) -> None:
        self._count = 0
        self._deferred = False

    def __call__(self, number: int, frame: Any) -> None:
        self._count += 1
        if self._count >= _ENOUGH:
            os._exit(EXIT_STATUS)
        if self._count == 1 and not self._deferred:
            raise KeyboardInterrupt

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that a signal does not tear apart: the KeyboardInterrupt comes after it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._count:
            raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """A block in which signals are handled as above; in another thread than the main one they are left alone."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
