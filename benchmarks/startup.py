"""What a run does from its command to its first outer step, by part, and whose time that is.

    python -m benchmarks.startup --result FILE

Every round starts the real ``python jobs/train.py`` on the embedded glyphs, with one worker and with two, first in an
empty output folder (cold: the store, the database and the experiment are made) and then in the same one again (warm).
`clock/sitecustomize.py` takes the times from outside, in all processes. Each moment counts for the innermost process
that the first step waits for and that does something timed: rank 0, else Ray Train's controller, else the main thread
of the command; there, for the call or import that began last. So the parts of one start are a division of its time.

Two other witnesses tell of the same end: the file in which rank 0 says how far it is, looked for from outside a hundred
times a second; and that in starts without the clock, in turn with the others, for the clock costs something too.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import psutil
import tyro

from benchmarks import machine

ROOT = Path(__file__).parents[1]
COMMAND = (
    sys.executable, "jobs/train.py", "glyphs-maml-5w1s", "--num-outer-steps", "100000", "--val-every", "0",
    "--num-test-episodes", "0",
)  # fmt: skip
LOOK_SECONDS = 0.01
LONGEST = 300.0
LEAST_SECONDS = 0.005
"""Of a row of the table."""

IMPORTS, RAY, DATABASE, STORE, OURS = "imports", "Ray", "first database", "first store", "ours"
WHOSE = (IMPORTS, RAY, DATABASE, STORE, OURS)

PARTS = {
    "interpreter": ("Python itself", IMPORTS),
    "import torch": ("import torch", IMPORTS),
    "import mlflow": ("import mlflow", IMPORTS),
    "import ray": ("import ray", IMPORTS),
    "import distmaml": ("our own modules", OURS),
    "import": ("import others", IMPORTS),
    "distmaml.cli": ("options read", OURS),
    "distmaml.preflight": ("checks, rehearsal", OURS),
    "distmaml.rehearsal": ("checks, rehearsal", OURS),
    "distmaml.datasets": ("store made", STORE),
    "distmaml.store": ("store opened, verified", OURS),
    "distmaml.tracking.database:_create_database": ("database made", DATABASE),
    "distmaml.tracking.database": ("database opened", OURS),
    "distmaml.tracking": ("MLflow run", OURS),
    "distmaml.ray_cluster": ("ray.init", RAY),
    "distmaml.launch": ("the run handed over", OURS),
    "distmaml.launch:_fit": ("Ray Train", RAY),
    "ray.train.v2._internal.execution.controller": ("Ray Train: controller", RAY),
    "ray.train": ("Ray Train: worker group", RAY),
    "ray.train.v2._internal.callbacks.backend_setup": ("process group", RAY),
    "ray.train.torch.config": ("process group", RAY),
    "distmaml.build": ("tasks and learner", OURS),
    "distmaml.loop": ("loop, around the step", OURS),
    "distmaml.recorder": ("loop, around the step", OURS),
    "distmaml.outer": ("gradient and step", OURS),
    "distmaml.collectives": ("gradient and step", OURS),
}
"""How what the clock writes begins -> the part, and whose it is; the longest that fits."""
_BETWEEN = ("command", "between", OURS)

Parts = dict[tuple[str, str, str], float]
"""Seconds by (process, part, whose)."""


class Span(NamedTuple):
    """What a process did: begin and end in seconds since the start of the command; whether in its main thread."""

    what: str
    begun: float
    ended: float
    main: bool


class Start(NamedTuple):
    """One start: its parts, the seconds until rank 0's file was seen from outside, and those of CPU by then."""

    parts: Parts
    seen: float
    cpu: float


def start(num_workers: int, output_dir: Path, *, clocked: bool) -> Start:
    """Starts a run, and stops it after its first step."""
    name = f"startup-{time.time_ns()}"
    progress = output_dir / "runs" / name / "progress.json"
    command = [*COMMAND, "--num-workers", str(num_workers), "--output-dir", str(output_dir), "--name", name]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        path = [*([str(ROOT / "benchmarks" / "clock")] if clocked else []), str(ROOT)]
        environment = {"PYTHONPATH": os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])}
        if clocked:
            environment["STARTUP_CLOCK"] = folder
        begun = _now()
        with subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=said, stderr=subprocess.STDOUT
        ) as process:
            while not progress.exists() and process.poll() is None and _now() - begun < LONGEST:
                time.sleep(LOOK_SECONDS)
            seen, stepped = _now() - begun, progress.exists()
            cpu = _cpu_seconds(process.pid)
            process.send_signal(signal.SIGINT)
        if not stepped:
            said.seek(0)
            raise SystemExit(f"the run came to no step in {seen:.0f} s; it said:\n{said.read()}")
        spans = {int(file.stem): list(_spans(file, begun)) for file in Path(folder).glob("*.jsonl")}
    return Start(divided(spans, process.pid) if clocked else {}, seen, cpu)


def _cpu_seconds(pid: int) -> float:
    """What a process and all its descendants have used; of those that are over, what somebody has waited for."""
    used = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        command = psutil.Process(pid)
        for process in (command, *command.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                used += sum(process.cpu_times()[:4])
    return used


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _spans(file: Path, begun: float) -> Iterator[Span]:
    for line in file.read_text().splitlines():
        record = json.loads(line)
        yield Span(record["what"], record["begun"] - begun, record["ended"] - begun, record["main"])


def divided(spans: Mapping[int, list[Span]], command: int) -> Parts:
    """The time until the end of the first outer step, by part.

    Args:
      spans: by process.
      command: the process of the command.
    """
    rank_0 = _that_did("distmaml.recorder:Recorder.__init__", spans)
    controller = _that_did("ray.train.v2._internal.execution.controller", spans)
    end = min(span.ended for span in spans[rank_0] if span.what == "distmaml.outer:outer_step")
    processes = {
        "worker": spans[rank_0],
        "controller": spans[controller],
        "command": [span for span in spans[command] if span.main],
    }
    moments = {t for each in processes.values() for span in each for t in (span.begun, span.ended) if 0 < t < end}
    parts: Parts = defaultdict(float)
    for begun, ended in itertools.pairwise(sorted({0.0, *moments, end})):
        parts[_part((begun + ended) / 2, processes)] += ended - begun
    return dict(parts)


def _that_did(what: str, spans: Mapping[int, list[Span]]) -> int:
    (process,) = (process for process, each in spans.items() if any(span.what.startswith(what) for span in each))
    return process


def _part(moment: float, processes: Mapping[str, list[Span]]) -> tuple[str, str, str]:
    for process, spans in processes.items():
        under_way = [span for span in spans if span.begun <= moment < span.ended]
        if under_way:
            what = max(under_way, key=lambda span: span.begun).what
            return (process, *PARTS[max((prefix for prefix in PARTS if what.startswith(prefix)), key=len)])
    return _BETWEEN


def table(clocked: Mapping[str, list[Start]], bare: Mapping[str, list[Start]]) -> str:
    """Medians over the rounds, in seconds.

    Args:
      clocked: the starts of each case; likewise `bare`, those without the clock.
    """

    def line(title: str, values: Callable[[str], list[float]]) -> str:
        return f"{title:48s}" + "".join(f"{statistics.median(values(case)):>17.2f}" for case in clocked)

    def of_part(key: tuple[str, str, str]) -> Callable[[str], list[float]]:
        return lambda case: [found.parts.get(key, 0.0) for found in clocked[case]]

    def of(*whose: str) -> Callable[[str], list[float]]:
        return lambda case: [sum(s for key, s in found.parts.items() if key[2] in whose) for found in clocked[case]]

    lines = [" " * 48 + "".join(f"{case:>17s}" for case in clocked)]
    for key in sorted({key for each in clocked.values() for found in each for key in found.parts}, key=_place):
        if max(statistics.median(of_part(key)(case)) for case in clocked) >= LEAST_SECONDS:
            lines.append(line("{:11s} {:25s} {}".format(*key), of_part(key)))
    lines += ["", *(line(f"all of it: {whose}", of(whose)) for whose in WHOSE)]
    lines.append(line("all parts, until the first step's end", of(*WHOSE)))
    lines.append(line("rank 0's file, seen from outside", lambda case: [found.seen for found in clocked[case]]))
    if any(bare.values()):
        lines.append(line("the same, without the clock", lambda case: [found.seen for found in bare[case]]))
        lines.append(line("seconds of CPU by then, all processes", lambda case: [found.cpu for found in bare[case]]))
    return "\n".join(lines)


def _place(key: tuple[str, str, str]) -> tuple[int, int]:
    process, part, _ = key
    names = [name for name, _ in PARTS.values()]
    return ("command", "controller", "worker").index(process), names.index(part) if part in names else len(names)


def main(
    rounds: int = 5,
    workers: tuple[int, ...] = (1, 2),
    bare: bool = True,
    result: Annotated[Path | None, tyro.conf.arg(help="JSON file for the result")] = None,
) -> None:
    """Measure and print.

    Args:
      rounds: after one that does not count.
      workers: numbers of workers.
      bare: also without the clock.
    """
    cases = {f"{n} worker{'s' * (n > 1)}, {heat}": n for n in workers for heat in ("cold", "warm")}
    starts: dict[bool, dict[str, list[Start]]] = {clocked: {case: [] for case in cases} for clocked in (True, False)}
    for number in range(rounds + 1):
        for n, clocked in itertools.product(workers, (True, False) if bare else (True,)):
            output_dir = Path(tempfile.mkdtemp(prefix="startup-"))
            try:
                for case in (case for case in cases if cases[case] == n):
                    found = start(n, output_dir, clocked=clocked)
                    with_clock = "" if clocked else ", without the clock"
                    sys.stderr.write(f"round {number}: {case}{with_clock}: {found.seen:.1f} s\n")
                    if number:
                        starts[clocked][case].append(found)
            finally:
                shutil.rmtree(output_dir)
    sys.stdout.write(table(starts[True], starts[False]) + "\n")
    if result:
        record = {
            "clocked": {case: [_as_json(found) for found in each] for case, each in starts[True].items()},
            "bare": {case: [_as_json(found) for found in each] for case, each in starts[False].items()},
            "machine": machine.description(),
        }
        result.write_text(json.dumps(record, indent=2) + "\n")


def _as_json(found: Start) -> dict[str, Any]:
    parts = [(*key, round(found.parts[key], 4)) for key in sorted(found.parts, key=_place)]
    return {"parts": parts, "seen": round(found.seen, 3), "cpu": round(found.cpu, 2)}


if __name__ == "__main__":
    tyro.cli(main)
