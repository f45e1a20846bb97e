"""Means of the training metrics between two points, and the speed."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil


class Meter:
    """Gathers what every outer step says and gives the means since the last reading.

    Speed is that of training: what happens inside `excluded` does not count. CPU seconds are those of the process, with
    what is excluded, so that their sum is what a run has cost until its last reading.
    """

    def __init__(self, tasks_per_step: int) -> None:
        self._tasks_per_step, self._used = tasks_per_step, time.process_time()
        self._clear()

    def add(self, values: Mapping[str, float]) -> None:
        """Takes the metrics of one outer step."""
        for name, value in values.items():
            self._sums[name] += value
        self._count += 1

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """A block whose time is not training: validation, a checkpoint."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def read(self) -> dict[str, float]:
        """``train/*`` means and ``system/*`` over the steps since the last reading; one step or more."""
        seconds, cpu_seconds = (time.perf_counter() - self._since) / self._count, time.process_time() - self._used
        means = {f"train/{name}": total / self._count for name, total in self._sums.items()}
        self._used += cpu_seconds
        self._clear()
        return {
            **means,
            "system/step_seconds": seconds,
            "system/tasks_per_second": self._tasks_per_step / seconds,
            "system/cpu_seconds": cpu_seconds,
            "system/memory_mb": psutil.Process().memory_info().rss / 1e6,
        }

    def _clear(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._count, self._since = 0, time.perf_counter()
