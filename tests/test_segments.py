import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distmaml.errors import RunError
from distmaml.segments import Point, Segment, SegmentWriter, committed_segments, committed_step, read_points


def steps_in(folder: Path) -> list[int]:
    return [point.step for segment in committed_segments(folder, after=-1) for point in read_points(segment)]


def train(writer: SegmentWriter, first: int, last: int, *, every: int = 10, value: float = 0.5) -> None:
    """Outer steps first..last with a checkpoint at each multiple of `every`."""
    for step in range(first, last + 1):
        writer.put(step, {"train/query_loss": value})
        if step % every == 0:
            writer.write(step)
            writer.commit(step)


def test_a_segment_is_read_as_it_was_put(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 0)
    writer.put(3, {"train/query_loss": math.nan, "val/query_loss": math.inf})
    writer.write(10)
    writer.commit(10)
    (segment,) = committed_segments(tmp_path, after=-1)
    assert segment == Segment(0, 10, tmp_path / "00000000-00000010.jsonl")
    (point,) = read_points(segment)
    assert point.step == 3
    assert math.isnan(point.values["train/query_loss"])
    assert point.values["val/query_loss"] == math.inf


def test_a_segment_without_a_commit_is_not_seen(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 0)
    train(writer, 1, 10)
    writer.put(15, {"train/query_loss": 1.0})
    writer.write(20)
    assert steps_in(tmp_path) == list(range(1, 11))
    assert committed_step(tmp_path) == 10


def test_a_half_written_file_is_not_seen(tmp_path: Path) -> None:
    train(SegmentWriter(tmp_path, 0), 1, 10)
    (tmp_path / "00000010-00000020.jsonl.part").write_text('{"step": 11, "timest')
    assert steps_in(tmp_path) == list(range(1, 11))


def test_steps_lost_in_a_crash_are_logged_once(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 0)
    train(writer, 1, 20, value=1.0)
    for step in range(21, 31):  # their checkpoint is never written
        writer.put(step, {"train/query_loss": 1.0})
    writer.write(30)
    train(SegmentWriter(tmp_path, 20), 21, 30, value=2.0)
    points = [p for segment in committed_segments(tmp_path, after=-1) for p in read_points(segment)]
    assert [p.step for p in points] == list(range(1, 31))
    assert {p.values["train/query_loss"] for p in points if p.step > 20} == {2.0}


def test_a_crash_between_checkpoint_and_commit_loses_no_point(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 0)
    writer.put(10, {"train/query_loss": 1.0})
    writer.write(10)
    train(SegmentWriter(tmp_path, 10), 11, 20)
    assert steps_in(tmp_path) == list(range(10, 21))


def test_falling_back_to_an_older_checkpoint_logs_each_step_once(tmp_path: Path) -> None:
    train(SegmentWriter(tmp_path, 0), 1, 30, value=1.0)
    train(SegmentWriter(tmp_path, 10), 11, 50, value=2.0)
    assert steps_in(tmp_path) == list(range(1, 51))
    assert committed_step(tmp_path) == 50


def test_a_commit_without_points_still_moves(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 0)
    writer.write(10)
    writer.commit(10)
    assert committed_step(tmp_path) == 10
    assert steps_in(tmp_path) == []


def test_a_point_of_step_zero_is_kept(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path, 0)
    writer.put(0, {"val/query_accuracy": 0.2})
    train(writer, 1, 10)
    assert steps_in(tmp_path) == list(range(11))


WHOLE = {"step": 2, "timestamp_ms": 2, "values": {"a": 1.0}}


@pytest.mark.parametrize(
    "line",
    [
        {"step": 2},
        {**WHOLE, "step": 11},
        {**WHOLE, "step": -1},
        {**WHOLE, "step": "2"},
        {**WHOLE, "step": True},
        {**WHOLE, "timestamp_ms": -1},
        {**WHOLE, "timestamp_ms": 2**63},
        {**WHOLE, "values": {"a": "1"}},
        {**WHOLE, "values": {"a": 10**400}},
        {**WHOLE, "values": [["a", 1.0]]},
        7,
    ],
    ids=str,
)
def test_a_damaged_line_is_named(tmp_path: Path, line: Any) -> None:
    path = tmp_path / "00000000-00000010.jsonl"
    path.write_text(json.dumps(Point(1, 2, {"a": 1.0})._asdict()) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(RunError, match=r"line 2 of .*00000000-00000010\.jsonl is not a point"):
        read_points(Segment(0, 10, path))


@pytest.mark.parametrize("content", [b"", b"x", b"-3", b"1.5", b"\xff\xfe", b"9" * 5000])
def test_a_damaged_commit_is_named_and_made_again_when_the_run_goes_on(tmp_path: Path, content: bytes) -> None:
    train(SegmentWriter(tmp_path, 0), 1, 20)
    (tmp_path / "committed").write_bytes(content)
    with pytest.raises(RunError, match=r"committed is damaged: it holds .* Remove it"):
        committed_segments(tmp_path, after=-1)
    (tmp_path / "committed").unlink()
    SegmentWriter(tmp_path, 20)
    assert steps_in(tmp_path) == list(range(1, 21))


def test_a_file_of_another_name_is_no_segment(tmp_path: Path) -> None:
    train(SegmentWriter(tmp_path, 0), 1, 10)
    for name in ("notes.jsonl", "00000000-x.jsonl", "-00000005.jsonl", "00000000-00000010 (copy).jsonl"):
        (tmp_path / name).write_text("7\n")
    assert steps_in(tmp_path) == list(range(1, 11))


def test_a_worker_that_writes_segments_imports_no_mlflow() -> None:
    code = "import sys, distmaml.segments, distmaml.tracking.outbox; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
