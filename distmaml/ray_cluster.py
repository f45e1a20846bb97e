"""A connection to a Ray cluster, or a cluster on this machine for as long as it is needed.

Knows nothing of what runs on it.
"""

import json
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from distmaml.errors import ClusterError, first_line

# Ray's own settings. What the user has set stays.
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # how often the controller takes a report; 2 s by default
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "300",  # a rank that never reports would be waited for without end
    # Of one try to find room for the workers, before the cluster is looked at again: what Ray knows of it may be old.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",  # for a process group that has lost a member; 30 s by default
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise printed lines come twice
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # the workers look themselves, see `launch.RayWorker.leaving`
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the coming default; without it Ray prints a FutureWarning
}
_LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all ports on 127.0.0.1 only
    "RAY_AUTH_MODE": "token",
    # Two processes that the driver would wait for, and nobody uses: all of ours have variables of their own.
    "RAY_prestart_worker_first_driver": "0",
}
CONNECT_SECONDS = 5.0
PROBE_SECONDS = 45.0
_LONGEST_TEMPORARY_PATH = 35  # Ray puts 65 characters behind it, and a socket's path may have 107


@contextmanager
def connect(
    address: str | None, *, num_cpus: int, environment: Mapping[str, str] | None = None
) -> Iterator[Mapping[str, float]]:
    """A connection to a Ray cluster; one is started on this machine, on loopback and with a token, where none is named.

    Handlers of SIGINT and SIGTERM stay as they were, although Ray brings its own. The files of a cluster that is
    started here lie in a folder of their own in $RAY_TMPDIR, or in /tmp; they are removed unless Ray itself has failed.

    Args:
      address: of a running cluster; None takes $RAY_ADDRESS or starts one.
      num_cpus: logical CPUs of a cluster that is started here.
      environment: variables of all processes that this connection starts, unless they bring their own.

    Yields:
      What the cluster has, or can have: ``{"CPU": 2.0, "GPU": 0.0, ...}``.

    Raises:
      ClusterError: nothing answers at the address, or it wants another token.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    found = address or os.environ.get("RAY_ADDRESS")
    if found and found != "auto":
        _check_host_and_port(found)
    options = {"runtime_env": {"env_vars": _beside_those_of_the_job(environment)}} if environment else {}
    with _connected(found, options) if found else _started(num_cpus, options) as resources:
        yield resources


def _beside_those_of_the_job(environment: Mapping[str, str]) -> dict[str, str]:
    """Without the variables that a submitted job brings: Ray refuses to hear of one twice."""
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    brought = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in environment.items() if name not in brought}


def is_local(address: str | None) -> bool:
    """Whether `connect` starts one on this machine."""
    return not (address or os.environ.get("RAY_ADDRESS"))


def check_address(address: str | None) -> None:
    """Looks whether a cluster that takes us is where one should be.

    Ray itself would wait for minutes, and print again and again what for; so a process of its own tries it first, for
    some seconds. Inside a submitted job the cluster is known to be there.

    Raises:
      ClusterError: it is no address, nothing answers there, something else does, or a cluster that wants another token
        or another version of Ray.
    """
    found = address or os.environ.get("RAY_ADDRESS")
    if not found or (address is None and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ):
        return
    if found != "auto":
        _check_host_and_port(found)
    status, said = _probe(found)
    text = " ".join(said)
    if "InvalidAuthToken" in text or "AuthenticationError" in text:
        raise ClusterError(
            f"the Ray cluster at {found} wants its token, and got none or another one. Set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH to a file that holds it (or RAY_AUTH_TOKEN)."
        )
    if "Version mismatch" in text:
        raise ClusterError(
            f"the Ray cluster at {found} has other versions than this process ({text.partition('mismatch: ')[2]}). "
            "Install the same on both."
        )
    if status < 0:
        raise ClusterError(
            f"something answers at {found}, but in {PROBE_SECONDS:g} s it took no driver from this machine. A driver "
            "runs on a node of its cluster: from elsewhere, submit it by `ray job submit`."
        )
    if status > 0:
        raise ClusterError(_no_cluster(found, said[-1] if said else "no answer"))


def _probe(address: str) -> tuple[int, list[str]]:
    """The exit status of a process that connects to a cluster, negative where it had to be killed; what it printed."""
    command = [sys.executable, "-c", _CONNECT, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        limit = threading.Timer(PROBE_SECONDS, process.kill)
        limit.daemon = True
        limit.start()
        said = []
        try:
            for line in process.stdout or ():
                said.append(line.strip())
                if "InvalidAuthToken" in line:  # which it would say once a second
                    process.kill()
                    break
        except BaseException:
            process.kill()  # its Ray has started nothing that is to be put in order
            raise
        finally:
            limit.cancel()
    return process.returncode, said


_CONNECT = """
import logging, sys
import ray
try:
    ray.init(sys.argv[1], logging_level=logging.ERROR, log_to_driver=False)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def _check_host_and_port(address: str) -> None:
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise ClusterError(
            f"address={address!r} is not that of a Ray cluster: host:port of its head, 6379 by default. To a dashboard "
            "(http://...:8265) jobs are submitted by `ray job submit`."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(_no_cluster(address, str(error))) from None


def _no_cluster(address: str, reason: str) -> str:
    return (
        f"no Ray cluster at {address} ({reason}). Check --address (host:port of its head, 6379 by default); leave it "
        "out to start a cluster on this machine."
    )


@contextmanager
def _connected(address: str, options: Mapping[str, Any]) -> Iterator[Mapping[str, float]]:
    import ray

    handlers = _signal_handlers()
    try:
        _init(f"at {address}", handlers, address=address, **options)
        with _found_by_ray_train(ray):
            yield cluster_resources()
    finally:
        _shut_down(handlers)


@contextmanager
def _started(num_cpus: int, options: Mapping[str, Any]) -> Iterator[Mapping[str, float]]:
    if "ray" not in sys.modules:  # it reads these when it is imported, and never again
        for name, value in _LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if not Path("~/.ray/auth_token").expanduser().exists():
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    folder, keep, handlers = _temporary_folder(), False, _signal_handlers()
    try:
        with _environment({"RAY_TMPDIR": str(folder)}):
            _init("on this machine", handlers, num_cpus=num_cpus, include_dashboard=True, **options)
        with _found_by_ray_train(ray):
            yield cluster_resources()
    except ClusterError as error:
        if error.__cause__ is None:
            raise
        keep = True
        raise ClusterError(f"{error} Ray's own logs are kept in {folder}.") from error.__cause__
    finally:
        _shut_down(handlers)
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def cluster_resources() -> dict[str, float]:
    """What the cluster has, or can have when its autoscaler has started all nodes that it may start."""
    import ray
    from ray._private.state import state

    now, most = ray.cluster_resources(), state.get_max_resources_from_cluster_config() or {}
    return {kind: max(now.get(kind, 0.0), most.get(kind, 0.0)) for kind in {**now, **most}}


def _found_by_ray_train(ray: Any) -> AbstractContextManager[None]:
    """Ray Train's own helpers look the cluster up by $RAY_ADDRESS, and give up where a machine has two."""
    return _environment({"RAY_ADDRESS": ray.get_runtime_context().gcs_address})


def _init(where: str, handlers: Mapping[int, Any], **options: Any) -> None:
    import ray

    try:
        ray.init(**options, logging_level=logging.WARNING, log_to_driver=True)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"no Ray cluster {where} ({first_line(error)}). Check --address and RAY_AUTH_TOKEN; leave both out to "
            "start one here."
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
