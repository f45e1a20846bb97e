"""Loops on real Ray workers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from distmaml import collectives, launch, ray_cluster
from distmaml.errors import ClusterError, DivergenceError
from distmaml.worker import Worker
from tests.conftest import StartJob

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own

NO_CLUSTER = "127.0.0.1:9"


def test_an_address_without_a_cluster_is_said_at_once() -> None:
    begun = time.monotonic()
    with (
        pytest.raises(ClusterError, match=r"no Ray cluster at 127.0.0.1:9.*--address"),
        ray_cluster.connect(NO_CLUSTER, num_cpus=1),
    ):
        pass
    assert time.monotonic() - begun < 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch")


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ray_cluster.connect(None, num_cpus=2) as resources:
        assert resources["CPU"] == 2
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        yield
    assert not list(Path(os.environ["RAY_TMPDIR"]).glob("dm-*")), "Ray's files are gone with it"
    assert "RAY_ADDRESS" not in os.environ


def fit(
    loop: Any,
    folder: Path,
    *,
    team: tuple[int, int] = (1, 1),
    max_failures: int = 3,
    node_timeout: float = 60.0,
    callbacks: Sequence[Any] = (),
) -> Any:
    return launch.fit(
        loop,
        folder,
        name="test",
        storage_path=folder / "ray",
        team=team,
        gpus_per_worker=0,
        max_failures=max_failures,
        collective_timeout=60.0,
        node_timeout=node_timeout,
        callbacks=callbacks,
    )


def count(folder: Path) -> int:
    """Counts the calls over all processes that come and go."""
    with (folder / "calls").open("a") as file:
        file.write("x")
    return len((folder / "calls").read_text())


def add_ranks(folder: Path, worker: Worker) -> tuple[int, int, float]:
    worker.report({"rank": worker.rank})
    return worker.rank, worker.world_size, float(collectives.all_reduce(torch.tensor([worker.rank + 1.0])))


def diverge(folder: Path, worker: Worker) -> None:
    count(folder)
    raise DivergenceError("query_loss is no longer finite")


def mistake(folder: Path, worker: Worker) -> None:
    count(folder)
    raise KeyError("a key that is not there")


def die_once(folder: Path, worker: Worker) -> int:
    calls = count(folder)
    if calls == 1:
        time.sleep(1)
        os._exit(1)
    return calls


def die_at_once(folder: Path, worker: Worker) -> int:
    calls = count(folder)
    if calls == 1:
        os._exit(1)
    return calls


def die(folder: Path, worker: Worker) -> None:
    os._exit(1)


class _Idle:
    """Somebody else on the cluster."""

    def ready(self) -> bool:
        return True


NO_ROOM = (
    r"^for 8 s there was no room for 2 workers: they need 2 CPU, and the cluster has 2 CPU, of which 1 CPU is free"
)


@pytest.mark.ray
@pytest.mark.usefixtures("_cluster")
class TestOnACluster:
    def test_all_workers_run_the_loop_and_rank_0_returns(self, folder: Path) -> None:
        assert fit(add_ranks, folder, team=(2, 2)) == (0, 2, 3.0)
        assert not (folder / "ray").exists()

    def test_ray_trains_controller_imports_nothing_that_the_loop_does(self, tmp_path: Path) -> None:
        from ray.train.v2._internal.execution.callback import ControllerCallback

        said = tmp_path / "modules"

        class Spy(ControllerCallback):  # type: ignore[misc, unused-ignore]
            def after_controller_finish(self, result: Any) -> None:
                import sys

                said.write_text(" ".join(name for name in sys.modules if name.startswith(("distmaml.", "tests."))))

        assert fit(add_ranks, tmp_path, callbacks=[Spy()]) == (0, 1, 1.0)
        assert set(said.read_text().split()) == {"distmaml.errors", "distmaml.supervisor"}

    def test_a_run_on_a_named_cluster_leaves_it_running(
        self, start_job: StartJob, output_dir: Path, tmp_path: Path
    ) -> None:
        options = (
            f"--address {os.environ['RAY_ADDRESS']} --output-dir {output_dir} --num-outer-steps 2 --meta-batch-size 2 "
            "--reduction-chunk 1 --num-val-episodes 2 --num-test-episodes 2 --num-eval-steps 1"
        )
        job = start_job("train", "sinusoid-maml-5s", *options.split(), folder=tmp_path)
        assert job.wait() == 0, job.output
        assert "1 worker on 2 CPUs and 0 GPUs" in job.output
        assert job.ray_processes() == []
        assert fit(add_ranks, tmp_path) == (0, 1, 1.0)

    def test_more_workers_than_cpus_are_refused_at_once(self, folder: Path) -> None:
        with pytest.raises(ClusterError, match=r"3 workers need 3 CPUs, and the cluster has 2. Lower --num-workers"):
            fit(add_ranks, folder, team=(3, 3))

    def test_room_that_does_not_come_ends_the_wait_with_what_is_missing(self, tmp_path: Path) -> None:
        import ray

        other = ray.remote(num_cpus=1)(_Idle).remote()
        try:
            ray.get(other.ready.remote())
            with pytest.raises(ClusterError, match=NO_ROOM):
                fit(add_ranks, tmp_path, team=(2, 2), node_timeout=8)
        finally:
            ray.kill(other)

    def test_an_error_on_purpose_comes_through_without_another_try(self, tmp_path: Path) -> None:
        with pytest.raises(DivergenceError, match=r"^query_loss is no longer finite$"):
            fit(diverge, tmp_path)
        assert count(tmp_path) == 2

    def test_a_mistake_comes_through_with_its_traceback_and_without_another_try(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError) as caught:
            fit(mistake, tmp_path)
        assert 'raise KeyError("a key that is not there")' in caught.value.__notes__[0]
        assert count(tmp_path) == 2

    @pytest.mark.parametrize("loop", [die_once, die_at_once])
    def test_a_crash_is_tried_again(self, loop: Any, tmp_path: Path) -> None:
        assert fit(loop, tmp_path) == 2

    def test_crashes_without_end_are_a_cluster_error(self, tmp_path: Path) -> None:
        with pytest.raises(ClusterError, match=r"failed more than 0 times.*its process died"):
            fit(die, tmp_path, max_failures=0)


def test_memory_that_the_thread_that_trains_lets_go_of_is_kept_for_it() -> None:
    """Counted in pages that the kernel had to give, by a thread that is not its process's first, as Ray Train's."""
    program = (
        "import resource, threading\n"
        "def step(): return sum(len(block) for block in [bytearray(9 << 20) for _ in range(12)])\n"
        "def pages(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def train():\n"
        "    step()\n"
        "    before = pages()\n"
        "    for _ in range(3): step()\n"
        "    print(pages() - before)\n"
        "thread = threading.Thread(target=train); thread.start(); thread.join()\n"
    )
    as_it_is, of_workers = (
        int(subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True).stdout)
        for env in (dict(os.environ), os.environ | launch.WORKER_ENVIRONMENT)
    )
    assert 4 * of_workers < as_it_is
