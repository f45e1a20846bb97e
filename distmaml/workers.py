"""The Ray workers of a configuration: what must be right before they start, their cluster, a function run on them.

What the driver of one run and that of a search have in common.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from distmaml import launch, paths, preflight, ray_cluster
from distmaml.config import Config
from distmaml.errors import ConfigError
from distmaml.limits import check


def checked(config: Config) -> Config:
    """The configuration with a name and absolute paths, once nothing about it is wrong whatever the data are.

    Raises:
      DistmamlError: naming what is.
    """
    config = preflight.named(config)
    check(config)
    preflight.check_output(paths.output_dir(config.run.output_dir))
    ray_cluster.check_address(config.cluster.address)
    if ray_cluster.is_local(config.cluster.address):
        preflight.check_machine(config)
    return config


@contextmanager
def cluster(config: Config, environment: Mapping[str, str] | None = None) -> Iterator[Mapping[str, float]]:
    """The cluster that a configuration names, or one on this machine; yields what it has.

    Args:
      environment: variables of all processes that are started on it, unless they bring their own.
    """
    num_cpus = max(config.cluster.team[1], os.cpu_count() or 1)
    local = ray_cluster.is_local(config.cluster.address)
    with ray_cluster.connect(config.cluster.address, num_cpus=num_cpus, environment=environment) as resources:
        # Ray sees the GPUs of this machine also where its torch was built without.
        yield {**resources, "GPU": 0.0} if local and not torch.cuda.is_available() else resources


def gpus_per_worker(config: Config, resources: Mapping[str, float]) -> float:
    """How many GPUs each worker gets on a cluster that has these resources."""
    has = resources.get("GPU", 0) > 0
    wanted = config.cluster.use_gpu == "yes" or (config.cluster.use_gpu == "auto" and has)
    return config.cluster.gpus_per_worker if wanted else 0.0


def check_precision(config: Config, resources: Mapping[str, float]) -> None:
    """Refuses to train in a precision that these workers do not have.

    Raises:
      ConfigError: saying why.
    """
    if config.outer.precision == "tf32" and not gpus_per_worker(config, resources):
        why = f"--use-gpu {config.cluster.use_gpu} leaves them out" if resources.get("GPU") else "the cluster has none"
        raise ConfigError(f"precision='tf32' is for GPUs, and {why}. Take --precision float32.")


def fit(
    function: Any,
    config: Config,
    name: str,
    resources: Mapping[str, float],
    *,
    max_failures: int,
    before_resize: Callable[[], object] | None = None,
) -> Any:
    """Runs ``function(config, worker)`` on the workers of a configuration; see `launch.fit`."""
    storage = paths.ray(paths.output_dir(config.run.output_dir))
    try:
        return launch.fit(
            function,
            config,
            name=name,
            storage_path=storage / name / str(time.time_ns() // 1_000_000),
            team=config.cluster.team,
            gpus_per_worker=gpus_per_worker(config, resources),
            max_failures=max_failures,
            collective_timeout=config.cluster.collective_timeout,
            node_timeout=config.cluster.node_timeout,
            before_resize=before_resize,
        )
    finally:
        for folder in (storage / name, storage):
            with contextlib.suppress(OSError):  # not empty: of other runs
                folder.rmdir()


def described(resources: Mapping[str, float]) -> str:
    """What a cluster has, in words."""
    return f"{count(resources.get('CPU', 0), 'CPU')} and {count(resources.get('GPU', 0), 'GPU')}"


def count(number: float, what: str) -> str:
    """A number of things: "1 worker", "2 workers"."""
    return f"{number:g} {what}" + ("" if number == 1 else "s")
