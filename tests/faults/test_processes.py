"""Processes that die or hang."""

import re
import signal
from collections.abc import Callable

import pytest
import torch

from tests.faults.conftest import CHECKPOINT_EVERY, LocalCluster, StartRun, kill

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("cluster")]
Reference = dict[str, torch.Tensor]
Cost = Callable[..., None]


def test_a_killed_worker(cluster: LocalCluster, start_run: StartRun, reference: Reference, cost: Cost) -> None:
    run = start_run("worker", "--num-workers=2", cluster=cluster)
    run.wait_for_step(25)
    kill(cluster.workers()[-1])
    run.broken()
    seconds = run.seconds_until_new_step()
    run.assert_as_if_nothing_had_happened(reference)
    assert run.steps_repeated() <= CHECKPOINT_EVERY
    assert not re.search("Traceback|Error", run.job.output), run.job.output
    cost("worker killed", seconds=seconds, target=12, repeated=run.steps_repeated())


def test_a_worker_that_hangs(cluster: LocalCluster, start_run: StartRun, reference: Reference, cost: Cost) -> None:
    run = start_run("hung", "--num-workers=2", "--collective-timeout=10", cluster=cluster)
    run.wait_for_step(25)
    run.broken()
    worker = cluster.workers()[-1]
    worker.send_signal(signal.SIGSTOP)
    seconds = run.seconds_until_new_step()
    run.assert_as_if_nothing_had_happened(reference)
    assert worker not in cluster.workers()
    cost("worker hung", seconds=seconds, target=45, repeated=run.steps_repeated())


def test_a_killed_controller(cluster: LocalCluster, start_run: StartRun, reference: Reference, cost: Cost) -> None:
    run = start_run("controller", "--num-workers=2", cluster=cluster)
    run.wait_for_step(25)
    kill(cluster.processes("TrainController")[-1])
    run.broken()
    seconds = run.seconds_until_new_step()
    run.assert_as_if_nothing_had_happened(reference)
    cost("controller killed", seconds=seconds, target=None, repeated=run.steps_repeated())


def test_a_killed_driver_and_the_same_command_again(
    cluster: LocalCluster, start_run: StartRun, reference: Reference, cost: Cost
) -> None:
    run = start_run("driver", "--num-workers=2", cluster=cluster)
    run.wait_for_step(25)
    run.job.process.kill()
    run.job.wait()
    assert run.tracking.run("driver").info.status == "RUNNING", "nobody could say otherwise"
    cluster.wait_for_no_workers()  # they train on until Ray hears of it
    kept = run.checkpoints()[-1]
    other = start_run("driver", "--seed=5", cluster=cluster)
    assert other.job.wait() == 2
    assert re.fullmatch(r"error: a run named 'driver' exists .* Go on with it by --resume, or .*\n", other.job.output)
    run.broken()
    again = start_run("driver", "--num-workers=1", cluster=cluster)
    again.broken_at = run.broken_at
    seconds = again.seconds_until_new_step()
    again.assert_as_if_nothing_had_happened(reference)
    assert f"driver was stopped after {kept} outer steps: it goes on." in again.job.output
    cost("driver killed, command repeated", seconds=seconds, target=None, repeated=again.steps_repeated())
