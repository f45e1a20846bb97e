"""A cluster on this machine as users have it: jobs are submitted to it, stopped and submitted again; and its door."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from distmaml import checkpoint
from tests.conftest import REPOSITORY
from tests.faults.conftest import LocalCluster

pytestmark = pytest.mark.ray
BIN = Path(sys.executable).parent


class Submitter:
    """Somebody at a shell with `ray job`, and what they submit."""

    def __init__(self, cluster: LocalCluster, output_dir: Path) -> None:
        self.cluster, self.output_dir = cluster, output_dir
        state = json.loads((cluster.folder / "cluster.json").read_text())
        self.mlflow: str = state["mlflow"]
        self.environment = {
            "RAY_API_SERVER_ADDRESS": state["dashboard"],
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(cluster.folder / "token"),
        }

    def ray(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs ``ray ARGUMENTS`` in the root of the repository, as the README says."""
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
        return subprocess.run(
            [str(BIN / "ray"), *arguments], cwd=REPOSITORY, env={**inherited, **self.environment, **environment},
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip

    def submit(self, identity: str, *command: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """Submits ``python COMMAND``."""
        return self.ray(
            "job", "submit", "--submission-id", identity, "--working-dir", ".", "--runtime-env",
            "cluster/runtime_env.yaml", *([] if wait else ["--no-wait"]), "--", "python", *command,
        )  # fmt: skip

    def train(self, identity: str, name: str, *options: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """Submits a training run of 300 steps."""
        settings = (
            f"--output-dir {self.output_dir} --tracking-uri {self.mlflow} --name {name} --num-workers 2 "
            "--num-outer-steps 300 --meta-batch-size 4 --reduction-chunk 2 --val-every 100 --num-val-episodes 4 "
            "--num-test-episodes 4 --checkpoint-every 300 --num-eval-steps 1 --tasks tests.faults.traced:TracedWaves "
            f"--task-arguments pace 0.03 trace {self.output_dir / name}.trace"
        )
        return self.submit(identity, "jobs/train.py", "sinusoid-maml-5s", *settings.split(), *options, wait=wait)

    def log(self, identity: str) -> list[str]:
        """What a job has printed, without what Ray says."""
        lines = self.ray("job", "logs", identity).stdout.splitlines()
        first = next((i for i, line in enumerate(lines) if "Running entrypoint for job" in line), -1)
        return [line for line in lines[first + 1 :] if line]

    def steps(self, name: str) -> list[int]:
        return checkpoint.steps(self.output_dir / "runs" / name / "checkpoints")


@pytest.fixture(scope="module")
def submitter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Submitter]:
    cluster = LocalCluster(tmp_path_factory.mktemp("cluster"))
    cluster.command("up", "--dashboard-port", "0", "--mlflow-port", "0")
    try:
        yield Submitter(cluster, tmp_path_factory.mktemp("submitted"))
    finally:
        cluster.command("down")
    assert not cluster.processes()


def test_a_submitted_run_prints_each_line_once_and_ends_well(submitter: Submitter) -> None:
    done = submitter.train("straight", "straight")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = submitter.log("straight")
    assert re.fullmatch(r"MLflow: http://127\.0\.0\.1:\d+/#/experiments/\d+/runs/[0-9a-f]{32}", lines[0]), lines
    assert lines[1].startswith("2 workers on 2 CPUs and 0 GPUs; the run lies in ")
    assert any(line.startswith("step 300/300 ") for line in lines)
    assert len(lines) == len(set(lines)), lines
    assert not re.search("Traceback|Error|WARN|Warning|pid=", "\n".join(lines)), lines


def test_a_stopped_job_leaves_a_checkpoint_and_the_same_command_goes_on(submitter: Submitter) -> None:
    assert submitter.train("begun", "twice", wait=False).returncode == 0
    progress = submitter.output_dir / "runs" / "twice" / "progress.json"
    deadline = time.monotonic() + 120
    while not (progress.exists() and json.loads(progress.read_text())["step"] > 10):
        assert time.monotonic() < deadline, submitter.log("begun")
        time.sleep(0.05)
    assert submitter.ray("job", "stop", "begun").returncode == 0
    assert submitter.log("begun")[-2:] == [
        "Its checkpoints are kept: the same command with --name twice goes on.",
        "stopped",
    ]
    stopped_at = submitter.steps("twice")[-1]
    assert 10 < stopped_at < 300  # a checkpoint out of turn: the only one in turn is the last
    again = submitter.train("gone on", "twice")
    assert again.returncode == 0, again.stdout
    assert submitter.log("gone on")[0] == f"twice was stopped after {stopped_at} outer steps: it goes on."
    ends = [submitter.output_dir / "runs" / name / "checkpoints" for name in ("straight", "twice")]
    one, other = (checkpoint.load(checkpoint.path_of(folder, 300))[0] for folder in ends)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_error_is_one_line_and_a_failed_job(submitter: Submitter) -> None:
    done = submitter.train("wrong", "wrong", "--num-workers", "7")
    assert done.returncode == 1
    assert submitter.log("wrong")[-1] == (
        "error: 7 workers need 7 CPUs, and the cluster has 2. Lower --num-workers, or add nodes."
    )


def test_a_search_is_submitted_like_a_run(submitter: Submitter) -> None:
    settings = (
        f"--output-dir {submitter.output_dir} --tracking-uri {submitter.mlflow} --name rates --num-samples 2 "
        "--num-outer-steps 20 --val-every 10 --num-val-episodes 4 --num-test-episodes 4 --scheduler none"
    )
    done = submitter.submit("search", "jobs/tune.py", "sinusoid-maml-5s", *settings.split())
    assert done.returncode == 0, done.stdout + done.stderr
    lines = submitter.log("search")
    assert any(line.startswith("2 trials, 2 at a time on 2 CPUs and 0 GPUs") for line in lines), lines
    assert any(line.startswith("best      rates-00") for line in lines), lines
    assert not re.search("Traceback|Error|WARN|Warning|pid=", "\n".join(lines)), lines


# ------------------------------------------------------------------------------------------------- the door


@pytest.mark.parametrize(
    "environment",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}],
    ids=["no token", "a wrong token"],
)
def test_a_submission_without_the_token_is_refused(submitter: Submitter, environment: dict[str, str]) -> None:
    refused = submitter.ray("job", "submit", "--no-wait", "--", "python", "-c", "print(1)", **environment)
    assert refused.returncode == 1
    assert re.search("40[13]|[Uu]nauthorized|[Ff]orbidden|InvalidAuthToken", refused.stdout + refused.stderr)


@pytest.mark.parametrize(
    "environment",
    [{"RAY_AUTH_MODE": "token", "HOME": "/nonexistent"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}],
    ids=["no token", "a wrong token"],
)
def test_a_driver_without_the_token_is_told_which_variable(
    submitter: Submitter, environment: dict[str, str], tmp_path: Path
) -> None:
    done = command(submitter, tmp_path, environment)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(
        r"error: the Ray cluster at .* wants its token, and got none or another one\. Set RAY_AUTH_MODE=token, and "
        r"RAY_AUTH_TOKEN_PATH to a file that holds it \(or RAY_AUTH_TOKEN\)\.\n",
        done.stderr,
    )
    assert not (tmp_path / "runs").exists()


def test_a_driver_of_another_version_of_ray_is_told_of_both(submitter: Submitter, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import ray\nray.__version__ = '2.59.0'\n")
    environment = {**submitter.cluster.environment, "PYTHONPATH": str(tmp_path)}
    done = command(submitter, tmp_path, environment)
    assert done.returncode == 2, done.stderr
    assert re.match(
        r"error: the Ray cluster at .* has other versions than this process \(The cluster was started with: "
        r"Ray: 2\.60\.0 Python: .* Ray: 2\.59\.0 .*\)\. Install the same on both\.\n",
        done.stderr,
    ), done.stderr


def command(submitter: Submitter, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """``jobs/train.py`` with --address, from outside."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    arguments = ["sinusoid-maml-5s", "--address", submitter.cluster.address, "--output-dir", str(folder)]
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "jobs/train.py"), *arguments], cwd=folder, timeout=120, check=False,
        env={**inherited, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_every_port_is_on_loopback_only(submitter: Submitter) -> None:
    listening = []
    for process in submitter.cluster.processes():
        with contextlib.suppress(psutil.Error):  # workers come and go
            listening += [c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert len(listening) > 10
    assert {connection.laddr.ip.removeprefix("::ffff:") for connection in listening} == {"127.0.0.1"}


def test_the_token_is_for_its_user_alone_and_shows_nowhere(submitter: Submitter) -> None:
    """After runs, a search and refusals: not in what any process was started with, nor in any file but its own."""
    token_file = submitter.cluster.folder / "token"
    token = token_file.read_text()
    assert len(token) == 64
    assert token_file.stat().st_mode & 0o777 == 0o600
    for process in submitter.cluster.processes():
        with contextlib.suppress(psutil.Error):  # workers come and go
            assert token not in " ".join(process.cmdline())
            assert token not in process.environ().values()
    temporary = Path((submitter.cluster.folder / "temporary").read_text())
    folders = [temporary, submitter.cluster.folder, submitter.output_dir]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    assert len(files) > 50
    assert [file for file in files if file.exists() and token.encode() in file.read_bytes()] == [token_file]


def test_a_second_cluster_in_its_folder_is_refused(submitter: Submitter) -> None:
    done = subprocess.run(
        [str(REPOSITORY / "cluster/local.sh"), "up", "--folder", str(submitter.cluster.folder)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"error: a cluster runs already, from .*: cluster/local\.sh status, or down\.\n", done.stderr)
