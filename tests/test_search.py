"""What distmaml adds to Ray Tune: decisions that a restart repeats, and errors that come from where they happened."""

import math
import pickle
import random
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from distmaml import search
from distmaml.errors import ClusterError, ConfigError, RunError
from distmaml.search import Halving, Trial

HALVING = Halving(first=10, most=90, factor=3)
METRIC = "val/query_accuracy"
Mode = Literal["max", "min"]


def asha(halving: Halving = HALVING, mode: Mode = "max") -> Any:
    return search._asha(halving, METRIC, mode)


def decide(scheduler: Any, number: int, step: int, value: float) -> str:
    decision: str = scheduler.on_trial_result(
        None, SimpleNamespace(config={"number": number}), {search.TIME: step, METRIC: value}
    )
    return decision


def test_each_rung_lets_the_best_third_of_those_before_go_on() -> None:
    scheduler = asha()
    assert [decide(scheduler, n, 10, v) for n, v in enumerate([0.5, 0.9, 0.6, 0.8, 0.95])] == [
        *("CONTINUE", "CONTINUE", "STOP", "CONTINUE", "CONTINUE"),
    ]
    assert scheduler.pruned == {2}
    assert decide(scheduler, 1, 20, 0.0) == "CONTINUE"  # between two rungs
    assert decide(scheduler, 4, 30, 0.9) == "CONTINUE"
    assert decide(scheduler, 1, 30, 0.1) == "STOP"
    assert decide(scheduler, 4, 90, 0.0) == "CONTINUE"  # at its end


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_replay_stands_where_the_search_stood(mode: Mode) -> None:
    stream = random.Random(0)
    scheduler, heard = asha(mode=mode), []
    steps = dict.fromkeys(range(20), 0)
    while steps:
        number = stream.choice(list(steps))
        steps[number] += 10
        value = stream.random()
        heard.append((number, steps[number], value))
        if decide(scheduler, number, steps[number], value) == "STOP" or steps[number] == 90:
            del steps[number]
        replayed = HALVING._replace(replay=tuple(heard))
        assert search.pruned(replayed, METRIC, mode) == scheduler.pruned
    assert 5 < len(scheduler.pruned) < 20
    again = asha(HALVING._replace(replay=tuple(heard)), mode)
    assert decide(again, 99, 10, 0.5) == decide(scheduler, 99, 10, 0.5)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_is_the_worst_and_spoils_no_rung(mode: Mode, bad: float) -> None:
    scheduler = asha(mode=mode)
    good, fair = (0.9, 0.8) if mode == "max" else (0.1, 0.2)
    assert decide(scheduler, 0, 10, bad) == "CONTINUE"  # the first
    assert decide(scheduler, 1, 10, bad) == "CONTINUE"  # no worse
    assert decide(scheduler, 2, 10, good) == "CONTINUE"
    assert decide(scheduler, 3, 10, bad) == "STOP"
    assert decide(scheduler, 4, 10, fair) == "CONTINUE"
    assert decide(scheduler, 5, 10, bad) == "STOP"


def test_a_trial_that_only_says_why_it_failed_is_not_judged() -> None:
    trial = SimpleNamespace(config={"number": 0})
    assert asha().on_trial_result(None, trial, {search._REASON: "it diverged"}) == "CONTINUE"


class Heard:
    """A listener that remembers, and fails when it is told to."""

    def __init__(self, fails_at: str = "") -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._fails_at = fails_at

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> None:
            if name == self._fails_at:
                raise RunError("the disk is full")
            self.calls.append((name, *arguments))

        return call


def told(listener: Heard) -> Any:
    callback = search._told(listener, None)
    callback.trials["a"] = Trial(0, {"inner_lr": 0.1})
    return callback


def of_tune(error: BaseException | None = None) -> Any:
    return SimpleNamespace(trial_id="a", get_pickled_error=lambda: error)


def test_a_listener_hears_each_start_once_and_numbers_alone() -> None:
    listener = Heard()
    callback = told(listener)
    callback.on_trial_start(1, [], of_tune())
    callback.on_trial_start(2, [], of_tune())  # its process had died
    callback.on_trial_result(3, [], of_tune(), {search.TIME: 10, METRIC: 0.5, "date": "today", "pid": 7})
    callback.on_trial_complete(4, [], of_tune())
    trial = Trial(0, {"inner_lr": 0.1})
    assert listener.calls == [
        ("started", trial),
        ("reported", trial, {search.TIME: 10.0, METRIC: 0.5}),
        ("ended", trial, "finished", None),
    ]


def test_a_trial_whose_process_never_came_to_be_is_lost_all_the_same() -> None:
    listener = Heard()
    told(listener).on_trial_error(1, [], of_tune(ClusterError("no node has a GPU")))
    assert [call[0] for call in listener.calls] == ["started", "ended"]
    assert listener.calls[1][2:] == ("lost", "no node has a GPU")


def test_an_error_of_the_listener_ends_the_search_and_not_a_trial() -> None:
    listener = Heard(fails_at="reported")
    callback = told(listener)
    stop = search._stopper(None, callback)
    callback.on_trial_start(1, [], of_tune())
    assert not stop.stop_all()
    callback.on_trial_result(2, [], of_tune(), {search.TIME: 10, METRIC: 0.5})
    assert stop.stop_all()
    assert isinstance(callback.error, RunError)
    callback.on_trial_complete(3, [], of_tune())  # of all that are stopped now: nothing is over
    assert [call[0] for call in listener.calls] == ["started"]


def test_a_trial_that_has_come_far_enough_is_stopped() -> None:
    stop = search._stopper(20, told(Heard()))
    assert [stop("a", {search.TIME: step}) for step in (10, 20, 30)] == [False, True, True]
    assert not stop("a", {search._REASON: "it diverged"})
    pickle.dumps(stop)  # Tune does so, and complains at length where it cannot


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (None, "its process died"),
        (ConfigError("inner_lr=0"), "inner_lr=0"),
        (ValueError("one line\nand more"), "ValueError: one line"),
        (SimpleNamespace(cause=OSError("no space left")), "OSError: no space left"),
    ],
)
def test_why_a_trial_failed_is_said_in_a_line(error: Any, says: str) -> None:
    assert search._in_short(error) == says
