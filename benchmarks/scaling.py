"""What a step costs by its parts, measured on two processes, and what that predicts for many GPUs.

    python -m benchmarks.scaling --result FILE

Measured here: the meta-gradient of one worker; the all-reduce between two processes at several numbers of parameters,
plain and ordered; the processor time that Ray Train's controller takes for each worker that it looks after. Predicted
from it and from what is assumed about a cluster (the options): the efficiency of 8, 64 and 512 GPUs for three models.
With N workers, P parameters and C chunks of tasks a step::

    step       = compute + all-reduce(P)                          plain sums
    step       = compute + all-reduce(C * P) + C * P / memory     ordered sums: a row of P for each chunk
    all-reduce = 2 * ceil(log2 N) * latency + 2 * (N - 1) / N * 4 * floats / bandwidth
    compute    = tasks a GPU * forward FLOPs * (3 * queries + 9 * inner steps * shots) / rate
    efficiency = compute / step

The factor 3 is a loss and its gradient; 9 an inner step with its adjoint. Both reproduce what was counted for Conv4.
"""

import functools
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, NamedTuple

import psutil
import torch
import torch.distributed as dist
import tyro
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distmaml import build, launch, ray_cluster
from distmaml.collectives import mean_over_tasks
from distmaml.config import override
from distmaml.models.conv4 import Conv4
from distmaml.outer import chunk_sum
from distmaml.recipes import RECIPES
from distmaml.trees import tree_to
from distmaml.worker import Worker

SIZES = (100_000, 1_000_000, 10_000_000, 100_000_000)
TEAMS = (1, 2, 4, 8)
WATCHED_SECONDS = 15.0


class Model(NamedTuple):
    """What a prediction must know of a model and its tasks."""

    num_params: int
    forward_flops: float
    """Of one sample."""
    num_shots: int
    """Support samples of a task."""
    num_queries: int
    """Query samples of a task."""
    num_inner_steps: int

    @property
    def task_flops(self) -> float:
        """Of the second-order meta-gradient of one task."""
        return self.forward_flops * (3 * self.num_queries + 9 * self.num_inner_steps * self.num_shots)


# ------------------------------------------------------------------------------------------------ measured


def compute_seconds() -> float:
    """Seconds a task of Conv4's meta-gradient on one thread: 5-way 1-shot, 5 queries a class, 5 inner steps."""
    torch.set_num_threads(1)
    config = override(RECIPES["glyphs-maml-5w1s"](), {"num_inner_steps": 5, "num_filters": 64})
    tasks = build.task_distributions(config)["train"]
    learner = build.learner(config, build.shapes(tasks), torch.device("cpu"))
    batch = tree_to(tasks.sample(range(4)), torch.device("cpu"), torch.float32)
    times = []
    for step in range(8):
        begun = time.perf_counter()
        chunk_sum(learner.algorithm, learner.meta_params, batch, step, vectorize=learner.vectorize)
        times.append((time.perf_counter() - begun) / 4)
    return statistics.median(times[2:])


def reduce_seconds() -> dict[str, dict[int, float]]:
    """Seconds of one all-reduce between two processes, by reduction and number of floats."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        members = [context.Process(target=_reduce, args=(rank, f"{folder}/meeting", send)) for rank in range(2)]
        for member in members:
            member.start()
        found: dict[str, dict[int, float]] = receive.recv()
        for member in members:
            member.join()
    return found


def _reduce(rank: int, meeting: str, answer: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    found: dict[str, dict[int, float]] = {"plain": {}, "ordered": {}}
    for reduction, times in found.items():
        for size in SIZES:
            like = torch.zeros(size)
            repeated = []
            for _ in range(5 if size < 10**8 else 3):
                dist.barrier()
                begun = time.perf_counter()
                mean_over_tasks({rank: (like, 1)}, like, num_chunks=2, ordered=reduction == "ordered")
                repeated.append(time.perf_counter() - begun)
            times[size] = statistics.median(repeated)
    if rank == 0:
        answer.send(found)
    dist.destroy_process_group()


def controller_load() -> dict[int, float]:
    """Processor seconds a second of Ray Train's controller, by the number of workers, who do nothing."""
    loads = {}
    for team in TEAMS:
        with ray_cluster.connect(None, num_cpus=max(TEAMS)), tempfile.TemporaryDirectory() as folder:
            seen: list[tuple[float, float]] = []
            ended = threading.Event()
            watcher = threading.Thread(target=_watch, args=(seen, ended))
            watcher.start()
            launch.fit(
                _idle, Path(folder) / "begun", name="idle", storage_path=Path(folder) / "ray", team=(team, team),
                gpus_per_worker=0.0, max_failures=0, collective_timeout=60.0, node_timeout=60.0,
            )  # fmt: skip
            ended.set()
            watcher.join()
            begun = float((Path(folder) / "begun").read_text())
            during = [(when, used) for when, used in seen if begun + 2 < when < begun + WATCHED_SECONDS]
            loads[team] = (during[-1][1] - during[0][1]) / (during[-1][0] - during[0][0])
    return loads


def _idle(file: Path, worker: Worker) -> None:
    if worker.rank == 0:
        file.write_text(str(time.time()))
    time.sleep(WATCHED_SECONDS)


def _watch(seen: list[tuple[float, float]], ended: threading.Event) -> None:
    while not ended.wait(0.5):
        for process in psutil.process_iter(["name"]):
            if "TrainController" in str(process.info["name"]):
                used = process.cpu_times()
                seen.append((time.time(), used.user + used.system))


# ----------------------------------------------------------------------------------------------- predicted


def models() -> dict[str, Model]:
    """Conv4 on Omniglot, ResNet-12 on mini-ImageNet, and a transformer of 100 million parameters on short texts."""
    conv4 = Conv4((1, 28, 28), 5)
    resnet = _resnet12()
    layer = nn.TransformerEncoderLayer(896, 14, 3584, batch_first=True)
    return {
        "Conv4": _model(conv4, torch.zeros(1, 1, 28, 28), 5, 75),
        "ResNet-12": _model(resnet, torch.zeros(1, 3, 84, 84), 5, 75),
        "100M": _model(nn.Sequential(*[layer] * 10), torch.zeros(1, 64, 896), 5, 75, copies=10),
    }


def _model(module: nn.Module, one: torch.Tensor, num_shots: int, num_queries: int, *, copies: int = 1) -> Model:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(one.expand(2, *one.shape[1:]))  # batch norm wants more than one
    num_params = sum(parameter.numel() for parameter in module.parameters()) * copies
    return Model(num_params, counter.get_total_flops() / 2, num_shots, num_queries, 5)


def _resnet12() -> nn.Module:
    """Four blocks of three convolutions (Oreshkin et al., 2018, https://arxiv.org/abs/1805.10123); no shortcuts."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 160, 320, 640):
        for _ in range(3):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.1)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(640, 5))


def efficiency(
    model: Model, num_gpus: int, *, tasks_per_gpu: int, ordered: bool, rate: float, bandwidth: float, latency: float,
    memory: float,
) -> float:  # fmt: skip
    """The share of a step that is compute.

    Args:
      tasks_per_gpu: computed together, as one chunk.
      rate: FLOPs a second of a GPU, sustained.
      bandwidth: bytes a second between any two GPUs.
      latency: seconds of one message.
      memory: floats a second that a GPU adds up.
    """
    compute = tasks_per_gpu * model.task_flops / rate
    floats = model.num_params * (num_gpus if ordered else 1)
    hops, share = 2 * math.ceil(math.log2(num_gpus)), 2 * (num_gpus - 1) / num_gpus
    step = compute + hops * latency + share * 4 * floats / bandwidth + (floats / memory if ordered else 0.0)
    return compute / step


def main(
    tasks_per_gpu: int = 4,
    gpu_tflops: float = 20.0,
    network_gbit: float = 100.0,
    latency_us: float = 20.0,
    memory_gb: float = 1000.0,
    result: Annotated[Path | None, tyro.conf.arg(help="JSON file for the result")] = None,
) -> None:
    """Measure, predict and print. The options are assumptions about the cluster; nothing here has run on a GPU."""
    task = compute_seconds()
    reduced = reduce_seconds()
    load = controller_load()
    known = models()
    per_worker = (load[TEAMS[-1]] - load[TEAMS[0]]) / (TEAMS[-1] - TEAMS[0])
    predict = functools.partial(
        efficiency, tasks_per_gpu=tasks_per_gpu, rate=gpu_tflops * 1e12, bandwidth=network_gbit * 1e9 / 8,
        latency=latency_us * 1e-6, memory=memory_gb * 1e9 / 4,
    )  # fmt: skip
    predicted = {
        name: {kind: {n: predict(model, n, ordered=kind == "ordered") for n in (8, 64, 512)} for kind in reduced}
        for name, model in known.items()
    }
    write = sys.stdout.write
    flops = known["Conv4"]._replace(num_queries=25).task_flops  # what `compute_seconds` has computed
    write(f"Conv4, a task on one thread: {1e3 * task:.1f} ms, {flops / task / 1e9:.1f} GFLOP/s\n")
    for size in SIZES:
        write(f"all-reduce of {size:>11,} floats, two processes: plain {1e3 * reduced['plain'][size]:8.2f} ms")
        write(f"   ordered, two chunks {1e3 * reduced['ordered'][size]:8.2f} ms\n")
    write("the controller's share of a core: " + ", ".join(f"{n} workers {100 * x:.1f} %" for n, x in load.items()))
    write(f"; {100 * per_worker:.2f} % a worker more, so it is full at {(1 - load[1]) / per_worker:.0f}\n")
    for name, kinds in predicted.items():
        model = known[name]
        write(f"{name}: {model.num_params / 1e6:.2f} M parameters, {model.task_flops / 1e9:,.2f} GFLOP a task\n")
        for kind, values in kinds.items():
            write(f"  {kind:8s}" + "".join(f"   {n} GPUs {100 * value:5.1f} %" for n, value in values.items()) + "\n")
    if result:
        record: Mapping[str, object] = {
            "seconds_per_task": task, "reduce_seconds": reduced, "controller_load": load, "predicted": predicted,
            "models": {name: model._asdict() for name, model in known.items()},
            "assumed": {"tasks_per_gpu": tasks_per_gpu, "gpu_tflops": gpu_tflops, "network_gbit": network_gbit,
                        "latency_us": latency_us, "memory_gb": memory_gb},
            "cores": os.cpu_count(), "torch": torch.__version__,
        }  # fmt: skip
        result.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
