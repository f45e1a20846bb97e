"""Whether MLflow keeps up: with a run of 200 workers, and with a search of 500 trials.

    python -m benchmarks.tracking_load --result docs/results/tracking_load.json

Both load a real `mlflow server` over a real PostgreSQL, on this machine, through the code that a driver runs.

The run: rank 0 puts a point of 12 metrics at each of 10 steps a second. Workers do not talk to MLflow, so that is all
that 200 of them send; as an upper bound, each of them has 3 metrics of its own every 10 seconds besides.

The search: 64 trials at a time, each of which commits a segment of 10 points of 12 metrics every 2 seconds and ends
after 6 to 14 of them, when the next trial begins. The driver's side is that of a search (`distmaml.trials.Trials`), the
trials' segments are written by another process.

The backlog is the time from a commit on the disk until MLflow has acknowledged it. At the end every point is read back
from the database itself.
"""

import contextlib
import heapq
import json
import multiprocessing
import os
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import psutil
import sqlalchemy
import tyro

from distmaml import paths, space
from distmaml.config import override
from distmaml.interrupt import Interrupt
from distmaml.journal import Journal
from distmaml.recipes.sinusoid import sinusoid_maml_5s
from distmaml.search import TIME, Trial
from distmaml.searchers import searcher
from distmaml.segments import SegmentWriter
from distmaml.tracking.database import Tracking, open_tracking
from distmaml.tracking.outbox import Outbox, Sent
from distmaml.tracking.runs import TrackedRun, settle
from distmaml.trial import of_trial
from distmaml.trials import Trials
from tests.servers import Postgres, Server

POINTS_A_SEGMENT = 10
SECONDS_A_SEGMENT = 2.0
MOST_SEGMENTS = 14
KEYS = tuple(f"{group}/metric_{number}" for group in ("train", "val", "system") for number in range(4))


class Writing(NamedTuple):
    """What the workers of one run write."""

    number: int
    """Of the run; the values of its points tell it from others."""
    folder: Path
    num_segments: int
    num_points: int
    """Of each segment."""
    own_keys: int = 0
    """Metrics of single workers, which every fifth segment has in its last point."""


def value_of(number: int, step: int, key: str) -> float:
    """What a point says: a function of what it is, so that it can be told whether it arrived as it was."""
    return 1000.0 * number + step + sum(key.encode()) / 2**16


def values_of(writing: Writing, segment: int, step: int) -> dict[str, float]:
    """The metrics of a step."""
    keys = list(KEYS)
    if step == (segment + 1) * writing.num_points and segment % 5 == 4:
        keys += [f"system/worker_{number // 3:03d}/metric_{number % 3}" for number in range(writing.own_keys)]
    return {key: value_of(writing.number, step, key) for key in keys}


# ------------------------------------------------------------------------------------- the workers' process


def write(orders: Any, committed: Any) -> None:
    """Writes the segments of all runs that are ordered, each at its time, and tells of each.

    Args:
      orders: queue of `Writing`; None ends it.
      committed: queue that gets (number, step, seconds since 1970, seconds of delay) of each commit.
    """
    due: list[tuple[float, int, int]] = []
    open_runs: dict[int, tuple[Writing, SegmentWriter]] = {}
    while True:
        wait = max(due[0][0] - time.time(), 0.0) if due else None
        with contextlib.suppress(queue.Empty):
            writing = orders.get(timeout=wait)
            if writing is None:
                return
            open_runs[writing.number] = writing, SegmentWriter(paths.metrics(writing.folder), 0)
            heapq.heappush(due, (time.time() + SECONDS_A_SEGMENT, writing.number, 0))
        while due and due[0][0] <= time.time():
            at, number, segment = heapq.heappop(due)
            writing, writer = open_runs[number]
            last = (segment + 1) * writing.num_points
            for step in range(last - writing.num_points + 1, last + 1):
                writer.put(step, values_of(writing, segment, step))
            writer.write(last)
            writer.commit(last)
            now = time.time()
            committed.put((number, last, now, now - at))
            if segment + 1 < writing.num_segments:
                heapq.heappush(due, (at + SECONDS_A_SEGMENT, number, segment + 1))


@contextlib.contextmanager
def workers() -> Iterator[tuple[Any, Any]]:
    """The process that writes, by its two queues."""
    spawning = multiprocessing.get_context("spawn")
    orders, committed = spawning.Queue(), spawning.Queue()
    process = spawning.Process(target=write, args=(orders, committed))
    process.start()
    try:
        yield orders, committed
    finally:
        orders.put(None)
        process.join()


# ----------------------------------------------------------------------------------------------- measuring


class Arrivals:
    """When MLflow had what: notes each `Sent` that an uploader writes down."""

    def __init__(self) -> None:
        self._steps: dict[Path, list[tuple[int, float]]] = {}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """A block whose uploaders are listened to."""
        write_sent = Outbox.write_sent

        def noting(outbox: Outbox, sent: Sent) -> None:
            self._steps.setdefault(outbox.run_folder, []).append((sent.step, time.time()))
            write_sent(outbox, sent)

        Outbox.write_sent = noting  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            Outbox.write_sent = write_sent  # type: ignore[method-assign]

    def of(self, folder: Path, step: int) -> float:
        """When MLflow had the points of a run up to a step; infinity for never."""
        return min((at for known, at in self._steps.get(folder, []) if known >= step), default=float("inf"))


class Meter(threading.Thread):
    """CPU time and threads while something goes on."""

    def __init__(self, processes: Mapping[str, int]) -> None:
        super().__init__(daemon=True)
        self._roots = {name: psutil.Process(pid) for name, pid in processes.items()}
        self._ended = threading.Event()
        self.most_threads = 0
        self.samples: list[tuple[float, dict[str, float]]] = []

    def run(self) -> None:
        families: dict[str, list[psutil.Process]] = {}
        while not self._ended.is_set():
            if len(self.samples) % 10 == 0:  # looking for them costs more than all the rest
                families = {name: _with_children(root) for name, root in self._roots.items()}
            seconds = {name: _cpu_seconds(family) for name, family in families.items()}
            self.samples.append((time.monotonic(), seconds))
            self.most_threads = max(self.most_threads, threading.active_count())
            self._ended.wait(1.0)

    def end(self) -> None:
        self._ended.set()
        self.join()

    def cores(self) -> dict[str, dict[str, float]]:
        """Mean number of cores in use, and the most in 10 seconds, by process."""
        found = {}
        for name in self._roots:
            points = [(at, seconds[name]) for at, seconds in self.samples]
            steps = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(points, points[10:], strict=False)]
            mean = (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
            found[name] = {"mean": round(mean, 3), "most": round(max(steps, default=mean), 3)}
        return found


def _with_children(process: psutil.Process) -> list[psutil.Process]:
    """A process and those below it as it begins; a driver alone, whose child stands for the workers."""
    return [process] if process.pid == os.getpid() else [process, *process.children(recursive=True)]


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def requests_in(log: Path, offset: int) -> Counter[str]:
    """How often the server was asked what, from a place in its log on."""
    counts: Counter[str] = Counter()
    with log.open() as lines:
        lines.seek(offset)
        for line in lines:
            _, quote, rest = line.partition('"')
            if quote and "HTTP/1" in rest:
                counts[rest.split("?")[0].split(" HTTP")[0].replace("/api/2.0/mlflow/", "")] += 1
    return counts


def summary(seconds: list[float]) -> dict[str, float]:
    """Percentiles."""
    ordered = sorted(seconds)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(ordered[min(int(part * len(ordered)), len(ordered) - 1)], 3) for name, part in at.items()}


def points_in(backend: str) -> dict[str, Counter[tuple[str, int, float]]]:
    """All points of the database, by the name of their run."""
    engine = sqlalchemy.create_engine(backend)
    query = "SELECT runs.name, metrics.key, metrics.step, metrics.value FROM metrics JOIN runs USING (run_uuid)"
    found: dict[str, Counter[tuple[str, int, float]]] = {}
    with engine.connect() as connection:
        for name, key, step, value in connection.execute(sqlalchemy.text(query)):
            found.setdefault(name, Counter())[key, step, value] += 1
    engine.dispose()
    return found


def lost_and_doubled(backend: str, writings: Mapping[str, Writing]) -> tuple[int, int, int]:
    """How many points there should be, are not there, and are there too much: again, or as none of ours."""
    found = points_in(backend)
    expected = lost = doubled = 0
    for name, writing in writings.items():
        wanted = Counter(
            (key, step, value)
            for segment in range(writing.num_segments)
            for step in range(segment * writing.num_points + 1, (segment + 1) * writing.num_points + 1)
            for key, value in values_of(writing, segment, step).items()
        )
        there = found.get(name, Counter())
        expected += wanted.total()
        lost += (wanted - there).total()
        doubled += (there - wanted).total()
    return expected, lost, doubled


# --------------------------------------------------------------------------------------------- the two loads


class Stage(NamedTuple):
    """Where it happens."""

    server: Server
    backend: str
    database: int | None
    """Process of the database."""
    folder: Path
    tracking: Tracking


def measured(stage: Stage, load: Callable[[Any, Any], tuple[dict[str, Writing], dict[str, Any]]]) -> dict[str, Any]:
    """Runs a load, and what it came to."""
    assert stage.server.process is not None
    processes = {"server": stage.server.process.pid, "driver": os.getpid()}
    if stage.database is not None:
        processes["database"] = stage.database
    arrivals, offset = Arrivals(), stage.server.log.stat().st_size
    commits: list[tuple[int, int, float, float]] = []
    with workers() as (orders, committed), arrivals.noted():
        meter = Meter(processes)
        meter.start()
        begun = time.monotonic()
        told: Any = _Tee(committed, commits)
        writings, record = load(orders, told)
        seconds = time.monotonic() - begun
        meter.end()
    names = {writing.number: name for name, writing in writings.items()}
    backlog = [arrivals.of(writings[names[number]].folder, step) - at for number, step, at, _ in commits]
    counts = requests_in(stage.server.log, offset)
    expected, lost, doubled = lost_and_doubled(stage.backend, writings)
    third = len(backlog) // 3
    return {
        **record,
        "seconds": round(seconds, 1),
        "segments": len(commits),
        "points": expected,
        "points_lost": lost,
        "points_doubled": doubled,
        "backlog_seconds": summary(backlog),
        "backlog_seconds_median_by_third": [
            round(statistics.median(backlog[first : first + third]), 3) for first in (0, third, 2 * third)
        ],
        "writer_late_seconds": summary([late for *_, late in commits]),
        "requests": counts.total(),
        "requests_a_second": round(counts.total() / seconds, 1),
        "requests_by_kind": dict(counts.most_common()),
        "cores": meter.cores(),
        "driver_threads": meter.most_threads,
    }


class _Tee:
    """A queue whose items are kept too."""

    def __init__(self, source: Any, kept: list[Any]) -> None:
        self._source, self._kept = source, kept

    def get(self) -> Any:
        item = self._source.get()
        self._kept.append(item)
        return item


def run_of_many_workers(stage: Stage, *, num_workers: int, seconds: float) -> dict[str, Any]:
    """One run."""
    num_segments = round(seconds / SECONDS_A_SEGMENT)
    writing = Writing(0, stage.folder / "runs" / "wide", num_segments, round(10 * SECONDS_A_SEGMENT), 3 * num_workers)

    def load(orders: Any, committed: Any) -> tuple[dict[str, Writing], dict[str, Any]]:
        run = TrackedRun.start(
            writing.folder, tracking=stage.tracking, experiment="wide", name="wide", params={}, tags={}
        )
        orders.put(writing)
        for _ in range(num_segments):
            committed.get()
        drained = run.end("FINISHED")
        status = stage.tracking.client().get_run(run.run_id).info.status
        return {"wide": writing}, {"workers": num_workers, "drained": drained, "statuses": {status: 1}}

    return measured(stage, load)


def segments_of(number: int) -> int:
    """How long a trial is: 6 to 14 segments, so that trials do not end together."""
    return 6 + 7 * number % 9


def ideal_seconds(num_trials: int, concurrency: int) -> float:
    """How long a search takes whose driver costs nothing: each trial begins when one ends."""
    ends = [0.0] * concurrency
    for number in range(num_trials):
        heapq.heapreplace(ends, ends[0] + segments_of(number) * SECONDS_A_SEGMENT)
    return max(ends)


def search_of_many_trials(stage: Stage, *, num_trials: int, concurrency: int) -> dict[str, Any]:
    """A search, by what its driver does."""
    num_steps = MOST_SEGMENTS * POINTS_A_SEGMENT
    settings = {"name": "load", "output_dir": stage.folder, "num_outer_steps": num_steps, "experiment": "load"}
    config = override(sinusoid_maml_5s(), settings)
    options = space.Search(space=("inner_lr=log:1e-3:1", "outer_lr=log:1e-4:1e-2"), scheduler="none")
    options = replace(options, num_samples=num_trials)
    chosen = space.parse(config, options.space)
    proposer = searcher("random", chosen, num_trials=num_trials, seed=0, mode="min")
    search_folder = paths.searches(stage.folder) / "load"

    def load(orders: Any, committed: Any) -> tuple[dict[str, Writing], dict[str, Any]]:
        parent = TrackedRun.start(
            search_folder, tracking=stage.tracking, experiment="load", name="load", params={}, tags={}
        )
        journal = Journal(paths.journal(search_folder))
        trials = Trials(config, options, proposer, journal, stage.tracking, parent.run_id, Interrupt())
        trials.plan(num_steps)
        running: dict[int, Trial] = {}
        writings: dict[str, Writing] = {}
        starts: list[float] = []
        ends: list[float] = []
        while trials.num_left or running:
            while trials.num_left and len(running) < concurrency:
                trial = trials.next()
                with timed(starts):
                    trials.started(trial)
                running[trial.number] = trial
                own = of_trial(config, trial)
                name = own.run.name or ""
                num_segments = segments_of(trial.number)
                writings[name] = Writing(trial.number, paths.run_folder(own), num_segments, POINTS_A_SEGMENT)
                orders.put(writings[name])
            number, step, *_ = committed.get()
            trials.reported(running[number], {TIME: float(step), config.evaluation.selection_metric: 1 / step})
            if step == segments_of(number) * POINTS_A_SEGMENT:
                with timed(ends):
                    trials.ended(running.pop(number), "finished" if step == num_steps else "pruned", None)
        settled = settle(stage.tracking, 60.0)
        parent.end("FINISHED")
        client = stage.tracking.client()
        found = client.search_runs([parent.experiment_id], "tags.`distmaml.kind` = 'trial'", max_results=50_000)
        record = {
            "trials": num_trials,
            "concurrency": concurrency,
            "ideal_seconds": ideal_seconds(num_trials, concurrency),
            "statuses": dict(Counter(run.info.status for run in found)),
            "trials_with_all_parameters": sum("log10_inner_lr" in run.data.params for run in found),
            "settled": settled,
            "driver_waits_at_start_seconds": summary(starts),
            "driver_waits_at_end_seconds": summary(ends),
            "driver_waited_seconds": round(sum(starts) + sum(ends), 1),
        }
        return writings, record

    return measured(stage, load)


@contextlib.contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Notes how long a block takes."""
    before = time.monotonic()
    yield
    into.append(time.monotonic() - before)


def measure(
    folder: Path,
    backend: str,
    server_workers: int,
    num_workers: int,
    seconds: float,
    num_trials: int,
    concurrency: int,
) -> dict[str, Any]:
    """Both loads, on servers of their own."""
    postgres = Postgres(folder) if backend == "postgres" else None
    uri = postgres.uri if postgres else f"sqlite:///{folder / 'server.db'}"
    server = Server(folder, backend=uri, workers=server_workers)
    try:
        if postgres:
            postgres.start()
        server.start()
        process = postgres.process.pid if postgres and postgres.process else None
        stage = Stage(server, uri, process, folder / "output", open_tracking(folder / "output", server.uri))
        record: dict[str, Any] = {"backend": backend, "server_workers": server_workers, "cpus": os.cpu_count()}
        if num_workers:
            record["run_of_many_workers"] = run_of_many_workers(stage, num_workers=num_workers, seconds=seconds)
        if num_trials:
            record["search_of_many_trials"] = search_of_many_trials(
                stage, num_trials=num_trials, concurrency=concurrency
            )
    finally:
        server.stop()
        if postgres:
            postgres.stop()
    return record


def main(
    backend: Literal["postgres", "sqlite"] = "postgres",
    server_workers: int = 1,
    num_workers: int = 200,
    seconds: float = 60.0,
    num_trials: int = 500,
    concurrency: int = 64,
    result: Annotated[Path | None, tyro.conf.arg(help="JSON file for the results")] = None,
) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="load") as folder:
        record = measure(Path(folder), backend, server_workers, num_workers, seconds, num_trials, concurrency)
    text = json.dumps(record, indent=2) + "\n"
    sys.stdout.write(text)
    if result:
        result.write_text(text)


if __name__ == "__main__":
    tyro.cli(main)
