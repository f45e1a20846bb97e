"""Runs a loop on Ray workers. The only import of ray.train; knows nothing of what the loop does."""

import contextlib
import enum
import logging
import math
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from distmaml.errors import ClusterError, DistmamlError, first_line
from distmaml.ray_cluster import cluster_resources
from distmaml.worker import Worker

log = logging.getLogger("distmaml")

ConfigT = TypeVar("ConfigT")
ResultT = TypeVar("ResultT")


WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # a worker a core: two threads in one process are worth 1.4 (Conv4, two cores)
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    # glibc gives large blocks back at every free and faults them in again; keeping them is worth 1.2 to 1.3
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
RESIZE_SECONDS = 20.0
"""Between two looks of an elastic run whether there is room for more workers."""
_MOST_PREEMPTIONS = 1_000
_TRIES = 100_000
"""Ray Train's own counts reach no end: what ends a run are the counts and times that are kept here."""
_LOOK_SECONDS = 2.0
"""Between two looks whether the node of a worker has been told to go."""


def fit(
    loop: Callable[[ConfigT, Worker], ResultT],
    config: ConfigT,
    *,
    name: str,
    storage_path: Path,
    team: tuple[int, int],
    gpus_per_worker: float,
    max_failures: int,
    collective_timeout: float,
    node_timeout: float,
    before_resize: Callable[[], object] | None = None,
    callbacks: Sequence[Any] = (),
) -> ResultT:
    """Runs ``loop(config, worker)`` on Ray Train workers and returns what rank 0 returned.

    A worker group that crashes is started again, up to `max_failures` times; the loop finds its own way back. An error
    that distmaml raises on purpose would only come again, and so would a mistake in the code: they end the run at once.

    Args:
      name: of the Ray Train run.
      storage_path: what Ray Train must know of the run while it runs; removed at the end.
      team: the least and the most workers. There are as many as the cluster has room for, and another number when
        nodes come or go; all are started again then.
      gpus_per_worker: 0 for CPU workers, which talk over gloo; otherwise NCCL, or gloo where workers share a GPU.
      collective_timeout: seconds after which a worker that the others wait for is taken for hung.
      node_timeout: seconds without room for the least number of workers after which the run ends.
      before_resize: called before workers that train are stopped to make room for more.
      callbacks: Ray Train's, which hear what the workers report.

    Raises:
      DistmamlError: raised by the loop, as it was.
      ClusterError: workers that kept crashing, or that could not be started.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    least, most = team

    class Trainer(TorchTrainer):  # type: ignore[misc, unused-ignore]
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray Train would take SIGINT for itself, and exit with status 0."""

    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")  # see `ray_cluster._found_by_ray_train`
    _check_room(least, gpus_per_worker)

    def trainer(attempt: int) -> Trainer:
        return Trainer(
            _per_worker,
            train_loop_config={"loop": loop, "config": config},
            torch_config=TorchConfig(
                backend="nccl" if gpus_per_worker >= 1 else "gloo", timeout_s=math.ceil(collective_timeout)
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=most if least == most else team,
                use_gpu=gpus_per_worker > 0,
                resources_per_worker={"CPU": 1, **({"GPU": gpus_per_worker} if gpus_per_worker else {})},
                elastic_resize_monitor_interval_s=RESIZE_SECONDS,
            ),
            run_config=ray.train.RunConfig(
                name=name,
                # A controller that was killed may have left half a snapshot there, which no other could read.
                storage_path=str(storage_path / str(attempt)),
                failure_config=ray.train.FailureConfig(
                    max_failures=_TRIES, controller_failure_limit=_TRIES, max_preemption_failures=_TRIES
                ),
                worker_runtime_env={"env_vars": worker_environment()},
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),  # it warns of every crash with a traceback
                callbacks=[
                    _after_failures(max_failures - attempt),
                    _between_groups(least, gpus_per_worker, node_timeout, before_resize),
                    *callbacks,
                ],
            ),
        )

    try:
        result: ResultT = _fit(trainer, max_failures)
    finally:
        shutil.rmtree(storage_path, ignore_errors=True)
    return result


def _fit(trainer: Callable[[int], Any], max_failures: int) -> Any:
    import ray
    import ray.train

    for remaining in range(max_failures, -1, -1):
        try:
            return trainer(max_failures - remaining).fit().return_value
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            failure = getattr(error, "controller_failure", error)
            if isinstance(failure, Exception) and not _of_ray(failure):
                raise failure from None
            # Ray Train's own controller has died, or a worker in its first moments: that it does not try again itself.
            if isinstance(failure, ray.exceptions.RayError) and remaining > 0:
                log.warning("Ray Train failed (%s); it is started again.", _in_short(failure))
                continue
            raise _failed_too_often(max_failures, _cause(error)) from error
    raise AssertionError("the last round returns or raises")


# ------------------------------------------------------------------------------------- in the workers


def _per_worker(settings: dict[str, Any]) -> Any:
    try:
        return settings["loop"](settings["config"], RayWorker())
    except Exception as error:
        if not isinstance(error, DistmamlError):
            error.add_note(f"In a worker:\n{traceback.format_exc()}")  # which does not travel by itself
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # it would print the traceback of each worker
        raise


class RayWorker:
    """A Ray Train worker, seen from inside."""

    def __init__(self) -> None:
        import ray.train
        from ray.train.torch import get_device

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = get_device()
        logging.getLogger().setLevel(logging.WARNING)  # Ray Train logs every report through the root
        if self.rank > 0:
            logging.getLogger("distmaml").setLevel(logging.ERROR)  # rank 0 says it
        self._leaving = threading.Event()
        threading.Thread(target=self._watch_node, name="preemption", daemon=True).start()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Hands metrics to Ray Train; costs a fraction of a second, so only at checkpoints."""
        import ray.train

        ray.train.report(dict(metrics))

    def leaving(self) -> bool:
        """Whether this worker's node has been told to go (a spot instance, say); known some seconds after."""
        return self._leaving.is_set()

    def _watch_node(self) -> None:
        """What `ray.train.get_preemption_info` would tell; that is a barrier of 5 to 10 ms, and a process more."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        while not self._leaving.is_set():
            with contextlib.suppress(Exception):  # the head may be away for a moment, and training does not need it
                if node in _draining_nodes():
                    self._leaving.set()
            time.sleep(_LOOK_SECONDS)


# ---------------------------------------------------------------------------------------------- failures


def _after_failures(max_failures: int) -> Any:
    from ray.train import ControllerError, UserCallback

    class AfterFailures(UserCallback):  # type: ignore[misc, unused-ignore]
        """Says which failures of workers are tried again.

        Raised in the controller, an exception ends a run at once, where a worker's would start it again; as a
        ControllerError it is not logged with its traceback.
        """

        def __init__(self) -> None:
            self._failures = self._preemptions = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            error = min(worker_exceptions.values(), key=_kind)
            if _kind(error) in (_Kind.ON_PURPOSE, _Kind.MISTAKE):
                raise ControllerError(error)
            # Ray Train takes what the survivors of a node say for a failure, also where the node had said that it goes.
            if _draining_nodes() and self._preemptions < _MOST_PREEMPTIONS:
                self._preemptions += 1
                log.warning("A node has gone, as it had said; all start from the last checkpoint.")
                return
            self._failures += 1
            if self._failures > max_failures:
                raise ControllerError(_failed_too_often(max_failures, error))
            log.warning("A worker failed (%s); all start from the last checkpoint.", _in_short(error))

    return AfterFailures()


def _draining_nodes() -> dict[str, int]:
    """The nodes that have been told to go."""
    from ray._private.state import state  # holds a connection, so nothing that is sent to another process may hold it

    found: dict[str, int] = state.get_draining_nodes()
    return found


def _failed_too_often(max_failures: int, error: BaseException) -> ClusterError:
    return ClusterError(f"the workers failed more than {max_failures} times; the last error was: {_in_short(error)}.")


def _between_groups(
    num_workers: int, gpus_per_worker: float, node_timeout: float, before_resize: Callable[[], object] | None
) -> Any:
    from ray.train import ControllerError
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2._internal.execution.controller import state

    waiting = (state.InitializingState, state.SchedulingState, state.RestartingState, state.ReschedulingState)

    class BetweenGroups(ControllerCallback):  # type: ignore[misc, unused-ignore]
        """What the controller does not look after when there are no workers, or other ones are to come.

        It would wait for ever where a node is gone and none comes.
        """

        def __init__(self) -> None:
            self._since: float | None = None

        def after_controller_state_update(self, previous: Any, current: Any) -> None:
            if isinstance(current, state.ResizingState) and before_resize is not None:
                before_resize()
            if not isinstance(current, waiting):
                self._since = None
                return
            self._since = self._since or time.monotonic()
            if time.monotonic() - self._since > node_timeout:
                wants, has, free = _wanted_and_there(num_workers, gpus_per_worker)
                raise ControllerError(
                    ClusterError(
                        f"for {node_timeout:g} s there was no room for {num_workers} workers: they need {wants}, and "
                        f"the cluster has {has}, of which {free} are free. Add nodes, lower --num-workers, or wait "
                        "longer by --node-timeout."
                    )
                )

    return BetweenGroups()


class _Kind(enum.IntEnum):
    """What an error of a worker tells, the most telling first."""

    ON_PURPOSE = 0
    MISTAKE = 1
    DEATH = 2
    CONSEQUENCE = 3
    """RuntimeError and OSError are what the survivors get from their collectives; what raises them is tried again."""


def _kind(error: BaseException) -> _Kind:
    if isinstance(error, DistmamlError):
        return _Kind.ON_PURPOSE
    if _of_ray(error):
        return _Kind.DEATH
    return _Kind.CONSEQUENCE if isinstance(error, RuntimeError | OSError | MemoryError) else _Kind.MISTAKE


def _cause(error: BaseException) -> BaseException:
    """The most telling of the errors of a worker group."""
    failures = getattr(error, "worker_failures", {})
    return min(failures.values(), key=_kind) if failures else getattr(error, "controller_failure", error)


def _of_ray(error: object) -> bool:
    return type(error).__module__.partition(".")[0] == "ray"


def _check_room(num_workers: int, gpus_per_worker: float) -> None:
    """Refuses what the cluster can never carry."""
    resources = cluster_resources()
    for kind, each in (("CPU", 1.0), ("GPU", gpus_per_worker)):
        has = resources.get(kind, 0.0)
        if kind == "GPU" and each and not has:
            raise ClusterError("the cluster has no GPU. Leave --use-gpu at auto, or add nodes with GPUs.")
        if each * num_workers > has:
            raise ClusterError(
                f"{num_workers} workers need {each * num_workers:g} {kind}s, and the cluster has {has:g}. Lower "
                f"--num-workers{' or --gpus-per-worker' if kind == 'GPU' else ''}, or add nodes."
            )


def _wanted_and_there(num_workers: int, gpus_per_worker: float) -> tuple[str, str, str]:
    """What workers need, what the cluster has, and what of it nobody uses, in words."""
    import ray

    kinds = ("CPU", "GPU") if gpus_per_worker else ("CPU",)
    wants = {"CPU": float(num_workers), "GPU": num_workers * gpus_per_worker}
    return tuple(  # type: ignore[return-value]
        " and ".join(f"{amounts.get(kind, 0.0):g} {kind}s" for kind in kinds)
        for amounts in (wants, ray.cluster_resources(), ray.available_resources())
    )


def worker_environment() -> dict[str, str]:
    """The variables of a process that trains. It finds what the driver finds: the user's own modules too."""
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**WORKER_ENVIRONMENT, "PYTHONPATH": path}


def _in_short(error: BaseException) -> str:
    if type(error).__name__ in ("WorkerHealthCheckFailedError", "ActorDiedError"):
        return "its process died"
    return f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
