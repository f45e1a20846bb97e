"""What Ray Train's controller does not look after: which failures are tried again, how often, and how long it waits.

The callbacks below live in the controller's process. What they raise ends a run, where an error of a worker would start
all of them again. Knows nothing of what the workers do.
"""

import contextlib
import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distmaml.errors import ClusterError, DistmamlError, first_line

log = logging.getLogger("distmaml")

_LOOK_SECONDS = 1.0
_TELL_SECONDS = 10.0


@dataclass
class _Going:
    """The nodes that have said that they go, by those whose end has been forgiven."""

    known: set[str] = field(default_factory=set)
    forgiven: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Limits:
    """When a run ends.

    Attributes:
      num_workers: the least that must find room.
      gpus_per_worker: of each of them.
      max_failures: of worker groups, of those that are left.
      allowed_failures: of worker groups, of the whole run: the number that is told.
      node_timeout: seconds without room.
    """

    num_workers: int
    gpus_per_worker: float
    max_failures: int
    allowed_failures: int
    node_timeout: float


def callbacks(limits: Limits, before_resize: Callable[[], object] | None) -> list[Any]:
    """Ray Train's callbacks for a run with these limits.

    Args:
      before_resize: called before workers that train are stopped to make room for more.
    """
    from ray.train import ControllerError, UserCallback
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2._internal.execution.controller import state

    waiting = (state.InitializingState, state.SchedulingState, state.RestartingState, state.ReschedulingState)
    going = _Going()

    class AfterFailures(UserCallback):  # type: ignore[misc, unused-ignore]
        """Says which failures of workers are tried again."""

        def __init__(self) -> None:
            self._failures, self._going = 0, going

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            error = min(worker_exceptions.values(), key=kind)
            # Any other type of error would be logged with its traceback.
            if kind(error) in (Kind.ON_PURPOSE, Kind.MISTAKE):
                raise ControllerError(error)
            # Ray Train counts what the survivors of a node say as a failure, also where the node had said that it goes.
            if self._going.known - self._going.forgiven:
                self._going.forgiven |= self._going.known
                log.warning("A node has gone, as it had said; all start from the last checkpoint.")
                return
            self._failures += 1
            if self._failures > limits.max_failures:
                raise ControllerError(failed_too_often(limits.allowed_failures, error))
            log.warning("A worker failed (%s); all start from the last checkpoint.", in_short(error))

    class BetweenGroups(ControllerCallback):  # type: ignore[misc, unused-ignore]
        """Looks at every turn of the controller how long there have been no workers, and which nodes will go.

        Between turns it cannot look: a worker that is stopped while it starts is waited for without end.
        """

        def __init__(self) -> None:
            self._going = going
            self._since: float | None = None
            self._looked, self._told = 0.0, False
            self._starts_failed = 0

        def after_controller_state_update(self, previous: Any, current: Any) -> None:
            if isinstance(current, state.ResizingState) and before_resize is not None:
                before_resize()
            look = time.monotonic() - self._looked > _LOOK_SECONDS
            self._looked = time.monotonic() if look else self._looked
            if look:
                self._going.known |= draining_nodes()
            if not isinstance(current, waiting):
                self._since, self._told = None, False
                return
            self._since = self._since or time.monotonic()
            if look:
                _look_at_nodes()
            if isinstance(previous, type(current)):
                time.sleep(0.2)  # an elastic run that waits for nodes would ask for them without a pause
            self._count_starts(current)
            seconds = time.monotonic() - self._since
            if seconds > limits.node_timeout:
                raise ClusterError(
                    f"for {limits.node_timeout:g} s {_no_room(limits)}. Add nodes, lower --num-workers, or wait longer "
                    "by --node-timeout."
                )
            if seconds > _TELL_SECONDS and not self._told:
                log.warning("So far %s; waiting for up to %g s.", _no_room(limits), limits.node_timeout)
                self._told = True

        def _count_starts(self, current: Any) -> None:
            failure = getattr(getattr(current, "training_failed_error", None), "controller_failure", None)
            if isinstance(current, state.ReschedulingState) and isinstance(failure, WorkerGroupStartupFailedError):
                self._starts_failed += 1
                if self._starts_failed > limits.max_failures:
                    raise failed_too_often(limits.allowed_failures, failure.__cause__ or failure)

    return [AfterFailures(), BetweenGroups()]


def draining_nodes() -> set[str]:
    """The nodes that have been told to go."""
    from ray._private.state import state  # holds a connection, so nothing that is sent to another process may hold it

    with contextlib.suppress(Exception):  # the head may be away for a moment, and training does not need it
        return set(state.get_draining_nodes())
    return set()


def coordinator() -> Any:
    """Ray's own actor that knows who wants what of the cluster; where it is not there, it is on its way now."""
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    return get_or_create_autoscaling_coordinator()


def _look_at_nodes() -> None:
    """Lets Ray look which nodes there are. By itself it does so every 20 s, and would wait for one that is gone."""
    import ray

    with contextlib.suppress(Exception):  # without it all is as Ray has it
        ray.get(coordinator().get_reserved_resources.remote("", recompute=True), timeout=5)


def withdraw_request(run_id: str) -> None:
    """Takes back what a run asked of the cluster; for 180 s Ray would keep it for a run that has been stopped."""
    import ray

    with contextlib.suppress(Exception):  # then it is kept
        ray.get(coordinator().cancel_request.remote(f"train-{run_id}"), timeout=2)


# ------------------------------------------------------------------------------------------------ failures


class Kind(enum.IntEnum):
    """What an error of a worker tells, the most telling first."""

    ON_PURPOSE = 0
    MISTAKE = 1
    DEATH = 2
    CONSEQUENCE = 3
    """RuntimeError and OSError are what the survivors get from their collectives; what raises them is tried again."""


def kind(error: BaseException) -> Kind:
    """What an error tells."""
    if isinstance(error, DistmamlError):
        return Kind.ON_PURPOSE
    if is_of_ray(error):
        return Kind.DEATH
    return Kind.CONSEQUENCE if isinstance(error, RuntimeError | OSError | MemoryError) else Kind.MISTAKE


def is_of_ray(error: object) -> bool:
    """Whether Ray raised it, and no code of ours or of the user's."""
    return type(error).__module__.partition(".")[0] == "ray"


def cause(error: BaseException) -> BaseException:
    """The most telling of the errors of a worker group."""
    failures = getattr(error, "worker_failures", {})
    return min(failures.values(), key=kind) if failures else getattr(error, "controller_failure", error)


def failed_too_often(max_failures: int, error: BaseException) -> ClusterError:
    """The end of a run whose workers keep failing."""
    return ClusterError(f"the workers failed more than {max_failures} times; the last error was: {in_short(error)}.")


def in_short(error: BaseException) -> str:
    """An error in one line."""
    if type(error).__name__ in ("WorkerHealthCheckFailedError", "ActorDiedError"):
        return "its process died"
    return f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__


def _no_room(limits: Limits) -> str:
    import ray

    kinds = ("CPU", "GPU") if limits.gpus_per_worker else ("CPU",)
    needed = {"CPU": float(limits.num_workers), "GPU": limits.num_workers * limits.gpus_per_worker}
    wants, has, free = (
        " and ".join(f"{amounts.get(kind, 0.0):g} {kind}" for kind in kinds)
        for amounts in (needed, ray.cluster_resources(), ray.available_resources())
    )
    return (
        f"there was no room for {limits.num_workers} workers: they need {wants}, and the cluster has {has}, of which "
        f"{free} is free"
    )
