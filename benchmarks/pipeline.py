"""The training loop beside the bare meta-gradient, and two workers beside one, as ratios within one run.

Two bare processes that have nothing to do with each other say what a second core of the machine is worth: cores share
their memory and their clock.

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
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import tyro

from distmaml import build, loop, paths
from distmaml.config import Config, override
from distmaml.launch import WORKER_ENVIRONMENT
from distmaml.outer import chunk_sum
from distmaml.recipes import RECIPES
from distmaml.segments import committed_segments, read_points
from distmaml.trees import tree_to
from distmaml.worker import LocalWorker

STEPS = 16


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
    answer.send((rank, statistics.median(rates[2:])))


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
        answer.send((rank, statistics.median([point.values["system/tasks_per_second"] for point in points[2:]])))
    if world_size > 1:
        dist.destroy_process_group()


def measure(function: Callable[..., None], config: Config, world_size: int) -> float:
    """Runs a function in `world_size` fresh processes; returns the sum of what they send."""
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
        rates: dict[int, float] = {}
        with contextlib.suppress(EOFError):  # all have ended
            while True:
                rank, rate = receive.recv()
                rates[rank] = rate
        for worker in workers:
            worker.join()
        shutil.rmtree(paths.run_folder(config), ignore_errors=True)
    if not rates or any(worker.exitcode for worker in workers):
        raise SystemExit(f"a worker of {config.run.name} failed; what it said stands above.")
    return sum(rates.values())


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


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
    build.task_distributions(config)
    functions = {"bare": bare, "loop": trained}
    rates: dict[str, list[float]] = {f"{what}, {n}": [] for n in (1, 2) for what in functions}
    for _ in range(rounds):
        for case, found in rates.items():
            what, number = case.split(", ")
            found.append(measure(functions[what], config, int(number)))
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
    if result:
        record = {"recipe": recipe, "rates": rates, "machine": _processor(), "cores": os.cpu_count(),
                  "torch": torch.__version__}  # fmt: skip
        result.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
