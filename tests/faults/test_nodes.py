"""Nodes that are lost, with and without notice, and nodes that come."""

import contextlib
from collections.abc import Callable

import psutil
import pytest
import torch

from tests.faults.conftest import CHECKPOINT_EVERY, LocalCluster, StartRun

pytestmark = pytest.mark.faults
Reference = dict[str, torch.Tensor]
Cost = Callable[..., None]


def node_of_a_worker(cluster: LocalCluster) -> psutil.Process:
    """The raylet above the worker that started last."""
    parent = cluster.workers()[-1].ppid()
    return next(raylet for raylet in cluster.raylets() if raylet.pid == parent)


def lose(raylet: psutil.Process) -> None:
    """All processes of a node are gone at once, as when its power fails."""
    for process in [raylet, *raylet.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_a_lost_node_is_replaced_by_a_spare_one(
    cluster: LocalCluster, start_run: StartRun, reference: Reference, cost: Cost
) -> None:
    cluster.set_size(3)
    run = start_run("spare", "--num-workers=2", cluster=cluster)
    run.wait_for_step(25)
    lose(node_of_a_worker(cluster))
    run.broken()
    seconds = run.seconds_until_new_step()
    run.assert_as_if_nothing_had_happened(reference)
    cost("node lost, a spare one there", seconds=seconds, target=25, repeated=run.steps_repeated())


def test_an_elastic_run_goes_on_with_fewer_workers_and_then_with_more(
    cluster: LocalCluster, start_run: StartRun, reference: Reference, cost: Cost
) -> None:
    cluster.set_size(2)
    run = start_run("elastic", "--num-workers=1:2", cluster=cluster, pace=0.3)
    run.wait_for_step(25)
    assert len(cluster.workers()) == 2
    lose(node_of_a_worker(cluster))
    run.broken()
    seconds = run.seconds_until_new_step()
    assert len(cluster.workers()) == 1
    cost("node lost, 2 workers to 1", seconds=seconds, target=20, repeated=run.steps_repeated())
    run.broken()
    cluster.command("add")
    run.job.wait_for(lambda: len(cluster.workers()) == 2)
    seconds = run.seconds_until_new_step()
    run.assert_as_if_nothing_had_happened(reference)
    assert run.steps_repeated() <= 2, "there was a checkpoint just before the workers were stopped"
    cost("node added, 1 worker to 2", seconds=seconds, target=None, repeated=run.steps_repeated())


def test_a_node_that_says_that_it_goes_costs_no_step(
    cluster: LocalCluster, start_run: StartRun, reference: Reference, cost: Cost
) -> None:
    cluster.set_size(3)
    run = start_run("notice", "--num-workers=2", "--max-failures=0", cluster=cluster, pace=0.15)
    run.wait_for_step(22)
    raylet = node_of_a_worker(cluster)
    cluster.drain(raylet, seconds=120)
    run.job.wait_for(lambda: any(step % CHECKPOINT_EVERY for step in run.checkpoints()))
    lose(raylet)
    run.broken()
    seconds = run.seconds_until_new_step()
    run.assert_as_if_nothing_had_happened(reference)
    assert run.steps_repeated() <= 1
    cost("node goes with notice", seconds=seconds, target=None, repeated=run.steps_repeated())


def test_a_node_that_is_lost_for_good_ends_the_run_with_what_is_missing(
    cluster: LocalCluster, start_run: StartRun, reference: Reference
) -> None:
    cluster.set_size(2)
    run = start_run("missing", "--num-workers=2", "--node-timeout=15", cluster=cluster)
    run.wait_for_step(25)
    lose(node_of_a_worker(cluster))
    assert run.job.wait() == 2, run.job.output
    reason = "for 15 s there was no room for 2 workers: they need 2 CPU, and the cluster has 1 CPU, of which "
    assert run.job.output.splitlines()[-1].startswith(f"error: {reason}"), run.job.output
    assert "Traceback" not in run.job.output
    ended = run.tracking.run("missing")
    assert ended.info.status == "FAILED"
    assert ended.data.tags["distmaml.reason"].startswith(reason)
    cluster.set_size(2)
    start_run("missing", "--num-workers=2", cluster=cluster).assert_as_if_nothing_had_happened(reference)
