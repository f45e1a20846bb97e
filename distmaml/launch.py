"""Runs a loop on Ray workers. The only import of ray.train; knows nothing of what the loop does."""

import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from distmaml.errors import ClusterError, DistmamlError
from distmaml.worker import Worker

ConfigT = TypeVar("ConfigT")
ResultT = TypeVar("ResultT")

# Ray's own settings. What the user has set stays.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # how often the controller takes a report; 2 s by default
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "300",  # a rank that never reports would be waited for without end
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise printed lines come twice
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody asks it yet, and it logs an error at every start
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; without it Ray prints a FutureWarning
}
_WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # a worker a core: two threads in one process are worth 1.4 (Conv4, two cores)
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    # glibc gives large blocks back at every free and faults them in again; keeping them is worth 1.2 to 1.3
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
COLLECTIVE_TIMEOUT_SECONDS = 600
START_FAILURES = 3


@contextmanager
def cluster(address: str | None, *, num_cpus: int) -> Iterator[Mapping[str, float]]:
    """A connection to a Ray cluster; one is started on this machine, on loopback and with a token, where none is named.

    Args:
      address: of a running cluster; None takes $RAY_ADDRESS or starts one.
      num_cpus: logical CPUs of a cluster that is started here.

    Yields:
      What the cluster has: ``{"CPU": 2.0, "GPU": 0.0, ...}``.

    Raises:
      ClusterError: nothing answers at the address, or it wants another token.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    found = address or os.environ.get("RAY_ADDRESS")
    if not found:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # all ports on 127.0.0.1 only
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if not Path("~/.ray/auth_token").expanduser().exists():
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    start: dict[str, Any] = {"address": found} if found else {"num_cpus": num_cpus, "include_dashboard": True}
    try:
        ray.init(**start, logging_level=logging.WARNING, log_to_driver=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"at {found}" if found else "on this machine"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ClusterError(
            f"no Ray cluster {where} ({reason}). Check --address and RAY_AUTH_TOKEN; leave both out to start one here."
        ) from error
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def fit(
    loop: Callable[[ConfigT, Worker], ResultT],
    config: ConfigT,
    *,
    name: str,
    storage_path: Path,
    num_workers: int,
    gpus_per_worker: float,
    max_failures: int,
) -> ResultT:
    """Runs ``loop(config, worker)`` on `num_workers` Ray Train workers and returns what rank 0 returned.

    A worker group that crashes is started again, up to `max_failures` times; the loop finds its own way back. An error
    that distmaml raises on purpose would only come again, so it ends the run at once.

    Args:
      name: of the Ray Train run.
      storage_path: where Ray Train keeps what it must know of the run.
      gpus_per_worker: 0 for CPU workers, which talk over gloo; otherwise NCCL, or gloo where workers share a GPU.

    Raises:
      DistmamlError: raised by the loop, as it was.
      ClusterError: workers that kept crashing, or that could not be started.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    _check_room(num_workers, gpus_per_worker, ray.cluster_resources())
    trainer = TorchTrainer(
        _per_worker,
        train_loop_config={"loop": loop, "config": config},
        torch_config=TorchConfig(
            backend="nccl" if gpus_per_worker >= 1 else "gloo", timeout_s=COLLECTIVE_TIMEOUT_SECONDS
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker={"CPU": 1, **({"GPU": gpus_per_worker} if gpus_per_worker else {})},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(storage_path),
            failure_config=ray.train.FailureConfig(
                max_failures=max_failures, controller_failure_limit=START_FAILURES
            ),
            worker_runtime_env={"env_vars": {**_WORKER_ENVIRONMENT, "PYTHONPATH": _python_path()}},
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            callbacks=[_stop_on_purpose()],
        ),
    )
    try:
        result: ResultT = trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        found = _on_purpose(error)
        if found is not None:
            raise found from None
        raise ClusterError(
            f"the workers failed more than {max_failures} times; the last error was: {_last_line(error)} Their checkpoints "
            "are kept: run the same command with --resume to go on."
        ) from error
    return result


def _per_worker(settings: dict[str, Any]) -> Any:
    return settings["loop"](settings["config"], RayWorker())


class RayWorker:
    """A Ray Train worker, seen from inside."""

    def __init__(self) -> None:
        import ray.train
        from ray.train.torch import get_device

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = get_device()
        handler = logging.StreamHandler(sys.stderr)
        logging.getLogger("distmaml").handlers[:] = [handler]  # not the root: Ray would log every report through it

    def report(self, metrics: Mapping[str, float]) -> None:
        """Hands metrics to Ray Train; costs a fraction of a second, so only at checkpoints."""
        import ray.train

        ray.train.report(dict(metrics))


def _stop_on_purpose() -> Any:
    from ray.train import UserCallback

    class StopOnPurpose(UserCallback):  # type: ignore[misc, unused-ignore]
        """Raised in the controller, an exception ends a run at once, where a worker's would start it again."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                found = _on_purpose(error)
                if found is not None:
                    raise found

    return StopOnPurpose()


def _on_purpose(error: BaseException | None) -> DistmamlError | None:
    """The DistmamlError in a chain of causes and of Ray's own wrappers."""
    seen: list[Any] = [error]
    for candidate in seen:
        if isinstance(candidate, DistmamlError):
            return candidate
        if isinstance(candidate, BaseException) and len(seen) < 100:
            seen += [candidate.__cause__, candidate.__context__, getattr(candidate, "cause", None)]
            seen += [getattr(candidate, "_base_exc", None), getattr(candidate, "controller_failure", None)]
            seen += list(getattr(candidate, "worker_failures", {}).values())
    return None


def _check_room(num_workers: int, gpus_per_worker: float, resources: Mapping[str, float]) -> None:
    for kind, each in (("CPU", 1.0), ("GPU", gpus_per_worker)):
        has = resources.get(kind, 0.0)
        if each * num_workers > has:
            raise ClusterError(
                f"{num_workers} workers need {each * num_workers:g} {kind}s, and the cluster has {has:g}. Lower --num-workers"
                f"{' or --gpus-per-worker' if kind == 'GPU' else ''}, or add nodes."
            )


def _python_path() -> str:
    """Workers find what the driver finds: the working directory, for a user's own modules."""
    return os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
