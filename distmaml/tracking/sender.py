"""The one thread of a process that talks to an MLflow, for all of its runs.

A search has hundreds of them. If each sent for itself, a server would get more to do the slower it became: a request
that waits too long is given up and made again, while the server still works on the first. Here one request is under way
at a time, and runs take turns. Where turns come late each run has more to send, so batches become larger and not more,
and in large batches a server takes several times as many points a second as in small ones.

Knows nothing of what is sent, nor of MLflow.
"""

import logging
import math
import threading
import time
from pathlib import Path
from typing import Protocol

log = logging.getLogger(__name__)

SECONDS_A_TURN = 0.08
"""Between turns, on average, when all runs have something to send: with 64 runs each has one in 5 seconds."""
LONGEST_WAIT = 30.0
"""Seconds between tries."""


class Run(Protocol):
    """What takes turns."""

    closing: bool
    """It is over: it goes before the others, and leaves when all of it is sent or its deadline has passed."""
    deadline: float
    """Of a run that is closing, on the monotonic clock."""

    @property
    def folder(self) -> Path:
        """Where that lies which is not sent yet."""
        ...

    def turn(self) -> float | None:
        """Sends a batch or so; seconds until it would like to have another turn, None where all of a closing run is
        sent. Raises whatever goes wrong."""
        ...

    def failed(self, error: Exception) -> str:
        """Its turn has raised this; why, in short."""
        ...

    def over(self, drained: bool) -> None:
        """It has had its last turn."""
        ...


class Sender:
    """Gives runs their turns, as long as there are any."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._changed = threading.Condition()
        self._due: dict[Run, float] = {}
        self._failures: dict[Run, int] = {}  # in a row, of each run
        self._failures_of_all = 0
        self._paused_until = 0.0
        self._warned = False
        self._working = False

    def add(self, run: Run) -> None:
        """A run wants turns from now on."""
        with self._changed:
            self._due[run] = time.monotonic()
            self._paused_until = 0.0
            if not self._working:
                self._working = True
                threading.Thread(target=self._work, name="mlflow-sender", daemon=True).start()
            self._changed.notify_all()

    def wake(self, run: Run) -> None:
        """It has something new, and wants a turn soon."""
        with self._changed:
            if run in self._due:
                self._due[run] = min(self._due[run], time.monotonic())
                self._changed.notify_all()

    def close(self, run: Run, timeout: float) -> None:
        """It is over, and what is left is to be sent in so many seconds."""
        with self._changed:
            run.deadline = time.monotonic() + timeout
            run.closing = True
            if run in self._due:
                self._due[run] = -math.inf  # before all others
                self._changed.notify_all()

    def settle(self, timeout: float) -> bool:
        """Waits until no run is closing any more, for so many seconds; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(run.closing for run in self._due), timeout)

    # ------------------------------------------------------------------------------------------- thread

    def _work(self) -> None:
        while (run := self._next()) is not None:
            try:
                again = run.turn()
            except Exception as error:  # whatever it is, the thread must live, and the points are safe
                again = self._after_failure(run, error)
                if run.closing and time.monotonic() + again > run.deadline:
                    self._remove(run, drained=False)
                    continue
            else:
                self._after_success(run)
                if again is None:
                    self._remove(run, drained=True)
                    continue
                if run.closing:
                    again = -math.inf  # before all others
                elif again > 0:
                    again = max(again, SECONDS_A_TURN * len(self._due))
            with self._changed:
                self._due[run] = min(self._due[run], time.monotonic() + again)

    def _remove(self, run: Run, *, drained: bool) -> None:
        run.over(drained)
        with self._changed:
            del self._due[run]
            self._failures.pop(run, None)
            if not self._failures:
                self._warned = False  # nobody is left to tell that MLflow is back; it is told of anew if it is not
            self._changed.notify_all()

    def _next(self) -> Run | None:
        """Waits for the run whose turn it is; None where there are no more runs."""
        with self._changed:
            while self._due:
                run = min(self._due, key=self._when)
                left = self._when(run) - time.monotonic()
                if left <= 0:
                    self._due[run] = math.inf  # unless it is woken while it has its turn
                    return run
                self._changed.wait(min(left, threading.TIMEOUT_MAX))
            self._working = False
            return None

    def _when(self, run: Run) -> float:
        return self._due[run] if run.closing else max(self._due[run], self._paused_until)

    def _after_success(self, run: Run) -> None:
        self._failures_of_all, self._paused_until = 0, 0.0
        if self._failures.pop(run, 0) and self._warned:
            log.warning("MLflow at %s is back.", self._uri)
            self._warned = False

    def _after_failure(self, run: Run, error: Exception) -> float:
        """Seconds until the run's next turn. Nearly always MLflow is away, so the others are not tried soon either."""
        reason = run.failed(error)
        if not self._warned and run not in self._failures:
            log.warning(
                "Cannot write to MLflow at %s (%s). What is not sent stays in %s and is sent when it can be.",
                self._uri,
                reason,
                run.folder,
            )
            self._warned = True
        self._failures[run] = self._failures.get(run, 0) + 1
        self._failures_of_all += 1
        now = time.monotonic()
        self._paused_until = now + _wait_after(self._failures_of_all)
        if run.closing:
            return max(0.0, min(1.0, run.deadline - now))
        return _wait_after(self._failures[run])


def _wait_after(failures: int) -> float:
    return float(min(2.0 ** (failures - 1), LONGEST_WAIT)) if failures < 10 else LONGEST_WAIT


_senders: dict[str, Sender] = {}
_lock = threading.Lock()


def sender_to(uri: str) -> Sender:
    """The sender of this process to an MLflow."""
    with _lock:
        return _senders.setdefault(uri, Sender(uri))
