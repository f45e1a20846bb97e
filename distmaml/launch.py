"""Runs a loop on Ray workers. The only import of ray.train; knows nothing of what the loop does."""

import contextlib
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

from distmaml import supervisor
from distmaml.errors import ClusterError, DistmamlError
from distmaml.ray_cluster import cluster_resources
from distmaml.worker import Worker

log = logging.getLogger("distmaml")

ConfigT = TypeVar("ConfigT")
ResultT = TypeVar("ResultT")


WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # a worker a core: two threads in one process are worth 1.4 (Conv4, two cores)
    # glibc gives large blocks back at every free and faults them in again; keeping them is worth 1.2 to 1.3
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    # The training loop is not in a worker's first thread, and arenas of others give back whatever the thresholds say
    "MALLOC_ARENA_MAX": "1",
    # What is new is faulted in by 2 MiB, where the kernel gives such pages to those who ask: worth 1.1 to 1.2
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
RESIZE_SECONDS = 20.0
"""Between two looks of an elastic run whether there is room for more workers."""
_TRIES = 100_000
"""Ray Train's own counts reach no end: what ends a run are the counts and times that `supervisor` keeps."""
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
    from ray import cloudpickle
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    least, most = team

    class Trainer(TorchTrainer):  # type: ignore[misc, unused-ignore]
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray Train would take SIGINT for itself, and exit with status 0."""

    # See `ray_cluster._found_by_ray_train`; and how long the controller waits for workers that hang.
    ENV_VARS_TO_PROPAGATE.update(["RAY_ADDRESS", "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"])
    _check_room(least, gpus_per_worker)
    with contextlib.suppress(Exception):  # what Ray Train's controller would start, and wait for, starts beside it
        supervisor.coordinator()
    packed = cloudpickle.dumps((loop, config))

    def trainer(attempt: int) -> Trainer:
        return Trainer(
            _per_worker,
            # Packed, or Ray Train's controller would unpack it too, and import all that the loop does.
            train_loop_config={"packed": packed},
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
                # It shows every crash, and every try in vain to place workers, with a traceback; `supervisor` says it.
                logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
                callbacks=[
                    *supervisor.callbacks(
                        supervisor.Limits(least, gpus_per_worker, max_failures - attempt, max_failures, node_timeout),
                        before_resize if least < most else None,
                    ),
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

    for attempt in range(max_failures + 1):
        started = trainer(attempt)
        try:
            return started.fit().return_value
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            failure = getattr(error, "controller_failure", error)
            if isinstance(failure, Exception) and not supervisor.is_of_ray(failure):
                raise failure from None
            # Ray Train's own controller has died, or a worker in its first moments: that it does not try again itself.
            if isinstance(failure, ray.exceptions.RayError) and attempt < max_failures:
                log.warning("Ray Train failed (%s); it is started again.", supervisor.in_short(failure))
                continue
            raise supervisor.failed_too_often(max_failures, supervisor.cause(error)) from error
        finally:
            supervisor.withdraw_request(started.train_run_context.run_id)
    raise AssertionError("the last round returns or raises")


# ------------------------------------------------------------------------------------- in the workers


def _per_worker(settings: dict[str, Any]) -> Any:
    from ray import cloudpickle

    try:
        loop, config = cloudpickle.loads(settings["packed"])
        return loop(config, RayWorker())
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
            if node in supervisor.draining_nodes():
                self._leaving.set()
            time.sleep(_LOOK_SECONDS)


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


def worker_environment() -> dict[str, str]:
    """The variables of a process that trains. It finds what the driver finds: the user's own modules too."""
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**WORKER_ENVIRONMENT, "PYTHONPATH": path}
