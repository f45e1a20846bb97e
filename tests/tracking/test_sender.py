"""Turns: one at a time, in order, and what failures do to them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distmaml.tracking import sender
from distmaml.tracking.sender import Sender


class Errand:
    """A run whose turns do as they are told.

    Args:
      do: called in each turn with its number, from 0; what it returns is what the turn returns.
    """

    def __init__(self, name: str, do: Callable[[int], float | None]) -> None:
        self.folder, self._do = Path(name), do
        self.closing, self.deadline = False, 0.0
        self.turns: list[float] = []
        self.order: list[str] = []
        """Of the turns of all runs that have this list."""
        self.failures = 0
        self.ended: bool | None = None

    def turn(self) -> float | None:
        self.turns.append(time.monotonic())
        self.order.append(self.folder.name)
        return self._do(len(self.turns) - 1)

    def failed(self, error: Exception) -> str:
        self.failures += 1
        return str(error)

    def over(self, drained: bool) -> None:
        self.ended = drained


@pytest.fixture
def courier(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sender]:
    monkeypatch.setattr(sender, "SECONDS_A_TURN", 0.0)
    started = Sender("http://mlflow")
    yield started
    with started._changed:
        for run in started._due:
            run.closing = True
            run.deadline = 0.0
            started._due[run] = 0.0
        started._changed.notify_all()
    assert started.settle(10.0)


def until(condition: Callable[[], object], *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def leaving(errand: Errand, again: float) -> Callable[[int], float | None]:
    """A turn that has nothing to send."""
    return lambda _: None if errand.closing else again


def idle(name: str, again: float = 0.01) -> Errand:
    """A run that looks again and again, and finds nothing."""
    errand = Errand(name, lambda _: again)
    errand._do = leaving(errand, again)
    return errand


def busy(name: str) -> Errand:
    """A run that always has more."""
    errand = Errand(name, lambda _: 0.0)

    def do(_: int) -> float | None:
        time.sleep(0.002)
        return None if errand.closing else 0.0

    errand._do = do
    return errand


@contextmanager
def held(courier: Sender) -> Iterator[None]:
    """A block during which another run has its turn."""
    begun, go_on = threading.Event(), threading.Event()

    def do(_: int) -> float | None:
        begun.set()
        go_on.wait(10)
        return 0.0

    holder = Errand("holder", do)
    courier.add(holder)
    begun.wait(10)
    yield
    holder._do = lambda _: None
    courier.close(holder, 10.0)
    go_on.set()
    until(lambda: holder.ended)


def test_one_turn_at_a_time_and_one_thread_for_all(courier: Sender) -> None:
    at_once: list[int] = []
    inside = [0]

    def do(_: int) -> float | None:
        inside[0] += 1
        at_once.append(inside[0])
        time.sleep(0.001)
        inside[0] -= 1
        return 0.001

    before = threading.active_count()
    errands = [Errand(f"run-{number}", do) for number in range(50)]
    for errand in errands:
        courier.add(errand)
    until(lambda: all(len(errand.turns) >= 2 for errand in errands))
    assert threading.active_count() == before + 1
    assert set(at_once) == {1}
    for errand in errands:
        errand._do = lambda _: None


def test_turns_go_round(courier: Sender) -> None:
    errands = [busy(f"run-{number}") for number in range(5)]
    for errand in errands:
        courier.add(errand)
    until(lambda: len(errands[-1].turns) >= 20)
    counts = [len(errand.turns) for errand in errands]
    assert max(counts) - min(counts) <= 1


def test_a_run_that_is_over_goes_before_the_others_and_leaves_with_all_its_turns(courier: Sender) -> None:
    order: list[str] = []
    others = [busy(f"run-{number}") for number in range(20)]
    last = Errand("last", lambda turn: 0.0 if turn < 5 else None)
    with held(courier):
        for errand in (*others, last):
            errand.order = order
            courier.add(errand)
        courier.close(last, 10.0)
    until(lambda: last.ended)
    assert order[:6] == ["last"] * 6
    assert len(last.turns) == 6


def test_what_is_woken_does_not_wait_for_its_time(courier: Sender) -> None:
    sleeper = idle("sleeper", again=60.0)
    courier.add(sleeper)
    until(lambda: len(sleeper.turns) == 1)
    courier.wake(sleeper)
    until(lambda: len(sleeper.turns) == 2)


def test_a_run_that_is_woken_in_its_turn_has_another(courier: Sender) -> None:
    """Or what it was told just behind the look at its folder would wait."""
    begun, go_on = threading.Event(), threading.Event()

    def do(turn: int) -> float | None:
        if turn == 0:
            begun.set()
            go_on.wait(10)
        return None if errand.closing else 60.0

    errand = Errand("run", do)
    courier.add(errand)
    begun.wait(10)
    courier.wake(errand)
    go_on.set()
    until(lambda: len(errand.turns) == 2)


def test_with_many_runs_each_has_its_turn_the_rarer(monkeypatch: pytest.MonkeyPatch, courier: Sender) -> None:
    monkeypatch.setattr(sender, "SECONDS_A_TURN", 0.01)
    errands = [idle(f"run-{number}", again=0.001) for number in range(40)]
    with held(courier):
        for errand in errands:
            courier.add(errand)
    until(lambda: all(len(errand.turns) >= 2 for errand in errands))
    gaps = [errand.turns[1] - errand.turns[0] for errand in errands]
    assert min(gaps) >= 0.01 * len(errands)


def test_while_mlflow_is_away_the_others_are_not_tried_soon_and_it_is_said_once(
    courier: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    away, all_are_there = [True], threading.Event()

    def do(_: int) -> float | None:
        all_are_there.wait()  # one that comes later makes it try at once
        if away[0]:
            raise OSError("connection refused")
        return 0.01

    errands = [Errand(f"run-{number}", do) for number in range(20)]
    for errand in errands:
        courier.add(errand)
    all_are_there.set()
    time.sleep(1.5)
    tried = sum(len(errand.turns) for errand in errands)
    assert 1 <= tried <= 3  # at once, and a second later
    assert sum(errand.failures for errand in errands) == tried
    away[0] = False
    until(lambda: all(len(errand.turns) >= 2 for errand in errands))
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(" at ")[0] for text in said] == ["Cannot write to MLflow", "MLflow"]
    assert "connection refused" in said[0]
    assert said[1].endswith("is back.")
    for errand in errands:
        errand._do = lambda _: None


def test_an_outage_is_told_of_again_once_those_that_met_the_last_one_have_left(
    courier: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: int) -> float | None:
        raise OSError("connection refused")

    for name in ("first", "second"):
        errand = Errand(name, fails)
        courier.add(errand)
        courier.close(errand, 0.0)
        assert courier.settle(10.0)
        assert errand.ended is False
    assert [record.args[2] for record in caplog.records if record.args] == [Path("first"), Path("second")]  # type: ignore[index]


def test_a_run_with_a_trouble_of_its_own_does_not_stop_the_others(
    courier: Sender, caplog: pytest.LogCaptureFixture
) -> None:
    def deleted(_: int) -> float | None:
        raise ValueError("the run has been deleted")

    bad, good = Errand("bad", deleted), idle("good")
    courier.add(bad)
    courier.add(good)
    until(lambda: len(good.turns) >= 100 and bad.failures >= 2)
    assert len([record for record in caplog.records if "bad" in record.getMessage()]) == 1


def test_a_run_that_is_over_tries_until_its_deadline_and_no_longer(courier: Sender) -> None:
    def fails(_: int) -> float | None:
        raise OSError("connection refused")

    errand = Errand("run", fails)
    courier.add(errand)
    until(lambda: errand.failures)
    begun = time.monotonic()
    courier.close(errand, 1.5)
    until(lambda: errand.ended is not None)
    assert errand.ended is False
    assert 1.0 < time.monotonic() - begun < 2.5
    assert errand.failures >= 3


def test_settling_waits_for_all_that_are_over_and_for_no_others(courier: Sender) -> None:
    staying = idle("staying")
    courier.add(staying)
    errands = [Errand(f"run-{number}", lambda turn: 0.0 if turn < 3 else None) for number in range(10)]
    for errand in errands:
        courier.add(errand)
        courier.close(errand, 10.0)
    assert courier.settle(10.0)
    assert all(errand.ended for errand in errands)
    assert staying.ended is None


def test_settling_says_when_time_was_too_short(courier: Sender) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def do(_: int) -> float | None:
        begun.set()
        go_on.wait(10)
        return None

    errand = Errand("slow", do)
    courier.add(errand)
    begun.wait(10)
    courier.close(errand, 10.0)
    assert not courier.settle(0.05)
    go_on.set()
    assert courier.settle(10.0)


def test_the_thread_ends_with_the_last_run_and_begins_with_the_next(courier: Sender) -> None:
    for name in ("first", "second"):
        before = threading.active_count()
        errand = idle(name)
        courier.add(errand)
        until(lambda errand=errand: errand.turns)  # type: ignore[misc]
        assert threading.active_count() == before + 1
        courier.close(errand, 10.0)
        until(lambda errand=errand: errand.ended)  # type: ignore[misc]
        until(lambda before=before: threading.active_count() == before)  # type: ignore[misc]
