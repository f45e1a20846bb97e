"""The training loop beside the bare meta-gradient, and two workers beside one, as ratios within one run.

Two bare processes that have nothing to do with each other say what a second core of the machine is worth: cores share
their memory and their clock.

Then a step of the loop by its parts: functions that `loop.train` calls are wrapped here, and the product knows nothing
of it. The thread that builds the next tasks meanwhile is measured alone, as images a second; what it takes from the
gradient, by Python's lock and where a worker has one core, stands in the gradient's time. The checkpoint's part is
what one costs, spread over the recipe's `checkpoint_every`; a point is logged after every step, which a recipe does
less often. Validation is no part of it.

    python -m benchmarks.pipeline --recipe omniglot-maml-5w1s --output-dir DIR

Each round trains a few outer steps in fresh processes of one thread, interleaved, so that what else the machine does
meets all of them alike; the medians over the rounds are printed and written as JSON.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from benchmarks import machine
from distmaml import build, collectives, loop, outer, paths
from distmaml.config import Config, override
from distmaml.episodes import TaskBatch
from distmaml.launch import WORKER_ENVIRONMENT
from distmaml.meter import Meter
from distmaml.outer import chunk_sum
from distmaml.prefetch import prefetched
from distmaml.recipes import RECIPES
from distmaml.recorder import Recorder
from distmaml.segments import committed_segments, read_points
from distmaml.trees import tree_leaves, tree_to
from distmaml.worker import LocalWorker

STEPS, WARM_UP = 16, 2
CHECKPOINT_EVERY = 4
"""Where a step is measured by its parts: one a process would be too few for a median."""
EPISODES, GRADIENT, CHECKPOINT, REST, WHOLE = "episodes", "gradient", "checkpoint", "rest", "whole"
WRAPPED: dict[str, list[tuple[object, str]]] = {
    GRADIENT: [(outer, "chunk_sum")],
    "all-reduce": [(collectives, "mean_over_tasks")],
    "outer step": [(outer, "outer_step")],
    "tracking": [
        (Recorder, "points"), (Recorder, "progress"), (Recorder, "asked_to_save"), (Meter, "add"), (Meter, "read"),
        (outer, "parameter_norm"), (loop, "floats"),
    ],
    CHECKPOINT: [(Recorder, "checkpoint")],
}  # fmt: skip
"""Part of a step -> the functions it is made of, none of which calls another. `EPISODES` is the wait for the tasks."""
PARTS = (EPISODES, *WRAPPED, REST)
LARGEST_SHARE, FEWEST_IMAGES = 0.05, 20_000
"""What is aimed at: of a step, outside the gradient; a second, built on one core."""


class _Rank(LocalWorker):
    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size


def bare(config: Config, rank: int, world_size: int, meeting: str, answer: Connection) -> None:
    """Tasks per second of the meta-gradient alone, on tasks that are there already."""
    torch.set_num_threads(1)
    tasks = build.task_distributions(config)["train"]
    device, dtype = torch.device("cpu"), torch.float32
    learner = build.learner(config, build.shapes(tasks), device)
    size, chunk = config.outer.meta_batch_size, config.outer.reduction_chunk
    batches = [tree_to(tasks.sample(range(i, min(i + chunk, size))), device, dtype) for i in range(0, size, chunk)]
    rates = []
    for step in range(STEPS):
        begun = time.perf_counter()
        for batch in batches:
            chunk_sum(learner.algorithm, learner.meta_params, batch, step, vectorize=learner.vectorize)
        rates.append(size / (time.perf_counter() - begun))
    answer.send((rank, statistics.median(rates[WARM_UP:])))


def trained(config: Config, rank: int, world_size: int, meeting: str, answer: Connection) -> None:
    """Tasks per second of `loop.train`, by its own system/tasks_per_second."""
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    loop.train(config, _Rank(rank, world_size))
    if rank == 0:
        segments = committed_segments(paths.metrics(paths.run_folder(config)), -1)
        points = [point for segment in segments for point in read_points(segment)]
        answer.send((rank, statistics.median([point.values["system/tasks_per_second"] for point in points[WARM_UP:]])))
    if world_size > 1:
        dist.destroy_process_group()


def sampled(config: Config, rank: int, world_size: int, meeting: str, answer: Connection) -> None:
    """Images per second that the training tasks build, in chunks as the loop asks for them."""
    torch.set_num_threads(1)
    tasks = build.task_distributions(config)["train"]
    chunk, rates = config.outer.reduction_chunk, []
    for step in range(10 * STEPS):
        begun = time.perf_counter()
        batch = tree_to(tasks.sample(range(step * chunk, (step + 1) * chunk)), torch.device("cpu"), torch.float32)
        seconds = time.perf_counter() - begun
        rates.append(_num_images(batch) / seconds)
    answer.send((rank, statistics.median(rates[WARM_UP:])))


# ------------------------------------------------------------------------------------------ a step by its parts


class Clock:
    """Adds up seconds by part of a step, from outside.

    Attributes:
      steps: for each step so far the seconds of its parts, and of the `WHOLE` once it has ended.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time added to a part of the step under way; before the first step to nothing."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if self.steps:
                    step, seconds = self.steps[-1], time.perf_counter() - begun
                    step[name] = step.get(name, 0.0) + seconds

        return timed

    def loop(self, function: Callable[..., Iterable[Any]]) -> Callable[..., Iterator[Any]]:
        """What the loop goes over: a step lasts from asking for its tasks to asking for the next one's, or the end."""

        def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
            begun = time.perf_counter()
            for tasks in function(*args, **kwargs):
                step = {EPISODES: time.perf_counter() - begun}
                self.steps.append(step)
                try:
                    yield tasks
                finally:  # the loop may leave without asking again
                    ended = time.perf_counter()
                    step[WHOLE], begun = ended - begun, ended

        return timed


def timed_steps(config: Config) -> list[dict[str, float]]:
    """Seconds of each part, and of the whole, of every step of `loop.train` in this process."""
    clock = Clock()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(loop, "prefetched", clock.loop(prefetched)))
        for part, functions in WRAPPED.items():
            for owner, name in functions:
                stack.enter_context(mock.patch.object(owner, name, clock.part(part, getattr(owner, name))))
        loop.train(config, LocalWorker())
    return [{**dict.fromkeys(PARTS, 0.0), **step, REST: 2 * step[WHOLE] - sum(step.values())} for step in clock.steps]


def by_parts(config: Config, rank: int, world_size: int, meeting: str, answer: Connection) -> None:
    """The steps of `timed_steps`."""
    torch.set_num_threads(1)
    answer.send((rank, timed_steps(config)[WARM_UP:]))


def milliseconds(steps: Sequence[Mapping[str, float]], checkpoint_every: int) -> dict[str, float]:
    """The median of each part, and what a checkpoint costs spread over the steps between two."""
    found = {part: 1e3 * statistics.median(step[part] for step in steps) for part in PARTS}
    checkpoints = [step[CHECKPOINT] for step in steps if step[CHECKPOINT] > 0]
    found[CHECKPOINT] = 1e3 * statistics.median(checkpoints) / checkpoint_every if checkpoints else 0.0
    return found


# ---------------------------------------------------------------------------------------------------- processes


def measure(function: Callable[..., None], config: Config, world_size: int) -> float:
    """Runs a function in `world_size` fresh processes; returns the sum of what they send."""
    rates: Iterable[float] = answers(function, config, world_size).values()
    return sum(rates)


def answers(function: Callable[..., None], config: Config, world_size: int) -> dict[int, Any]:
    """Runs a function in `world_size` fresh processes; returns what they send, by rank.

    Raises:
      SystemExit: one of them failed.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        name = f"benchmark-{time.time_ns()}"
        config = replace(config, run=replace(config.run, name=name))
        arguments = [(config, rank, world_size, f"{folder}/meeting", send) for rank in range(world_size)]
        workers = [context.Process(target=function, args=entry) for entry in arguments]
        for worker in workers:
            worker.start()
        send.close()  # so that a worker that dies is an end of file here, and not a wait for ever
        found: dict[int, Any] = {}
        with contextlib.suppress(EOFError):  # all have ended
            while True:
                rank, value = receive.recv()
                found[rank] = value
        for worker in workers:
            worker.join()
        shutil.rmtree(paths.run_folder(config), ignore_errors=True)
    if not found or any(worker.exitcode for worker in workers):
        raise SystemExit(f"a worker of {config.run.name} failed; what it said stands above.")
    return found


def main(
    recipe: str = "omniglot-maml-5w1s",
    data_dir: Path | None = None,
    output_dir: Path | None = None,
    rounds: int = 5,
    num_inner_steps: int | None = None,
    result: Annotated[Path | None, tyro.conf.arg(help="JSON file for the result")] = None,
) -> None:
    """Measure and print."""
    os.environ.update(WORKER_ENVIRONMENT)
    values = {
        "num_outer_steps": STEPS, "val_every": 0, "log_every": 1, "checkpoint_every": STEPS, "schedule": "constant",
        "data_dir": data_dir, "output_dir": paths.output_dir(output_dir),
    }  # fmt: skip
    config = override(RECIPES[recipe](), {k: v for k, v in values.items() if v is not None})
    if num_inner_steps is not None:
        config = override(config, {"num_inner_steps": num_inner_steps})
    one = build.task_distributions(config)["train"].sample([0])
    functions = {"bare": bare, "loop": trained}
    rates: dict[str, list[float]] = {f"{what}, {n}": [] for n in (1, 2) for what in functions}
    images: list[float] = []
    steps: list[dict[str, float]] = []
    for _ in range(rounds):
        for case, found in rates.items():
            what, number = case.split(", ")
            found.append(measure(functions[what], config, int(number)))
        images.append(measure(sampled, config, 1))
        for part in answers(by_parts, override(config, {"checkpoint_every": CHECKPOINT_EVERY}), 1).values():
            steps.extend(part)
    for case, found in rates.items():
        each = ", ".join(f"{rate:.1f}" for rate in found)
        sys.stdout.write(f"{case} {statistics.median(found):6.1f} tasks/s   ({each})\n")
    for above, below, says in (
        ("loop, 1", "bare, 1", "the loop keeps {:.1%} of the bare meta-gradient"),
        ("loop, 2", "loop, 1", "two workers of a run give {:.2f} times one"),
        ("bare, 2", "bare, 1", "two processes that share nothing give {:.2f} times one"),
        ("loop, 2", "bare, 2", "two workers of a run keep {:.1%} of two processes that share nothing"),
    ):
        ratios = [a / b for a, b in zip(rates[above], rates[below], strict=True)]
        sys.stdout.write(says.format(statistics.median(ratios)) + "\n")
    parts = _report(
        steps, images, RECIPES[recipe]().run.checkpoint_every, config.outer.meta_batch_size * _num_images(one)
    )
    if result:
        record = {"recipe": recipe, "rates": rates, "parts": parts, "images_per_second": images,
                  "machine": machine.description()}  # fmt: skip
        result.write_text(json.dumps(record, indent=2) + "\n")


def _report(
    steps: Sequence[Mapping[str, float]], images: Sequence[float], checkpoint_every: int, images_per_step: int
) -> dict[str, Any]:
    """Prints and returns the parts of a step; shares are of the sum of the medians."""
    found = milliseconds(steps, checkpoint_every)
    whole = sum(found.values())
    outside = 1 - found[GRADIENT] / whole
    rate = statistics.median(images)
    building = 1e3 * images_per_step / rate
    sys.stdout.write(f"\na step of the loop by its parts, median of {len(steps)} steps\n")
    for part, value in found.items():
        spread = f", one in {checkpoint_every} steps" if part == CHECKPOINT else ""
        sys.stdout.write(f"{part:10s} {value:9.3f} ms {value / whole:7.2%}{spread}\n")
    sys.stdout.write(f"outside the gradient: {outside:.2%} of a step; the aim is at most {LARGEST_SHARE:.0%}\n")
    sys.stdout.write(
        f"building of tasks on one core: {rate:,.0f} images/s; the aim is {FEWEST_IMAGES:,}\n"
        f"the {images_per_step} images of a step take another thread {building:.3f} ms, {building / whole:.2%} of it\n"
    )
    return {
        "steps": len(steps), "milliseconds": found, "share": {part: value / whole for part, value in found.items()},
        "outside_gradient": outside, "checkpoint_every": checkpoint_every, "building_milliseconds": building,
    }  # fmt: skip


def _num_images(tasks: TaskBatch) -> int:
    """Support and query, of all tasks."""
    images: Iterable[Tensor] = (tree_leaves(part)[0] for part in (tasks.support, tasks.query))
    return sum(leaf.shape[:2].numel() for leaf in images)


if __name__ == "__main__":
    tyro.cli(main)
