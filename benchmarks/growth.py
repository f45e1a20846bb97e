"""How the cost of the meta-gradient grows with the work: at most in proportion, which is a slope of 1 on log-log axes.

    python -m benchmarks.growth --output FILE

One axis at a time is varied and the others stay where `BASE` has them: second-order MAML with one inner step, 5-way
1-shot, Conv4 with 64 filters, on 28x28 images of noise; with one query a class, as many would hide what the support
costs. Measured is what `benchmarks.peers` calls distmaml, on one thread, in a process in the environment of distmaml's
workers:

    seconds      of the processor, so that whoever else uses it counts only by the caches and the memory that all share;
                 the median over the rounds: a round measures every point once, and each begins with another
    live bytes   the sizes of all tensors that are alive at once, at their most

Filters are reported as the number of parameters, which grows with their square, as the arithmetic does. The slope is
that of the least squares through the logarithms. A cost that does not grow, as of the first layers, flattens it at the
small end: what counts is the upper half of the range.

The number of workers is no axis here: `benchmarks.pipeline` measures two beside one, and `benchmarks.scaling` what a
step of many costs.
"""

import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro

from benchmarks import machine
from benchmarks.peers import distmaml
from benchmarks.processes import QUIET, peak_of_live_bytes
from distmaml.episodes import Batch, Episode, TaskBatch
from distmaml.launch import WORKER_ENVIRONMENT
from distmaml.models.conv4 import Conv4

LARGEST_SLOPE = 1.05
"""Over the upper half of the range: what passes for at most linear."""
INPUT_SHAPE = (1, 28, 28)
MIB = 2**20


class Point(NamedTuple):
    """What is computed at a time."""

    tasks: int = 4
    ways: int = 5
    shots: int = 1
    inner_steps: int = 1
    filters: int = 64
    queries: int = 1
    """A class."""


BASE = Point()
AXES: dict[str, tuple[int, ...]] = {
    "tasks": (1, 2, 4, 8, 16),
    "ways": (5, 10, 20, 28, 40),
    "shots": (1, 2, 5, 10, 20),
    "inner_steps": (1, 2, 4, 8, 16),
    "filters": (16, 32, 64, 96, 128),
}
"""A field of `Point` -> its values."""


class Cost(NamedTuple):
    """What a point took."""

    seconds: list[float]
    """Of the processor, a value for each round."""
    live_bytes: int


# ------------------------------------------------------------------------------------------------ measured


def costs(points: Sequence[Point], rounds: int) -> dict[Point, Cost]:
    """Seconds and live bytes of the meta-gradient of each point, in this process on one thread."""
    torch.set_num_threads(1)
    works = {point: partial(distmaml(model(point), point.inner_steps), random_tasks(point)) for point in points}
    found = {}
    for point, work in works.items():
        work()  # a warm-up: compiled loops are loaded
        found[point] = Cost([], peak_of_live_bytes(work)[0])
    order = list(works)
    for number in range(rounds):
        first = number % len(order)
        for point in (*order[first:], *order[:first]):
            begun = time.process_time()
            works[point]()
            found[point].seconds.append(time.process_time() - begun)
    return found


def model(point: Point) -> Conv4:
    """The model, always with the same initial parameters."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Conv4(INPUT_SHAPE, point.ways, num_filters=point.filters)


def random_tasks(point: Point) -> TaskBatch:
    """Tasks of normal noise, ``[num_tasks, num_samples, *INPUT_SHAPE]``."""
    generator = torch.Generator().manual_seed(0)

    def batch(per_class: int) -> Batch:
        images = torch.randn(point.tasks, point.ways * per_class, *INPUT_SHAPE, generator=generator)
        return Batch(images, torch.arange(point.ways).repeat(per_class).expand(point.tasks, -1))

    return Episode(batch(point.shots), batch(point.queries))


# -------------------------------------------------------------------------------------------------- growth


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent of the power law that fits best: least squares on log-log axes."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope


def upper_half(sizes: Sequence[float]) -> list[int]:
    """The places of the sizes in the upper half of the range on a logarithmic axis, its middle among them."""
    middle = math.log(min(sizes) * max(sizes)) / 2
    return [place for place, size in enumerate(sizes) if math.log(size) >= middle - 1e-9]


def growth(sizes: Sequence[float], values: Sequence[float]) -> dict[str, float | bool]:
    """The slope over all sizes and over the upper half, and whether that is at most linear."""
    upper = upper_half(sizes)
    steepest = slope([sizes[place] for place in upper], [values[place] for place in upper])
    return {"slope": slope(sizes, values), "upper_slope": steepest, "at_most_linear": steepest <= LARGEST_SLOPE}


def axis(name: str, found: Mapping[Point, Cost]) -> dict[str, Any]:
    """How both costs grow along an axis; parameters take the place of filters."""
    points = [BASE._replace(**{name: value}) for value in AXES[name]]
    parameters = [sum(p.numel() for p in model(point).parameters()) for point in points]
    sizes = parameters if name == "filters" else list(AXES[name])
    seconds = [statistics.median(found[point].seconds) for point in points]
    live = [found[point].live_bytes for point in points]
    return {
        "values": list(AXES[name]), "parameters": parameters, "seconds": seconds, "live_bytes": live,
        "growth": {"seconds": growth(sizes, seconds), "live_bytes": growth(sizes, live)},
        "seconds_each_round": [found[point].seconds for point in points],
    }  # fmt: skip


def main(
    rounds: int = 15,
    output: Annotated[Path | None, tyro.conf.arg(help="JSON file for the result")] = None,
) -> None:
    """Measure and print."""
    os.environ.update(WORKER_ENVIRONMENT | QUIET)  # read when a process starts: hence another one
    points = list(dict.fromkeys(BASE._replace(**{name: value}) for name, values in AXES.items() for value in values))
    result: dict[str, Any] = {"machine": machine.description(), "base": BASE._asdict(), "rounds": rounds, "axes": {}}
    _write(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        found = process.submit(costs, points, rounds).result()
    _write(f"{', '.join(f'{key} {value}' for key, value in BASE._asdict().items())}; medians of {rounds} rounds")
    for name in AXES:
        along = result["axes"][name] = axis(name, found)
        _report(name, along)
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")


def _report(name: str, along: Mapping[str, Any]) -> None:
    label, sizes = ("parameters", along["parameters"]) if name == "filters" else (name, along["values"])
    for cost, unit, scale in (("seconds", "ms", 1e3), ("live_bytes", "MiB", 1 / MIB)):
        how = along["growth"][cost]
        values = ", ".join(f"{size:,}: {scale * value:.1f}" for size, value in zip(sizes, along[cost], strict=True))
        says = "at most linear" if how["at_most_linear"] else f"more than linear, {LARGEST_SLOPE} is allowed"
        _write(
            f"{label:11s} {unit:3s}  {values}   slope {how['slope']:.2f}, upper half {how['upper_slope']:.2f}: {says}"
        )


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    tyro.cli(main)
