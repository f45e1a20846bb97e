"""An MLflow server, and a database below it, that go and come back; and a process that dies while it writes to them."""

import itertools
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from distmaml import experiment
from distmaml.config import override
from distmaml.recipes.sinusoid import sinusoid_maml_5s
from distmaml.tracking.database import open_tracking
from distmaml.tracking.outbox import Outbox
from distmaml.tracking.runs import TrackedRun
from tests.conftest import REPOSITORY
from tests.faults.conftest import Run, StartRun, Tracking

pytestmark = pytest.mark.faults
Reference = dict[str, torch.Tensor]
Cost = Callable[..., None]


def longest_pause(run: Run) -> float:
    """Seconds between one step and the next, at most."""
    times = sorted(when for when, _, _ in run.sampled())
    return max(after - before for before, after in itertools.pairwise(times))


def test_mlflow_may_be_away_for_a_minute(
    tracking: Tracking, start_run: StartRun, reference: Reference, cost: Cost
) -> None:
    run = start_run("minute", pace=0.42)
    run.wait_for_step(10)
    tracking.server.stop()
    away = time.monotonic()
    time.sleep(60)
    tracking.server.start()
    assert time.monotonic() - away > 60
    run.assert_as_if_nothing_had_happened(reference)
    assert longest_pause(run) < 10, "training does not wait for MLflow"
    assert "Cannot write to MLflow at" in run.job.output
    assert "is back." in run.job.output
    cost("MLflow away for 60 s", seconds=longest_pause(run), target=None, repeated=0)


def test_mlflow_may_be_away_for_the_whole_run(
    tracking: Tracking, start_run: StartRun, reference: Reference, cost: Cost, tmp_path: Path
) -> None:
    tracking.server.stop()
    try:
        run = start_run("whole", pace=0.0)
        assert run.job.wait() == 0, run.job.output
        assert "The run goes on without it" in run.job.output
    finally:
        tracking.server.start()
    # What any later command begins with.
    config = override(
        sinusoid_maml_5s(),
        {"name": "next", "output_dir": tmp_path / "output", "tracking_uri": tracking.server.uri},
    )
    experiment.open_tracking(config, resuming=None)
    run.assert_as_if_nothing_had_happened(reference)
    cost("MLflow away for the whole run", seconds=longest_pause(run), target=None, repeated=0)


def test_postgresql_may_crash_and_recover(
    tracking: Tracking, start_run: StartRun, reference: Reference, cost: Cost
) -> None:
    run = start_run("postgres", pace=0.15)
    run.wait_for_step(10)
    tracking.postgres.stop()
    time.sleep(8)
    tracking.postgres.start()
    run.assert_as_if_nothing_had_happened(reference)
    assert longest_pause(run) < 10, "training does not wait for MLflow"
    cost("PostgreSQL crashed, back after 8 s", seconds=longest_pause(run), target=None, repeated=0)


WRITER = """
import itertools, sys
from pathlib import Path
from distmaml.tracking.outbox import Outbox

outbox = Outbox(Path(sys.argv[1]))
for step in itertools.count(int(sys.argv[2])):
    outbox.append("metrics", 1_700_000_000_000 + step, {"step": step, "values": {"x": float(step), "y" * 200: 0.5}})
    print(step, flush=True)
"""


def test_a_process_that_dies_while_it_writes_loses_nothing_that_was_written(tracking: Tracking, tmp_path: Path) -> None:
    folder, generator = tmp_path / "spool", random.Random(0)
    opened = open_tracking(tmp_path, tracking.server.uri)
    run = TrackedRun.start(folder, tracking=opened, experiment="spool", name="spool", params={}, tags={})
    written: list[int] = []
    for _ in range(12):
        command = [sys.executable, "-c", WRITER, str(folder), str(max(written, default=0) + 1)]
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            written.append(int(writer.stdout.readline()))
            time.sleep(generator.uniform(0.0, 0.05))
            writer.kill()
            written.extend(int(line) for line in writer.stdout.read().splitlines())
        # As a power cut leaves it, which kill -9 alone hardly ever does.
        with (folder / "tracking" / "outbox.jsonl").open("ab") as outbox:
            outbox.write(b'{"kind": "metrics", "timestamp_ms": 17000')
    run.end("FINISHED")
    client = MlflowClient(tracking.server.uri)
    run_id = Outbox(folder).read_sent(opened.uri).run_id  # type: ignore[union-attr]
    found = Counter(metric.step for metric in client.get_metric_history(run_id, "x"))
    assert len(written) > 20
    assert {step for step in written if step not in found} == set()
    assert set(found.values()) == {1}
    assert client.get_run(run_id).info.status == "FINISHED"
