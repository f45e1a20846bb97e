"""What is measured while a run trains; only the clocks are not real."""

import time

import pytest

from distmaml.meter import Meter


class Clock:
    """Seconds by the wall, and those of them that are this process's own."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.wall = self.cpu = 100.0
        patch.setattr(time, "perf_counter", lambda: self.wall)
        patch.setattr(time, "process_time", lambda: self.cpu)

    def passes(self, wall: float, *, cpu: float) -> None:
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def read(meter: Meter) -> dict[str, float]:
    found = meter.read()
    assert found.pop("system/memory_mb") > 1
    return {key.rpartition("/")[2]: value for key, value in found.items()}


def test_a_reading_has_the_means_since_the_last_one(clock: Clock) -> None:
    meter = Meter(8)
    for loss in (1.0, 2.0):
        meter.add({"query_loss": loss})
        clock.passes(2.0, cpu=1.5)
    assert read(meter) == {"query_loss": 1.5, "step_seconds": 2.0, "tasks_per_second": 4.0, "cpu_seconds": 3.0}
    meter.add({"query_loss": 7.0})
    clock.passes(1.0, cpu=0.25)
    assert read(meter) == {"query_loss": 7.0, "step_seconds": 1.0, "tasks_per_second": 8.0, "cpu_seconds": 0.25}


def test_a_validation_costs_cpu_seconds_and_does_not_slow_the_training(clock: Clock) -> None:
    meter = Meter(10)
    meter.add({})
    clock.passes(1.0, cpu=0.5)
    with meter.excluded():
        clock.passes(60.0, cpu=40.0)
    assert read(meter) == {"step_seconds": 1.0, "tasks_per_second": 10.0, "cpu_seconds": 40.5}


def test_cpu_seconds_add_up_to_what_the_process_used_until_the_last_reading(clock: Clock) -> None:
    meter, sum_of_all = Meter(1), 0.0
    for step, checkpoint in [(1.0, 0.25), (0.5, 2.0), (4.0, 8.0)]:
        meter.add({})
        clock.passes(1.0, cpu=step)
        sum_of_all += read(meter)["cpu_seconds"]
        with meter.excluded():
            clock.passes(1.0, cpu=checkpoint)
    assert sum_of_all == 1.0 + 0.25 + 0.5 + 2.0 + 4.0
