"""Runs trials on Ray. The only import of ray.tune; knows nothing of what a trial does.

What is to be run comes from a `Plan`, what has happened goes to a `Listener`. Nothing is kept here: Ray does not keep a
scheduler's state over a restart, so whoever wants to go on with a search replays its results (`Halving.replay`), and
plans the trials that are left.
"""

import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from distmaml.errors import CheckpointError, ClusterError, DistmamlError, RunError, first_line

log = logging.getLogger("distmaml")

# Ray Tune's own settings. What the user has set stays.
_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard files that nobody reads
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails has no metric
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's snapshots, from which nothing is restored
    "TUNE_WARN_THRESHOLD_S": "30",
    "RAY_AIR_NEW_OUTPUT": "0",
}
TIME = "step"
"""The metric that says how far a trial is."""
_REASON = "distmaml_reason"
_MAY_PASS = (RuntimeError, OSError, MemoryError, RunError, CheckpointError, ClusterError)
"""Of a disk, a network, a GPU."""
_WORST = 1e100
"""Stands for what is not finite where trials are compared: Ray would let NaN pass all rungs."""

Ending: TypeAlias = Literal["finished", "pruned", "failed", "lost"]
"""What failed would only fail again; what was lost may do better another time."""
Report: TypeAlias = Callable[[Mapping[str, float]], None]


class Trial(NamedTuple):
    """One configuration to be tried."""

    number: int
    """From 0, in the order in which they were planned."""
    values: dict[str, Any]
    """What is particular about it."""
    step: int = 0
    """How far it is known to be."""


class Plan(Protocol):
    """Which trials are left to run."""

    @property
    def num_left(self) -> int:
        """How many `next` will give."""
        ...

    def next(self) -> Trial:
        """The next one; its values may depend on what the listener has heard by now."""
        ...


class Listener(Protocol):
    """Hears what happens, in the process that called `search`."""

    def started(self, trial: Trial) -> None: ...
    def reported(self, trial: Trial, metrics: Mapping[str, float]) -> None: ...
    def ended(self, trial: Trial, how: Ending, reason: str | None) -> None: ...


class Halving(NamedTuple):
    """Asynchronous successive halving (Li et al., 2020, https://arxiv.org/abs/1810.05934), by early stopping.

    Rungs lie at ``first * factor ** i`` steps. A trial that reaches one goes on if it is among the best ``1 / factor``
    of those that have reached it before.

    Attributes:
      first: steps of the lowest rung.
      most: steps of a whole trial.
      factor: how many times fewer trials each rung lets through.
      replay: (trial number, step, value of the metric) of an earlier part of the search, in the order they came.
    """

    first: int
    most: int
    factor: int
    replay: tuple[tuple[int, int, float], ...] = ()


def search(
    function: Callable[[Trial, Report], None],
    plan: Plan,
    listener: Listener,
    *,
    halving: Halving | None,
    until: int | None,
    metric: str,
    mode: Literal["max", "min"],
    max_concurrent: int,
    resources: Mapping[str, float],
    max_failures: int,
    storage_path: Path,
    name: str,
) -> None:
    """Runs ``function(trial, report)`` for every trial of the plan, on processes of the cluster, until there is none.

    A trial whose process dies is started again, up to `max_failures` times, and then is lost; the function finds its
    own way back. An error that would only come again, a divergence or a mistake in the code, fails the trial at once,
    and not the search.

    Args:
      function: calls ``report(metrics)`` now and then, with how far it is under `TIME`; may be stopped in any of them.
      until: how far trials go before they are stopped; None where they end by themselves.
      resources: of each trial: ``{"CPU": 1}``.
      storage_path: what Ray Tune must know of the search while it runs; removed at the end.

    Raises:
      ClusterError: Ray Tune itself failed.
      Exception: whatever the listener raises.
    """
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from ray import tune
    from ray.tune.error import TuneError

    def trial(config: dict[str, Any]) -> None:
        _run_one(function, Trial(**config))

    scheduler = None if halving is None else _asha(halving, metric, mode)
    told = _told(listener, scheduler)
    tuner = tune.Tuner(
        tune.with_resources(trial, dict(resources)),
        tune_config=tune.TuneConfig(
            search_alg=_planned(plan, told.trials),
            scheduler=scheduler,
            num_samples=plan.num_left,
            max_concurrent_trials=max_concurrent,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(storage_path),
            stop=_stopper(until, told),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=max_failures),
            callbacks=[told],
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    try:
        tuner.fit()
    except TuneError as error:
        raise ClusterError(f"Ray Tune failed: {str(error).strip().splitlines()[-1]}.") from error
    finally:
        shutil.rmtree(storage_path, ignore_errors=True)
    if told.error is not None:
        raise told.error


def _run_one(function: Callable[[Trial, Report], None], trial: Trial) -> None:
    from ray import tune

    sys.unraisablehook = _without_exits
    log.setLevel(logging.ERROR)  # what is to be said of all trials, the process that called `search` says
    try:
        function(trial, lambda metrics: tune.report(dict(metrics)))
    except _MAY_PASS:
        raise
    except Exception as error:
        tune.report({_REASON: _in_short(error)})


def _without_exits(caught: Any) -> None:
    """Says nothing where Ray's SIGTERM, by which it stops a trial, comes upon a finalizer."""
    if not isinstance(caught.exc_value, SystemExit):
        sys.__unraisablehook__(caught)


def forwarding() -> Any:
    """A callback for the Ray Train run inside a trial, which passes on what its workers report."""
    from ray.tune.integration.ray_train import TuneReportCallback

    return TuneReportCallback()


# ------------------------------------------------------------------------------------------- Tune's side


def _planned(plan: Plan, trials: dict[str, Trial]) -> Any:
    from ray.tune.search import Searcher

    class Planned(Searcher):  # type: ignore[misc, unused-ignore]
        """A plan as Tune wants it."""

        def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
            return True  # which Tune asks for, and a plan has no use for

        def suggest(self, trial_id: str) -> dict[str, Any]:
            trials[trial_id] = plan.next()
            return trials[trial_id]._asdict()

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            pass  # the listener hears it

        def save(self, checkpoint_path: str) -> None:
            pass  # nothing is restored from Tune's snapshots

    return Planned()


def _asha(halving: Halving, metric: str, mode: str) -> Any:
    from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

    class Asha(AsyncHyperBandScheduler):  # type: ignore[misc, unused-ignore]
        """Tune's, by trial number instead of Tune's identifiers, which are others after a restart."""

        def __init__(self) -> None:
            # A trial that reaches `most` ends by itself: Tune would not let it come to its end.
            super().__init__(TIME, metric, mode, halving.most, halving.first, halving.factor, stop_last_trials=False)
            self.pruned: set[int] = set()
            for number, step, value in halving.replay:
                self._judge(number, step, value)

        def _judge(self, number: int, step: int, value: float) -> Any:
            if step >= halving.most:
                return TrialScheduler.CONTINUE
            worth = self._metric_op * value if math.isfinite(value) else -_WORST
            decision = self._brackets[0].on_result(SimpleNamespace(trial_id=number), step, worth)
            if decision == TrialScheduler.STOP:
                self.pruned.add(number)
            return decision

        def on_trial_add(self, controller: Any, trial: Any) -> None:
            pass  # there is one bracket for all

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> Any:
            if metric not in result:  # it failed, and only says why
                return TrialScheduler.CONTINUE
            return self._judge(trial.config["number"], result[TIME], result[metric])

        def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
            pass  # its result has been seen

        def on_trial_remove(self, controller: Any, trial: Any) -> None:
            pass

    return Asha()


def pruned(halving: Halving, metric: str, mode: Literal["max", "min"]) -> frozenset[int]:
    """The numbers of the trials that are to end where the replay leaves them."""
    return frozenset(_asha(halving, metric, mode).pruned)


def _stopper(until: int | None, told: Any) -> Any:
    from ray.tune import Stopper
    from ray.tune.stopper import NoopStopper

    class Stop(Stopper):  # type: ignore[misc, unused-ignore]
        """Ends trials that have come far enough, and all once the listener has failed."""

        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return until is not None and result.get(TIME, 0) >= until

        def stop_all(self) -> bool:
            return told.error is not None

        def __reduce__(self) -> Any:
            return NoopStopper, ()  # into Tune's snapshot, from which nothing is restored

    return Stop()


def _told(listener: Listener, scheduler: Any) -> Any:
    from ray.tune import Callback

    class Told(Callback):  # type: ignore[misc, unused-ignore]
        """A listener as Tune wants it: Tune would take an error of the listener for one of the trial."""

        def __init__(self) -> None:
            self.trials: dict[str, Trial] = {}
            self.error: Exception | None = None
            self._reasons: dict[str, str] = {}
            self._started: set[str] = set()

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            if trial.trial_id not in self._started:  # and not again after a failure
                self._started.add(trial.trial_id)
                self._tell(listener.started, self.trials[trial.trial_id])

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
            if _REASON in result:
                self._reasons[trial.trial_id] = result[_REASON]
            else:
                numbers = {k: float(v) for k, v in result.items() if "/" in k or k == TIME}
                self._tell(listener.reported, self.trials[trial.trial_id], numbers)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            known, reason = self.trials[trial.trial_id], self._reasons.get(trial.trial_id)
            stopped = scheduler is not None and known.number in scheduler.pruned
            self._tell(listener.ended, known, "failed" if reason else "pruned" if stopped else "finished", reason)

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self.on_trial_start(iteration, trials, trial)  # its process may never have come to be
            self._tell(listener.ended, self.trials[trial.trial_id], "lost", _in_short(trial.get_pickled_error()))

        def _tell(self, method: Callable[..., None], *arguments: Any) -> None:
            if self.error is None:
                try:
                    method(*arguments)
                except Exception as error:
                    self.error = error

    return Told()


def _in_short(error: BaseException | None) -> str:
    error = getattr(error, "cause", None) or error
    if isinstance(error, DistmamlError):
        return str(error)
    if error is None or type(error).__name__ == "ActorDiedError":
        return "its process died"
    return f"{type(error).__name__}: {first_line(error)}"
