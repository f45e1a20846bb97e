"""Runs a loop on Ray workers. The only import of ray.train; knows nothing of what the loop does."""

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from distmaml.errors import ClusterError, DistmamlError
from distmaml.worker import Worker

log = logging.getLogger("distmaml")

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
_LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all ports on 127.0.0.1 only
    "RAY_AUTH_MODE": "token",
}
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # a worker a core: two threads in one process are worth 1.4 (Conv4, two cores)
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",
    # glibc gives large blocks back at every free and faults them in again; keeping them is worth 1.2 to 1.3
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
COLLECTIVE_TIMEOUT_SECONDS = 600
START_FAILURES = 3
PROBE_SECONDS = 5.0
_LONGEST_TEMPORARY_PATH = 35  # Ray puts 65 characters behind it, and a socket's path may have 107


# --------------------------------------------------------------------------------------------- cluster


@contextmanager
def cluster(address: str | None, *, num_cpus: int) -> Iterator[Mapping[str, float]]:
    """A connection to a Ray cluster; one is started on this machine, on loopback and with a token, where none is named.

    Handlers of SIGINT and SIGTERM stay as they were, although Ray brings its own. The files of a cluster that is
    started here lie in a folder of their own in $RAY_TMPDIR, or in /tmp; they are removed unless Ray itself has failed.

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
    check_address(address)
    found = address or os.environ.get("RAY_ADDRESS")
    with _connected(found) if found else _started(num_cpus) as resources:
        yield resources


def is_local(address: str | None) -> bool:
    """Whether `cluster` starts one on this machine."""
    return not (address or os.environ.get("RAY_ADDRESS"))


def check_address(address: str | None) -> None:
    """Looks whether anything answers where a cluster should be; Ray itself waits half a minute and more for it.

    Raises:
      ClusterError: nothing does.
    """
    found = address or os.environ.get("RAY_ADDRESS") or ""
    host, _, port = found.rpartition(":")
    if "://" in found or not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster at {found} ({error}). Check --address (host:port of its head, 6379 by default); leave it "
            "out to start a cluster on this machine."
        ) from None


@contextmanager
def _connected(address: str) -> Iterator[Mapping[str, float]]:
    import ray

    handlers = _signal_handlers()
    try:
        _init(f"at {address}", handlers, address=address)
        with _found_by_ray_train(ray):
            yield ray.cluster_resources()
    finally:
        _shut_down(handlers)


@contextmanager
def _started(num_cpus: int) -> Iterator[Mapping[str, float]]:
    if "ray" not in sys.modules:  # it reads these when it is imported, and never again
        for name, value in _LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if not Path("~/.ray/auth_token").expanduser().exists():
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    folder, keep, handlers = _temporary_folder(), False, _signal_handlers()
    try:
        with _environment({"RAY_TMPDIR": str(folder)}):
            _init("on this machine", handlers, num_cpus=num_cpus, include_dashboard=True)
        with _found_by_ray_train(ray):
            yield ray.cluster_resources()
    except ClusterError as error:
        if error.__cause__ is None:
            raise
        keep = True
        raise ClusterError(f"{error} Ray's own logs are kept in {folder}.") from error.__cause__
    finally:
        _shut_down(handlers)
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _found_by_ray_train(ray: Any) -> AbstractContextManager[None]:
    """Ray Train's own helpers look the cluster up by $RAY_ADDRESS, and give up where a machine has two."""
    return _environment({"RAY_ADDRESS": ray.get_runtime_context().gcs_address})


def _init(where: str, handlers: Mapping[int, Any], **options: Any) -> None:
    import ray

    try:
        ray.init(**options, logging_level=logging.WARNING, log_to_driver=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ClusterError(
            f"no Ray cluster {where} ({reason}). Check --address and RAY_AUTH_TOKEN; leave both out to start one here."
        ) from error
    except SystemExit:  # Ray's answer to SIGTERM
        raise KeyboardInterrupt from None
    finally:
        _put_back(handlers)


def _shut_down(handlers: Mapping[int, Any]) -> None:
    """Ends Ray here. On its way it sets SIGTERM to its default, and takes seconds more: hence again and again."""
    import ray

    thread = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    thread.start()
    while thread.is_alive():
        _put_back(handlers)
        thread.join(0.02)
    _put_back(handlers)


def _signal_handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}


def _put_back(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _temporary_folder() -> Path:
    base = os.environ.get("RAY_TMPDIR")
    if base is not None:
        Path(base).mkdir(parents=True, exist_ok=True)
    elif len(tempfile.gettempdir()) > _LONGEST_TEMPORARY_PATH:
        base = "/tmp"
    return Path(tempfile.mkdtemp(prefix="dm-", dir=base))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# ------------------------------------------------------------------------------------------------- fit


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
    that distmaml raises on purpose would only come again, and so would a mistake in the code: they end the run at once.

    Args:
      name: of the Ray Train run.
      storage_path: what Ray Train must know of the run while it runs; removed at the end.
      gpus_per_worker: 0 for CPU workers, which talk over gloo; otherwise NCCL, or gloo where workers share a GPU.

    Raises:
      DistmamlError: raised by the loop, as it was.
      ClusterError: workers that kept crashing, or that could not be started.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    class Trainer(TorchTrainer):  # type: ignore[misc, unused-ignore]
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray Train would take SIGINT for itself, and exit with status 0."""

    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")  # see `_found_by_ray_train`
    _check_room(num_workers, gpus_per_worker, ray.cluster_resources())
    trainer = Trainer(
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
            failure_config=ray.train.FailureConfig(max_failures=max_failures, controller_failure_limit=START_FAILURES),
            worker_runtime_env={"env_vars": {**WORKER_ENVIRONMENT, "PYTHONPATH": _python_path()}},
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),  # it warns of every crash with a traceback
            callbacks=[_stop_on_purpose()],
        ),
    )
    try:
        result: ResultT = _fit(trainer, max_failures)
    finally:
        shutil.rmtree(storage_path, ignore_errors=True)
    return result


def _fit(trainer: Any, max_failures: int) -> Any:
    import ray
    import ray.train

    for remaining in range(max_failures, -1, -1):
        try:
            return trainer.fit().return_value
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            failure = getattr(error, "controller_failure", error)
            if isinstance(failure, Exception) and not _of_ray(failure):
                raise failure from None
            # Ray Train's own controller has died, or a worker in its first moments: that it does not try again itself.
            if isinstance(failure, ray.exceptions.RayError) and remaining > 0:
                log.warning("Ray Train failed (%s); it is started again.", _first_line(failure))
                continue
            raise ClusterError(
                f"the workers failed more than {max_failures} times; the last error was: {_first_line(_cause(error))}. "
                "Their checkpoints are kept: run the same command with --resume to go on."
            ) from error
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

    def report(self, metrics: Mapping[str, float]) -> None:
        """Hands metrics to Ray Train; costs a fraction of a second, so only at checkpoints."""
        import ray.train

        ray.train.report(dict(metrics))


# ---------------------------------------------------------------------------------------------- failures


def _stop_on_purpose() -> Any:
    from ray.train import ControllerError, UserCallback

    class StopOnPurpose(UserCallback):  # type: ignore[misc, unused-ignore]
        """Raised in the controller, an exception ends a run at once, where a worker's would start it again."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            errors = sorted(worker_exceptions.values(), key=_importance)
            if _importance(errors[0]) < 2:
                raise ControllerError(errors[0])  # any other type would be logged with its traceback
            log.warning("A worker failed (%s); all start from the last checkpoint.", _first_line(errors[0]))

    return StopOnPurpose()


def _importance(error: Exception) -> int:
    """0 for an error raised on purpose, 1 for a mistake in the code, 2 for a worker's death, 3 for what follows of it.

    RuntimeError and OSError are what the survivors get from their collectives; what else raises them is tried again.
    """
    if isinstance(error, DistmamlError):
        return 0
    if _of_ray(error):
        return 2
    return 3 if isinstance(error, RuntimeError | OSError | MemoryError) else 1


def _cause(error: BaseException) -> BaseException:
    """The most telling of the errors of a worker group."""
    failures = getattr(error, "worker_failures", {})
    return min(failures.values(), key=_importance) if failures else getattr(error, "controller_failure", error)


def _of_ray(error: object) -> bool:
    return type(error).__module__.partition(".")[0] == "ray"


def _check_room(num_workers: int, gpus_per_worker: float, resources: Mapping[str, float]) -> None:
    for kind, each in (("CPU", 1.0), ("GPU", gpus_per_worker)):
        has = resources.get(kind, 0.0)
        if kind == "GPU" and each and not has:
            raise ClusterError("the cluster has no GPU. Leave --use-gpu at auto, or add nodes with GPUs.")
        if each * num_workers > has:
            raise ClusterError(
                f"{num_workers} workers need {each * num_workers:g} {kind}s, and the cluster has {has:g}. Lower "
                f"--num-workers{' or --gpus-per-worker' if kind == 'GPU' else ''}, or add nodes."
            )


def _python_path() -> str:
    """Workers find what the driver finds: the working directory, for a user's own modules."""
    return os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])


def _first_line(error: BaseException) -> str:
    if type(error).__name__ in ("WorkerHealthCheckFailedError", "ActorDiedError"):
        return "its process died"
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
