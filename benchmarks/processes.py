"""A process that computes one contender's gradient when it is told to, and says how long it took and what memory.

`Process` starts it and talks to it in lines of JSON. Linux keeps the peak of the resident memory.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import torch
import tyro
from torch.autograd.profiler import profile

from benchmarks.machine import ROOT
from benchmarks.peers import CONTENDERS, MODELS, Workload, module_of, random_tasks

MATMUL = "matmul"
"""No contender: the product of two matrices, which is the fastest that a processor computes."""
MATMUL_SIZE = 2048
MATMUL_FLOPS = 2 * MATMUL_SIZE**3
QUIET = {"KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""The profiler says on the terminal that it begins and ends."""
Prepare: TypeAlias = Callable[[int], Callable[[], object]]
"""From a seed to what is timed."""


class Measured(NamedTuple):
    """What a process answers.

    Attributes:
      seconds: of the meta-gradient of all tasks.
      peak_bytes: the largest resident memory so far, less what stood after imports and a small first gradient, which
        loads what is loaded only then.
      live_bytes: the largest sum of the sizes of all tensors that were alive at once, those that autograd keeps among
        them; only where it was asked for, as it costs time.
    """

    seconds: float
    peak_bytes: int
    live_bytes: int | None


class Process:
    """A process of one contender, that computes when it is told to."""

    def __init__(self, contender: str, workload: Workload, environment: dict[str, str]) -> None:
        """Starts it; it gets ready by itself.

        Args:
          environment: how many threads, and what else its users set; nothing of that is inherited.
        """
        self.contender = contender
        command = [sys.executable, "-m", "benchmarks.processes", contender, *map(str, workload)]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_", "MALLOC_"))}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=inherited | QUIET | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._to, self._from = self.process.stdin, self.process.stdout

    def prepare(self, seed: int, *, live: bool = False) -> None:
        """Has it make new tasks; returns at once.

        Args:
          live: whether the tensors that are alive shall be added up.
        """
        self._say({"seed": seed, "live": live})

    def prepared(self) -> None:
        """Waits for the tasks."""
        self._hear()

    def go(self) -> None:
        """Has it compute; returns at once."""
        self._say({})

    def measured(self) -> Measured:
        """Waits for the result."""
        return Measured(**self._hear())

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()
        self._from.close()
        with suppress(BrokenPipeError):  # of what it has not read
            self._to.close()

    def _say(self, message: Mapping[str, object]) -> None:
        with suppress(BrokenPipeError):  # that it has ended is said when its answer is missing
            self._to.write(json.dumps(message) + "\n")
            self._to.flush()

    def _hear(self) -> dict[str, Any]:
        line = self._from.readline()
        if not line:
            raise SystemExit(f"the process of {self.contender} has ended; what it said stands above.")
        heard: dict[str, Any] = json.loads(line)
        return heard


def serve(
    contender: Annotated[str, tyro.conf.Positional],
    num_inner_steps: Annotated[int, tyro.conf.Positional],
    num_tasks: Annotated[int, tyro.conf.Positional],
    model: Annotated[str, tyro.conf.Positional],
) -> None:
    """The other side: on a seed it makes tasks, and says so; on the next line it computes, and answers."""
    prepare = _product() if contender == MATMUL else _gradient(contender, Workload(num_inner_steps, num_tasks, model))
    before = _resident("VmRSS")
    with suppress(OSError):  # where it cannot be set back, the peak of the imports stands in for a smaller one
        Path("/proc/self/clear_refs").write_text("5")
    while line := sys.stdin.readline():
        asked = json.loads(line)
        compute = prepare(asked["seed"])
        _answer({})
        sys.stdin.readline()
        if asked["live"]:
            live, seconds = peak_of_live_bytes(compute)
        else:
            live, seconds = None, _seconds(compute)
        _answer(Measured(seconds, _resident("VmHWM") - before, live)._asdict())


def _gradient(contender: str, workload: Workload) -> Prepare:
    compute = CONTENDERS[contender](module_of(workload, torch.float32), workload.num_inner_steps)
    channels, *_ = MODELS[workload.model][0]
    compute(random_tasks(1, 0, torch.float32, shape=(channels, 16, 16), num_queries=1))

    def prepare(seed: int) -> Callable[[], object]:
        tasks = random_tasks(workload.num_tasks, seed, torch.float32, shape=MODELS[workload.model][0])
        return lambda: compute(tasks)

    return prepare


def _product() -> Prepare:
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE).unbind()
    return lambda seed: lambda: a @ b


def _seconds(compute: Callable[[], object]) -> float:
    begun = time.perf_counter()
    compute()
    return time.perf_counter() - begun


def peak_of_live_bytes(compute: Callable[[], object]) -> tuple[int, float]:
    """The largest sum of the sizes of all tensors that were made and alive at once, and seconds."""
    with profile(use_kineto=True, profile_memory=True) as profiler:
        seconds = _seconds(compute)
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, seconds


def _resident(field: Literal["VmRSS", "VmHWM"]) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def _answer(message: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    tyro.cli(serve)
