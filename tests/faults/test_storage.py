"""Disks that are full, and files that are damaged."""

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from distmaml import checkpoint
from tests.faults.conftest import LocalCluster, StartRun, kill

pytestmark = pytest.mark.faults
Reference = dict[str, torch.Tensor]
Cost = Callable[..., None]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 MB. Mounting one is root's alone."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a run of a test that failed may still be in there


def fill(folder: Path) -> Path:
    """Leaves no byte free, by one file."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (2**16, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    assert shutil.disk_usage(folder).free < 2**12
    return filler


def test_a_disk_that_is_full_ends_a_run_that_goes_on_when_there_is_room(
    small_disk: Path, start_run: StartRun, reference: Reference, cost: Cost
) -> None:
    output_dir = small_disk / "output"
    run = start_run("full", output_dir=output_dir)
    run.wait_for_step(25)
    filler = fill(small_disk)
    run.broken()
    assert run.job.wait() == 2, run.job.output
    error = run.job.output.splitlines()[-1]
    assert re.match(f"error: .*{re.escape(str(output_dir))}.*No space left", error), run.job.output
    assert "Traceback" not in run.job.output
    assert not list(run.folder.rglob("*.part*"))
    filler.unlink()
    again = start_run("full", output_dir=output_dir)
    seconds = again.seconds_until_new_step()
    again.assert_as_if_nothing_had_happened(reference)
    cost("disk full, room made, command repeated", seconds=seconds, target=None, repeated=again.steps_repeated())


def test_a_truncated_checkpoint_is_passed_over(start_run: StartRun, reference: Reference, cost: Cost) -> None:
    run = start_run("truncated", pace=0.1)
    run.wait_for_step(35)
    run.job.end()
    before, last = run.checkpoints()[-2:]
    newest = checkpoint.path_of(run.folder / "checkpoints", last)
    newest.write_bytes(newest.read_bytes()[:-100])
    again = start_run("truncated", pace=0.1)
    seconds = again.seconds_until_new_step()
    again.assert_as_if_nothing_had_happened(reference)
    assert f"Going back to the checkpoint of step {before}" in again.job.output
    cost("newest checkpoint truncated", seconds=seconds, target=None, repeated=again.steps_repeated())


def test_half_a_snapshot_of_rays_stops_nothing(
    cluster: LocalCluster, start_run: StartRun, reference: Reference, cost: Cost, tmp_path: Path
) -> None:
    run = start_run("snapshot", cluster=cluster)
    run.wait_for_step(25)
    folders = list((tmp_path / "output" / "ray" / "snapshot").glob("*/*/snapshot"))
    assert folders, "Ray Train keeps its files elsewhere"
    for folder in folders:
        (folder / "checkpoint_manager_snapshot.json").write_text(json.dumps({"checkpoint_results": []})[:9])
    kill(cluster.processes("TrainController")[-1])
    run.broken()
    seconds = run.seconds_until_new_step()
    run.assert_as_if_nothing_had_happened(reference)
    cost("Ray's snapshot truncated, controller killed", seconds=seconds, target=None, repeated=run.steps_repeated())
