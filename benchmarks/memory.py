"""The memory of the meta-gradient over the number of inner steps, beside unrolled autodiff's, and over its order.

    python -m benchmarks.memory --output FILE

The workload and the contenders are those of `benchmarks.peers`, each in a process of its own of one thread, in the
environment of distmaml's workers. Before anything is measured, all must find one gradient. Two peaks of each:

    resident   what the system holds for the process, less what stood after a small first gradient
    live       the sizes of all tensors that are alive at once, those that autograd keeps among them

Then ResNet-12 on one task of 84x84: what second order costs beside first order. Both keep the trajectory, a copy of the
parameters for each inner step; it is said how large it is. The gradient is checked on small images and in float64
alone: in float32 leaky ReLU and max-pooling amplify rounding, that of the plain loop too.
"""

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import tyro

from benchmarks import machine
from benchmarks.peers import Workload, agree, module_of
from benchmarks.processes import Process
from distmaml.launch import WORKER_ENVIRONMENT

CONTENDERS = ("distmaml", "plain", "vmap")
UNROLLED = CONTENDERS[1:]
MIB = 2**20
LARGEST_GROWTH, LARGEST_SHARE, LARGEST_SECOND_ORDER = 1.3, 1 / 5, 1.2
"""What is aimed at: most steps over fewest, distmaml over unrolled at most steps, second order over first."""


class Peaks(NamedTuple):
    """In bytes."""

    resident: int
    live: int


def peaks(contender: str, workload: Workload, *, at_once: bool = False) -> Peaks:
    """Of a fresh process.

    Args:
      at_once: both from one gradient. Adding up takes memory of its own, which does not matter beside gigabytes.
    """
    with closing(Process(contender, workload, WORKER_ENVIRONMENT)) as process:
        found = []
        for live in [True] if at_once else [False, True]:
            process.prepare(0, live=live)
            process.prepared()
            process.go()
            found.append(process.measured())
    assert found[-1].live_bytes is not None
    return Peaks(found[0].peak_bytes, found[-1].live_bytes)


def trajectory_bytes(workload: Workload) -> int:
    """A copy of the parameters for each inner step, of one task."""
    parameters = module_of(workload, torch.float32).parameters()
    return workload.num_inner_steps * sum(p.numel() * p.element_size() for p in parameters)


def conv4(steps: tuple[int, ...], num_tasks: int) -> dict[str, Any]:
    """Measures and prints the peaks over the number of inner steps."""
    _write(f"Conv4, W(K), {num_tasks} tasks\n  K  contender  resident MiB  live MiB  error in float64, float32")
    found: dict[str, dict[int, Peaks]] = {contender: {} for contender in CONTENDERS}
    errors = {}
    for count in steps:
        workload = Workload(count, num_tasks)
        errors[count] = agree(CONTENDERS, workload)
        for contender in CONTENDERS:
            resident, live = found[contender][count] = peaks(contender, workload)
            error = errors[count][contender]
            _write(f"{count:3d}  {contender:9s}  {resident / MIB:12.1f}  {live / MIB:8.1f}  "
                   f"{error['float64']:.0e}, {error['float32']:.0e}")  # fmt: skip
    fewest, most = min(steps), max(steps)
    growth = {contender: _ratio(of[most], of[fewest]) for contender, of in found.items()}
    share = {contender: _ratio(found["distmaml"][most], found[contender][most]) for contender in UNROLLED}
    for contender, ratio in growth.items():
        aim = f"; the aim is {LARGEST_GROWTH}" if contender == "distmaml" else ""
        _write(f"{contender}, K={most} over K={fewest}: {_words(ratio)}{aim}")
    for contender, ratio in share.items():
        _write(f"distmaml over {contender} at K={most}: {_words(ratio)}; the aim is {LARGEST_SHARE}")
    _write(f"the trajectory of a task at K={most}: {trajectory_bytes(Workload(most)) / MIB:.1f} MiB")
    measured = {contender: {k: p._asdict() for k, p in of.items()} for contender, of in found.items()}
    return {"num_tasks": num_tasks, "peak_bytes": measured, "growth": growth, "share_of_unrolled": share,
            "gradient_errors": errors}  # fmt: skip


def resnet12(num_inner_steps: int) -> dict[str, Any]:
    """Measures and prints the peaks of second and first order."""
    workload = Workload(num_inner_steps, 1, "resnet12")
    errors = agree(["distmaml"], workload, shape=(3, 32, 32), num_queries=1, dtypes=[torch.float64])
    _write(f"\nResNet-12, 84x84, one task, K={num_inner_steps}; error in float64 {errors['distmaml']['float64']:.0e}")
    orders = {"second": "distmaml", "first": "fomaml"}
    found = {order: peaks(contender, workload, at_once=True) for order, contender in orders.items()}
    for order, (resident, live) in found.items():
        _write(f"{order} order: resident {resident / MIB:.0f} MiB, live {live / MIB:.0f} MiB")
    trajectory = trajectory_bytes(workload)
    without = Peaks(*(value - trajectory for value in found["second"]))
    ratios = {"whole": _ratio(found["second"], found["first"]), "less_trajectory": _ratio(without, found["first"])}
    _write(f"second over first order: {_words(ratios['whole'])}; less the trajectory of {trajectory / MIB:.0f} MiB: "
           f"{_words(ratios['less_trajectory'])}; the aim is {LARGEST_SECOND_ORDER}")  # fmt: skip
    return {"num_inner_steps": num_inner_steps, "peak_bytes": {order: p._asdict() for order, p in found.items()},
            "trajectory_bytes": trajectory, "second_over_first": ratios, "gradient_errors": errors}  # fmt: skip


def _ratio(a: Peaks, b: Peaks) -> dict[str, float]:
    return {"resident": a.resident / b.resident, "live": a.live / b.live}


def _words(ratio: dict[str, float]) -> str:
    return f"resident {ratio['resident']:.2f}, live {ratio['live']:.2f}"


def main(
    num_inner_steps: tuple[int, ...] = (1, 5, 20),
    num_tasks: int = 4,
    resnet_inner_steps: Annotated[int, tyro.conf.arg(help="of ResNet-12, which takes minutes; 0 for none of it")] = 5,
    output: Annotated[Path | None, tyro.conf.arg(help="JSON file for the result")] = None,
) -> None:
    """Measure and print."""
    result: dict[str, Any] = {"machine": machine.description()}
    _write(", ".join(f"{key} {value}" for key, value in result["machine"].items()) + "\n")
    result["conv4"] = conv4(num_inner_steps, num_tasks)
    if resnet_inner_steps:
        result["resnet12"] = resnet12(resnet_inner_steps)
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    tyro.cli(main)
