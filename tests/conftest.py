"""What tests of whole runs share: surroundings of their own, a class store, an MLflow database, and jobs to run."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from distmaml.engine import warn_once

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def _surroundings() -> Iterator[None]:
    """Nothing of the user's is used or touched: no cluster, no token, no server, no output folder."""
    folder = tempfile.mkdtemp(prefix="t", dir="/tmp")  # a socket's path may have 107 characters
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "DISTMAML_HOME", "RAY_JOB_SUBMISSION_ID"):
            patch.delenv(name, raising=False)
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Bitwise promises are made for a number of threads, and small tensors are computed faster on one."""
    from tests.runs import one_thread

    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _warned_of_nothing() -> None:
    """What is said once in a process is said once in a test."""
    warn_once.cache_clear()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with an empty MLflow database, whose migrations take seconds, and the store of the glyphs."""
    from distmaml.datasets import ensure_store
    from distmaml.tracking.database import open_tracking

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "prepared"  # one for all workers
    ready = folder.with_suffix(".ready")
    with FileLock(folder.with_suffix(".lock")):
        if not ready.exists():
            open_tracking(folder)
            ensure_store("glyphs", data_dir=None, image_size=28, color=False, stores_dir=folder / "stores")
            ready.touch()
    return folder


@pytest.fixture
def output_dir(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared output folder."""
    return Path(shutil.copytree(prepared, tmp_path / "output"))


class Job:
    """A command in a process group of its own, as from a shell, whose Ray is told from all others by its folder."""

    def __init__(self, arguments: list[str], folder: Path, ray_folder: Path, environment: Mapping[str, str]) -> None:
        self._ray_folder = ray_folder
        ray_folder.mkdir(parents=True)
        self._out = ray_folder.with_suffix(".out")
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env={**os.environ, "RAY_TMPDIR": str(ray_folder), **environment},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """Everything that was printed so far."""
        return self._out.read_text()

    def wait_for(self, condition: Callable[[], object], *, seconds: float = 240) -> None:
        """Waits until something holds, and fails where the command ends before."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output}"
            assert time.monotonic() < end, f"nothing happened in {seconds} s:\n{self.output}"
            time.sleep(0.1)

    def wait(self, *, seconds: float = 240) -> int:
        """The exit status."""
        return self.process.wait(seconds)

    def signal(self, number: signal.Signals) -> None:
        """SIGINT goes to the whole process group, as from a terminal, any other signal to the command alone."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def ray_processes(self) -> list[psutil.Process]:
        """Processes of the command's own Ray cluster that live, and what libraries call for a moment, as uname."""
        found = []
        for process in psutil.process_iter():
            try:
                own = str(self._ray_folder) in process.environ().get("RAY_TMPDIR", "")
                if own and process.pid != self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def running(self, word: str) -> list[psutil.Process]:
        """Those of them with a word in their command line."""
        found = []
        for process in self.ray_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if word in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        """The Ray Train workers among them."""
        return self.running("RayTrainWorker")

    def end(self) -> None:
        """Ends the command, where that is still to be done, and its Ray."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        for process in self.ray_processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # with its node it may have gone by itself
                process.kill()
        shutil.rmtree(self._ray_folder, ignore_errors=True)


StartJob = Callable[..., Job]


@pytest.fixture(scope="module")
def start_job() -> Iterator[StartJob]:
    """Starts ``python jobs/NAME.py ARGUMENTS`` in a folder."""
    started: list[Job] = []

    def start(name: str, *arguments: str, folder: Path, environment: Mapping[str, str] = {}) -> Job:
        ray_folder = Path(os.environ["RAY_TMPDIR"]) / f"j{len(started)}-{secrets.token_hex(2)}"
        command = [str(REPOSITORY / "jobs" / f"{name}.py"), *arguments]
        started.append(Job(command, folder, ray_folder, environment))
        return started[-1]

    yield start
    for job in started:
        job.end()
