"""What the tests of faults share: a cluster of several nodes, MLflow over PostgreSQL, runs, and what faults cost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from distmaml import checkpoint, loop, paths
from distmaml.config import Config, override
from distmaml.recipes import RECIPES
from distmaml.worker import LocalWorker
from tests.conftest import REPOSITORY, Job, StartJob
from tests.runs import one_thread
from tests.servers import Postgres, Server

NUM_STEPS = 120
META_BATCH_SIZE = 4
CHECKPOINT_EVERY = 10


class LocalCluster:
    """What `cluster/local.sh` starts: a head without CPUs, and nodes of one CPU each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def command(self, name: str, *arguments: str) -> str:
        """Runs ``cluster/local.sh NAME``; what it printed."""
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "cluster/local.py"), name, *arguments, "--folder", str(self.folder)],
            capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def address(self) -> str:
        return str(json.loads((self.folder / "cluster.json").read_text())["ray"])

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever talks to it."""
        token = (self.folder / "token").read_text()
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

    def processes(self, name: str = "") -> list[psutil.Process]:
        """The processes of the cluster that have some text in their command line, oldest first."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("DISTMAML_LOCAL_CLUSTER") != str(self.folder):
                    continue
                if process.status() != psutil.STATUS_ZOMBIE and name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: process.create_time())

    def workers(self) -> list[psutil.Process]:
        """The Ray Train workers on it."""
        return self.processes("RayTrainWorker")

    def wait_for_no_workers(self) -> None:
        """Waits until all of them are gone."""
        deadline = time.monotonic() + 60
        while self.workers():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def raylets(self) -> list[psutil.Process]:
        """Of the nodes, without the head."""
        return [p for p in self.processes("raylet/raylet") if "internal_head" not in " ".join(p.cmdline())]

    def set_size(self, num_nodes: int) -> None:
        """Adds nodes, or ends them in order, until there are so many."""
        for raylet in self.raylets()[num_nodes:]:
            raylet.terminate()
        for _ in range(num_nodes - len(self.raylets())):
            self.command("add")
        deadline = time.monotonic() + 60
        while self._alive() != num_nodes or len(self.raylets()) != num_nodes:
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def drain(self, raylet: psutil.Process, *, seconds: int) -> None:
        """Tells a node that it will be taken away, as the provider of a spot instance does."""
        node = next(part for part in raylet.cmdline() if part.startswith("--node_id=")).partition("=")[2]
        command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", self.address, "--node-id", node]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        command += ["--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, env={**os.environ, **self.environment}, check=True, capture_output=True, timeout=60)

    def _alive(self) -> int:
        code = (
            "import ray; ray.init(address='%s', logging_level='ERROR', log_to_driver=False); "
            "print(sum(node['Alive'] for node in ray.nodes()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code % self.address], env={**os.environ, **self.environment}, check=True,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return int(done.stdout.split()[-1]) - 1


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two nodes of one CPU each."""
    found = LocalCluster(tmp_path_factory.mktemp("cluster"))
    found.command("up", "--dashboard-port", "0", "--mlflow-port", "0")
    try:
        yield found
    finally:
        found.command("down")
        assert not found.processes()


class Tracking:
    """A real MLflow server over a real PostgreSQL."""

    def __init__(self, folder: Path) -> None:
        self.postgres = Postgres(folder)
        self.postgres.start()
        self.server = Server(folder, backend=self.postgres.uri)
        self.server.start()

    def run(self, name: str) -> Any:
        """The one MLflow run of a name."""
        from mlflow import MlflowClient

        client = MlflowClient(self.server.uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        (run,) = client.search_runs(experiments, f"attributes.run_name = '{name}'")
        return run

    def steps(self, name: str, key: str) -> Counter[int]:
        """How often each step of a metric is there."""
        from mlflow import MlflowClient

        history = MlflowClient(self.server.uri).get_metric_history(self.run(name).info.run_id, key)
        return Counter(metric.step for metric in history)


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    found = Tracking(tmp_path_factory.mktemp("tracking"))
    yield found
    found.server.stop()
    found.postgres.stop()


class Run:
    """One command, and what it leaves."""

    def __init__(self, job: Job, name: str, output_dir: Path, trace: Path, tracking: Tracking) -> None:
        self.job, self.name, self.tracking = job, name, tracking
        self.folder, self._trace = output_dir / "runs" / name, trace
        self.broken_at = time.time()

    def sampled(self) -> list[tuple[float, int, int]]:
        """Time, process and number of each step whose tasks were sampled: while the step before it is computed."""
        lines = [line.split() for line in self._trace.read_text().splitlines()] if self._trace.exists() else []
        return [(float(when), int(pid), int(index) // META_BATCH_SIZE) for when, pid, index in lines]

    def wait_for_step(self, step: int, *, seconds: float = 200) -> None:
        """Waits until training has come so far."""
        self.job.wait_for(lambda: any(s > step for _, _, s in self.sampled()), seconds=seconds)

    def broken(self) -> None:
        """Notes that this is the time of a fault."""
        self.broken_at = time.time()

    def seconds_until_new_step(self, *, limit: float = 200) -> float:
        """Seconds from the fault until new workers have trained a step that none had before."""

        def new() -> list[float]:
            _, before, now = self._generations()
            return [when for when, step in now if step > before]

        self.job.wait_for(new, seconds=limit)
        return min(new()) - self.broken_at

    def steps_repeated(self) -> int:
        """Outer steps that were done, and that new workers trained again; the last may have been in progress."""
        begun, before, _ = self._generations()
        return max(0, before - 1 - begun)

    def _generations(self) -> tuple[int, int, list[tuple[float, int]]]:
        """With which step the workers that came after the fault began, the last one of those before, and theirs."""
        sampled = self.sampled()
        old = {pid for when, pid, _ in sampled if when <= self.broken_at}
        new = [(when, step) for when, pid, step in sampled if pid not in old]
        last = max((step for _, pid, step in sampled if pid in old), default=0)
        return min((step for _, step in new), default=last), last, new

    def assert_as_if_nothing_had_happened(self, reference: dict[str, torch.Tensor]) -> None:
        """The parameters are to the last bit those of an undisturbed run, and MLflow has every step exactly once."""
        assert self.job.wait() == 0, self.job.output
        found, _ = checkpoint.load(checkpoint.path_of(self.folder / "checkpoints", NUM_STEPS))
        assert found.keys() == reference.keys()
        assert all(torch.equal(found[name], reference[name]) for name in found)
        assert self.tracking.run(self.name).info.status == "FINISHED"
        for key, steps in (("train/query_loss", range(1, NUM_STEPS + 1)), ("val/query_loss", range(40, 121, 40))):
            assert self.tracking.steps(self.name, key) == Counter(steps)
        assert self.tracking.steps(self.name, "test/query_loss") == Counter([self.best_step()])

    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints that are there."""
        return checkpoint.steps(self.folder / "checkpoints")

    def best_step(self) -> int:
        """After which the model that was tested stood."""
        return int(checkpoint.load(self.folder / "model.safetensors")[1]["step"])


SETTINGS: dict[str, Any] = {
    "tasks": "tests.faults.traced:TracedWaves", "meta_batch_size": META_BATCH_SIZE, "reduction_chunk": 2,
    "num_outer_steps": NUM_STEPS, "val_every": 40, "num_val_episodes": 4, "num_test_episodes": 4,
    "checkpoint_every": CHECKPOINT_EVERY, "log_every": 1, "num_eval_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What an undisturbed run comes to, on one worker in this process."""
    where = {"name": "reference", "output_dir": tmp_path_factory.mktemp("reference")}
    config: Config = override(RECIPES["sinusoid-maml-5s"](), {**SETTINGS, **where})
    with one_thread():
        loop.train(config, LocalWorker())
    folder = paths.checkpoints(paths.run_folder(config))
    return checkpoint.load(checkpoint.path_of(folder, NUM_STEPS))[0]


StartRun = Callable[..., Run]


@pytest.fixture
def start_run(start_job: StartJob, prepared: Path, tmp_path: Path, tracking: Tracking) -> StartRun:
    """Starts ``jobs/train.py`` as a user would; a second time under the same name, the same command."""

    def start(
        name: str,
        *options: str,
        cluster: LocalCluster | None = None,
        pace: float = 0.05,
        output_dir: Path | None = None,
    ) -> Run:
        output, trace = output_dir or tmp_path / "output", tmp_path / f"{name}.trace"
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
        arguments += ["--task-arguments", "pace", str(pace), "trace", str(trace)]
        arguments += ["--output-dir", str(output), "--name", name, "--tracking-uri", tracking.server.uri]
        arguments += ["--address", cluster.address] if cluster else []
        job = start_job(
            "train", "sinusoid-maml-5s", *arguments, *options, folder=REPOSITORY,
            environment=cluster.environment if cluster else {},
        )  # fmt: skip
        return Run(job, name, output, trace, tracking)

    return start


@pytest.fixture
def cost(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes what a fault cost in the file that $DISTMAML_FAULTS names, and holds it against the target."""

    def note(fault: str, *, seconds: float, target: float | None, repeated: int) -> None:
        file = os.environ.get("DISTMAML_FAULTS")
        if file:
            with Path(file).open("a") as out:
                record = {"fault": fault, "seconds": round(seconds, 1), "target": target, "repeated": repeated}
                out.write(json.dumps(record) + "\n")
        if target is not None:
            assert seconds <= 3 * target, f"{fault}: {seconds:.1f} s"

    return note


def kill(process: psutil.Process) -> None:
    """kill -9."""
    process.send_signal(signal.SIGKILL)
