"""Metric segments: the points of the outer steps between two checkpoints, as one file.

Rank 0 of the workers buffers points, writes them as a segment just before it writes a checkpoint, and marks them
committed just after. Only committed segments are ever read. A step that is lost in a crash and trained again is
therefore logged once: its first points were never committed.

    RUN/metrics/00000100-00000200.jsonl   points of outer steps in (100, 200], one line a point
    RUN/metrics/committed                 the step of the newest checkpoint whose segment is complete

Imports no mlflow and knows nothing of it, nor of checkpoints beyond their steps.
"""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from distmaml.errors import RunError
from distmaml.files import write_text

_NAME = re.compile(r"([0-9]{8,})-([0-9]{8,})\.jsonl")


class Point(NamedTuple):
    """The metrics of one outer step."""

    step: int
    """Outer step."""
    timestamp_ms: int
    """When it was measured, in milliseconds since 1970. A replay repeats it, and MLflow drops what it has already."""
    values: dict[str, float]
    """Metric key -> value; NaN and infinities are allowed."""


class Segment(NamedTuple):
    """One file of points."""

    start: int
    """Last outer step before the segment."""
    end: int
    """Last outer step of the segment: that of its checkpoint."""
    path: Path


class SegmentWriter:
    """Writes the segments of one run; one writer at a time, on rank 0.

    For each checkpoint, in this order: ``write(step)``, the checkpoint itself, ``commit(step)``. All points of a step
    are put before that.

    Opening a writer settles what an earlier one left behind. Training goes on after `restored_step` (0: from the
    beginning). Where that is a newer checkpoint than the last commit, the crash came between the two and the commit is
    made up for. Where it is an older one, since newer checkpoints are damaged, what is committed stays, and points of
    the steps that are trained again are dropped. Segments without a commit are removed.
    """

    def __init__(self, folder: Path, restored_step: int) -> None:
        self._folder = folder
        self._points: list[Point] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._committed = committed_step(folder)
        if restored_step > max(self._committed, 0):
            self.commit(restored_step)
        for segment in _all_segments(folder):
            if segment.end > self._committed:
                segment.path.unlink()

    def put(self, step: int, values: Mapping[str, float]) -> None:
        """Buffers one point, in memory only; a point of a step that is committed already is dropped."""
        if step > self._committed:
            floats = {key: float(value) for key, value in values.items()}
            self._points.append(Point(step, time.time_ns() // 1_000_000, floats))

    def write(self, step: int) -> None:
        """Writes the buffered points as the segment that ends at `step`, or nothing where there are none."""
        if not self._points:
            return
        lines = [json.dumps(point._asdict()) for point in self._points]
        name = f"{max(self._committed, 0):08d}-{step:08d}.jsonl"
        write_text(self._folder / name, "".join(f"{line}\n" for line in lines))
        self._points.clear()

    def commit(self, step: int) -> None:
        """Declares everything up to `step` final. Never goes back to an earlier step."""
        if step > self._committed:
            write_text(self._folder / "committed", f"{step}\n")
            self._committed = step


def committed_step(folder: Path) -> int:
    """The last committed outer step of a folder of segments; -1 before the first commit.

    Raises:
      RunError: the file that says so is damaged.
    """
    file = folder / "committed"
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return -1
    if not re.fullmatch(rb"[0-9]{1,18}\s*", text):
        raise RunError(
            f"{file} is damaged: it holds {text[:40]!r}, not an outer step. Remove it; going on with the run writes it "
            "again, by its newest checkpoint."
        )
    return int(text)


def committed_segments(folder: Path, after: int) -> list[Segment]:
    """The committed segments that end after the step `after`, in order.

    Raises:
      RunError: as `committed_step`.
    """
    committed = committed_step(folder)
    return [segment for segment in _all_segments(folder) if after < segment.end <= committed]


def read_points(segment: Segment) -> list[Point]:
    """The points of a segment.

    Raises:
      RunError: a line that is not a point of its steps; segments are written whole, so the file has been damaged since.
    """
    points = []
    for number, line in enumerate(segment.path.read_bytes().splitlines(), start=1):
        try:
            points.append(_point(json.loads(line), segment))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise RunError(
                f"line {number} of {segment.path} is not a point ({error!r:.200}). Remove the line; the point is lost."
            ) from error
    return points


def _point(record: Any, segment: Segment) -> Point:
    step, timestamp_ms, values = record["step"], record["timestamp_ms"], record["values"]
    if type(step) is not int or not segment.start <= step <= segment.end:
        raise ValueError("a step outside the segment")
    if type(timestamp_ms) is not int or not 0 <= timestamp_ms < 2**63:
        raise ValueError("a time that is none")
    if not isinstance(values, dict) or any(type(value) not in (int, float) for value in values.values()):
        raise ValueError("values that are no numbers by name")
    return Point(step, timestamp_ms, {key: float(value) for key, value in values.items()})


def _all_segments(folder: Path) -> list[Segment]:
    named = [(_NAME.fullmatch(path.name), path) for path in folder.glob("*.jsonl")]
    return sorted(Segment(int(match[1]), int(match[2]), path) for match, path in named if match)
