"""The engine and the training loop on a GPU, with torch, numpy, pyarrow and safetensors alone: no Ray, no MLflow.

    python -m benchmarks.gpu speed --output FILE
    python -m benchmarks.gpu train STORE.arrow --output-dir DIR --minutes 5

`speed` measures tasks a second of the meta-gradient of W(K) (see `benchmarks.peers`) beside the plain loop, which is
learn2learn's way, and unrolled vmap of the gradient, in each precision: interleaved rounds, medians, gradients compared
with float64.
`train` runs the real loop, `loop.train`, in this process: Omniglot 5-way 1-shot by the protocol of Finn et al. (2017),
which the same command goes on with where it stopped, and tests the result at the end. It is also how a run is debugged
without a cluster.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.peers import INNER_LR, NUM_WAYS, Workload, module_of, plain, random_tasks, vmapped
from distmaml import build, checkpoint, gpu, loop, paths
from distmaml.config import Config, override
from distmaml.episodes import TaskBatch
from distmaml.inner import Params
from distmaml.limits import check
from distmaml.outer import chunk_sum
from distmaml.recipes.omniglot import omniglot_maml_5w1s
from distmaml.trees import tree_to
from distmaml.worker import LocalWorker

PLAIN_TASKS = 2
"""Of the plain loop in a round: it takes its time."""
PAPER: dict[str, Any] = {
    "num_inner_steps": 1, "inner_lr": 2.0, "num_queries": 1, "num_filters": 64, "rotations": "all", "split": "maml",
    "num_outer_steps": 60_000, "meta_batch_size": 32, "reduction_chunk": 32, "outer_lr": 1e-3, "schedule": "constant",
    "num_eval_steps": 3, "val_every": 5_000, "num_val_episodes": 200, "num_test_episodes": 1_000,
    "checkpoint_every": 1_000, "log_every": 100,
}  # fmt: skip
"""Finn et al. (2017) for Omniglot; inner_lr is 0.4 on the summed loss of five images, which is 2.0 on their mean."""


def say(line: str) -> None:
    """A line on the standard output, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


# --------------------------------------------------------------------------------------------------- speed


def speed(options: argparse.Namespace) -> None:
    device = torch.device("cuda")
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    limits = {precision: _products(precision, device) for precision in options.precisions}
    result: dict[str, Any] = {"machine": {**machine.description(), "gpu": torch.cuda.get_device_name()}, "rows": []}
    for precision, rate in limits.items():
        say(f"products of matrices in {precision}: {rate / 1e12:.0f} TFLOP/s")
    for num_inner_steps in options.num_inner_steps:
        workload = Workload(num_inner_steps, options.num_tasks)
        exact = _exact(workload, device)
        for precision in options.precisions:
            build.set_products(precision)
            contenders = {
                "distmaml": (_distmaml(workload, precision, device), options.num_tasks),
                **_peers(workload, device, options.num_tasks),
            }
            for name, row in _measured(contenders, workload, device, options.rounds).items():
                row.update(contender=name, precision=precision, num_inner_steps=num_inner_steps)
                row["share_of_limit"] = row["tasks_per_second"] * workload.task_flops / limits[precision]
                row["error"] = _error(contenders[name][0], exact, device)
                result["rows"].append(row)
                say(
                    f"W({num_inner_steps}) {precision:9} {name:9} {row['tasks_per_second']:9.1f} tasks/s "
                    f"{row['peak_gib']:6.2f} GiB  {row['share_of_limit']:6.1%} of the limit  error {row['error']:.1e}"
                )
    if options.output is not None:
        options.output.write_text(json.dumps({**result, "limits": limits}, indent=1) + "\n")


def _products(precision: str, device: torch.device, size: int = 8192) -> float:
    build.set_products(precision)
    matrix = torch.randn(size, size, device=device)
    return 2 * size**3 / statistics.median(_seconds(lambda: matrix @ matrix) for _ in range(10))


def _distmaml(workload: Workload, precision: str, device: torch.device) -> Callable[[TaskBatch], Params]:
    config = override(
        omniglot_maml_5w1s(),
        {"num_inner_steps": workload.num_inner_steps, "inner_lr": INNER_LR, "precision": precision},
    )
    module = module_of(workload, torch.float32)
    learner = build.learner(config, build.Shapes((), NUM_WAYS), device, module=module)
    summed = gpu.replayed(partial(chunk_sum, learner.algorithm, learner.meta_params), device, steady_from=0)
    return lambda tasks: summed(tasks, 0)[0]


def _peers(workload: Workload, device: torch.device, num_tasks: int) -> Mapping[str, Any]:
    def on_gpu(factory: Callable[..., Any]) -> Any:
        return factory(module_of(workload, torch.float32).to(device), workload.num_inner_steps)

    return {"plain": (on_gpu(plain), PLAIN_TASKS), "vmap": (on_gpu(vmapped), num_tasks)}


def _measured(
    contenders: Mapping[str, Any], workload: Workload, device: torch.device, rounds: int
) -> dict[str, dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, int] = {}
    for number in range(rounds + 1):  # the first is for warming up
        for name, (function, num_tasks) in contenders.items():
            tasks = _tasks(num_tasks, number, device)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            taken = _seconds(partial(function, tasks))
            if number:
                seconds[name].append(taken / num_tasks)
            else:  # recording holds what replaying uses
                peaks[name] = torch.cuda.max_memory_allocated() - before
    return {
        name: {"tasks_per_second": 1 / statistics.median(taken), "peak_gib": peaks[name] / 2**30}
        for name, taken in seconds.items()
    }


def _seconds(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def _tasks(num_tasks: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> TaskBatch:
    tasks: TaskBatch = tree_to(random_tasks(num_tasks, seed, dtype, shape=(1, 28, 28)), device, dtype)
    return tasks


def _exact(workload: Workload, device: torch.device) -> list[Params]:
    function = plain(module_of(workload, torch.float64).to(device), workload.num_inner_steps)
    return [
        {name: grad.clone() for name, grad in function(_tasks(2, seed, device, torch.float64)).items()}
        for seed in range(3)
    ]


def _error(function: Callable[[TaskBatch], Params], exact: list[Params], device: torch.device) -> float:
    """The median over three times two tasks of the largest difference, over the largest entry."""

    def one(found: Params, expected: Params) -> float:
        scale = max(float(leaf.abs().max()) for leaf in expected.values())
        return max(float((found[name].double() - leaf).abs().max()) for name, leaf in expected.items()) / scale

    return statistics.median(one(function(_tasks(2, seed, device)), right) for seed, right in enumerate(exact))


# --------------------------------------------------------------------------------------------------- train


class LegEnd(BaseException):
    """The time of this leg is up, just after a checkpoint."""


def train(options: argparse.Namespace) -> None:
    config = _config(options)
    check(config)
    folder = paths.run_folder(config)
    checkpoints = paths.checkpoints(folder)
    checkpoints.mkdir(parents=True, exist_ok=True)
    begun, first = time.perf_counter(), checkpoint.newest(checkpoints) or 0

    def tell(metrics: Mapping[str, float]) -> None:
        step, seconds = int(metrics["step"]), time.perf_counter() - begun
        accuracy = metrics.get("val/query_accuracy")
        if accuracy is not None or step % 5_000 == 0:
            say(
                f"step {step}  {seconds:.0f} s, {(step - first) / seconds:.0f} steps/s  "
                f"val/query_accuracy {'-' if accuracy is None else f'{accuracy:.4f}'}"
            )
        if seconds > 60 * options.minutes and step < config.outer.num_outer_steps:
            raise LegEnd

    worker = LocalWorker(options.device, tell=tell)
    try:
        loop.train(config, worker)
    except LegEnd:
        say(f"{options.minutes:g} minutes are over: the same command goes on from the last checkpoint.")
        return
    say(f"{time.perf_counter() - begun:.1f} s for the steps from {first} on, validation and checkpoints included")
    evaluated = loop.evaluate(config, worker)
    found = {
        f"{mode}/{metric}": each[-1]._asdict()
        for mode, scores in evaluated.scores.items()
        for metric, each in scores.items()
    }
    say(f"tested the model of step {evaluated.step}, best on validation classes, on "
          f"{config.evaluation.num_test_episodes} episodes, seed {config.outer.seed}:")  # fmt: skip
    say(json.dumps(found, indent=1))


def _config(options: argparse.Namespace) -> Config:
    changes = {**PAPER, **json.loads(options.set)}
    return override(
        omniglot_maml_5w1s(),
        {**changes, "dataset": str(options.store.absolute()), "name": options.name, "precision": options.precision,
         "output_dir": options.output_dir.absolute()},
    )  # fmt: skip


def main() -> None:
    logging.basicConfig(format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    fast = commands.add_parser("speed")
    fast.add_argument("--num-inner-steps", type=int, nargs="+", default=[1, 5])
    fast.add_argument("--num-tasks", type=int, default=128, help="computed together")
    fast.add_argument("--rounds", type=int, default=5)
    fast.add_argument("--precisions", nargs="+", default=["float32", "tf32"])
    fast.add_argument("--output", type=Path)
    fast.set_defaults(function=speed)
    long = commands.add_parser("train")
    long.add_argument("store", type=Path, help="from jobs/build_store.py omniglot")
    long.add_argument("--output-dir", type=Path, required=True)
    long.add_argument("--name", default="omniglot-paper")
    long.add_argument("--minutes", type=float, default=60.0, help="of this leg")
    long.add_argument("--precision", default="float32")
    long.add_argument("--device", default="cuda")
    long.add_argument("--set", default="{}", help="other fields of the configuration, as JSON")
    long.set_defaults(function=train)
    options = parser.parse_args()
    options.function(options)


if __name__ == "__main__":
    main()
