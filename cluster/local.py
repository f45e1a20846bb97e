"""A Ray cluster of several nodes and an MLflow server on this machine: on loopback only, behind a token of their own.

`up` starts a process that holds them all, and prints what a shell needs to submit jobs; `add` adds a node, and `down`
ends them all; `status` says what there is. Ray's own `ray start --address` refuses to join a cluster that keeps to
loopback, hence the process.
"""

import contextlib
import itertools
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import tyro

MARK = "DISTMAML_LOCAL_CLUSTER"
"""In the environment of every process of a cluster: its folder."""
START_SECONDS = 180
STOP_SECONDS = 30
HEALTH = {  # of nodes, as Ray's head looks after it: a dead one is known after 3 s instead of 13
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


class Failed(Exception):  # noqa: N818 (what a command says)
    """Why a command did not do what it should."""


# ------------------------------------------------------------------------------------------------ commands


def up(
    num_nodes: int = 2,
    cpus_per_node: int = 1,
    dashboard_port: int = 8265,
    mlflow_port: int = 5000,
    folder: Path | None = None,
) -> None:
    """Start the cluster: a head without CPUs for jobs, some nodes, an MLflow server.

    Args:
      num_nodes: nodes beside the head.
      cpus_per_node: CPUs of each, and so workers.
      dashboard_port: where jobs are submitted to.
      mlflow_port: of the MLflow server.
      folder: for its state. Default: $DISTMAML_HOME/cluster, else ~/distmaml/cluster.
    """
    folder = _folder(folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if _processes(folder):
        raise Failed(f"a cluster runs already, from {folder}: cluster/local.sh status, or down.")
    _remove_leftovers(folder)
    for port, option in ((dashboard_port, "--dashboard-port"), (mlflow_port, "--mlflow-port")):
        if port and _in_use(port):
            raise Failed(f"port {port} is in use. Take another one by {option}; 0 takes any.")
    _new_token(folder)
    command = ["serve", "--num-nodes", num_nodes, "--cpus-per-node", cpus_per_node, "--folder", folder]
    command += ["--dashboard-port", dashboard_port or _free_port(), "--mlflow-port", mlflow_port or _free_port()]
    temporary = Path(tempfile.mkdtemp(prefix="dm-", dir="/tmp"))  # a socket's path may have 107 characters
    (folder / "temporary").write_text(str(temporary))
    with (folder / "cluster.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, *map(str, command)],
            env=_environment(folder, temporary),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while not _state_file(folder).exists():
        if process.poll() is not None or time.monotonic() > deadline:
            _end(folder)
            raise Failed(f"the cluster did not start; {folder / 'cluster.log'} says why.")
        time.sleep(0.2)
    _say(folder)


def status(folder: Path | None = None) -> None:
    """Say how many nodes live, and what a shell needs to use them.

    Args:
      folder: for its state. Default: $DISTMAML_HOME/cluster, else ~/distmaml/cluster.
    """
    folder = _folder(folder)
    _holder(folder)
    _say(folder)


def add(folder: Path | None = None) -> None:
    """Add a node, as large as the others.

    Args:
      folder: for the cluster's state. Default: $DISTMAML_HOME/cluster, else ~/distmaml/cluster.
    """
    folder = _folder(folder)
    holder = _holder(folder)
    before = json.loads(_state_file(folder).read_text())["asked"]
    holder.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + START_SECONDS
    while (state := json.loads(_state_file(folder).read_text()))["asked"] == before:
        if time.monotonic() > deadline or not holder.is_running():
            raise Failed(f"no node came; {folder / 'cluster.log'} may say why.")
        time.sleep(0.1)
    if state["failure"]:
        raise Failed(f"no node came: {state['failure']}; {folder / 'cluster.log'} may say more.")


def down(folder: Path | None = None) -> None:
    """End the cluster and whatever runs on it. What jobs have written stays.

    Args:
      folder: for its state. Default: $DISTMAML_HOME/cluster, else ~/distmaml/cluster.
    """
    folder = _folder(folder)
    if not _processes(folder):
        raise Failed(f"no cluster runs from {folder}.")
    _end(folder)
    print("The cluster is down.")


def serve(num_nodes: int, cpus_per_node: int, dashboard_port: int, mlflow_port: int, folder: Path) -> None:
    """Hold the cluster until SIGTERM; `up` starts this in the background."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # what Ray sets it to later does the same
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # of `add`: waited for below
    with contextlib.ExitStack() as servers:
        mlflow = start_mlflow(folder, mlflow_port)
        servers.callback(mlflow.terminate)
        cluster = start_ray(dashboard_port)
        servers.callback(cluster.shutdown)
        for _ in range(num_nodes):
            add_node(cluster, cpus_per_node)
        _wait_until_ready(mlflow, mlflow_port)
        failure = None
        for asked in itertools.count():
            state = {
                "dashboard": f"http://127.0.0.1:{dashboard_port}",
                "ray": cluster.address,
                "mlflow": f"http://127.0.0.1:{mlflow_port}",
                "asked": asked,
                "failure": failure,
            }
            partial = _state_file(folder).with_suffix(".partial")
            partial.write_text(json.dumps(state))
            partial.rename(_state_file(folder))
            while signal.sigtimedwait([signal.SIGUSR1], 1.0) is None:
                if mlflow.poll() is not None:
                    raise Failed("the MLflow server has ended; its log is mlflow.log.")
            failure = None
            try:
                add_node(cluster, cpus_per_node)
            except Exception as error:  # the others go on
                failure = f"{type(error).__name__}: {error}"


# ------------------------------------------------------------------------------------------------- servers


def start_ray(dashboard_port: int) -> Any:
    """A head, as `ray.cluster_utils.Cluster`, in the environment that `_environment` describes."""
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": dashboard_port,
        "dashboard_agent_listen_port": _free_port(),  # the usual one is that of any other Ray on this machine
    }  # fmt: skip
    return Cluster(initialize_head=True, head_node_args=head)


def add_node(cluster: Any, num_cpus: int) -> Any:
    """One more node. Each has a folder of its own for what jobs upload, as nodes of different machines have."""
    return cluster.add_node(num_cpus=num_cpus, runtime_env_dir_name=f"runtime_resources_{secrets.token_hex(3)}")


def start_mlflow(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """An MLflow server over a database in the folder."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "mlartifacts")]
    command += ["--allowed-hosts", f"127.0.0.1:{port},localhost:{port}"]
    settings = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with (folder / "mlflow.log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env={**os.environ, **settings}, stdout=log, stderr=log)


def _environment(folder: Path, temporary: Path) -> dict[str, str]:
    """What every process of the cluster has in its environment, and so the jobs on it.

    Args:
      temporary: a folder with a short path, for Ray's sockets and logs.
    """
    # Tokens and passwords of other things would show in every job.
    foreign = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "MLFLOW_BACKEND_STORE_URI")
    return {
        **{name: value for name, value in os.environ.items() if name not in foreign},
        **HEALTH,
        MARK: str(folder),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),  # `python` of jobs
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray's name for: all ports on 127.0.0.1
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TMPDIR": str(temporary),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def _wait_until_ready(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _in_use(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failed("the MLflow server did not start; its log is mlflow.log")
        time.sleep(0.2)


# --------------------------------------------------------------------------------------------------- state


def _folder(explicit: Path | None) -> Path:
    home = Path(os.environ.get("DISTMAML_HOME") or Path.home() / "distmaml")
    return (explicit or home / "cluster").expanduser().absolute()


def _state_file(folder: Path) -> Path:
    return folder / "cluster.json"


def _new_token(folder: Path) -> None:
    token = folder / "token"
    token.unlink(missing_ok=True)
    with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def _say(folder: Path) -> None:
    state = json.loads(_state_file(folder).read_text())
    nodes = sum(process.name() == "raylet" for process in _processes(folder)) - 1
    print(
        f"{nodes} node{'' if nodes == 1 else 's'} beside the head; dashboard {state['dashboard']}, "
        f"MLflow {state['mlflow']}\n\n"
        f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={shlex.quote(str(folder / 'token'))}\n"
        f"export RAY_API_SERVER_ADDRESS={state['dashboard']} MLFLOW_TRACKING_URI={state['mlflow']}\n"
        f"ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- \\\n"
        f"    python jobs/train.py glyphs-maml-5w1s --num-workers 2 --tracking-uri {state['mlflow']} --name first"
    )


def _processes(folder: Path) -> list[psutil.Process]:
    """All that belong to the cluster of a folder, the one that holds it first."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time())


def _holder(folder: Path) -> psutil.Process:
    """The process that holds the cluster of a folder.

    Raises:
      Failed: there is none.
    """
    for process in _processes(folder):
        with contextlib.suppress(psutil.Error):
            if "serve" in process.cmdline() and _state_file(folder).exists():
                return process
    raise Failed(f"no cluster runs from {folder}: cluster/local.sh up.")


def _end(folder: Path) -> None:
    """Ends all processes of a cluster, in order where they do it in time."""
    for process in _processes(folder)[:1]:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    while _processes(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = _processes(folder)
    for process in left:
        with contextlib.suppress(psutil.Error):  # with its node it may have gone by itself
            process.kill()
    psutil.wait_procs(left, timeout=5)
    _remove_leftovers(folder)


def _remove_leftovers(folder: Path) -> None:
    """What a cluster that is no more has left of itself, but for its logs and its database."""
    _state_file(folder).unlink(missing_ok=True)
    note = folder / "temporary"
    if note.exists():
        shutil.rmtree(note.read_text(), ignore_errors=True)
        note.unlink()


def _in_use(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"up": up, "add": add, "down": down, "status": status, "serve": serve})
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
