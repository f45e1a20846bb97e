"""The life of one training run: checks before the start, the MLflow run, the workers, signals, and the end."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distmaml import build, checkpoint, experiment, launch, loop, paths, preflight, ray_cluster, report
from distmaml.config import Config, check, to_json
from distmaml.errors import ConfigError
from distmaml.files import write_text
from distmaml.interrupt import Interrupt, interruptible
from distmaml.progress import Progress, say
from distmaml.recorder import check_data
from distmaml.worker import Worker


class Outcome(NamedTuple):
    """What a run came to."""

    name: str
    folder: Path
    metrics: dict[str, float]
    scores: dict[str, dict[str, list[Any]]]
    view: str
    """Path of the MLflow page that compares the runs of the experiment, behind a server's address; may be empty."""


# -------------------------------------------------------------------------------------------- training


def train(config: Config) -> Outcome:
    """Trains, tests and tracks one run, from the first check to the last picture.

    Raises:
      DistmamlError: whatever is wrong, before the cluster starts where that can be known.
      KeyboardInterrupt: SIGINT or SIGTERM came; all is put in order.
    """
    with interruptible() as interrupt:
        return _train(config, interrupt)


def _train(config: Config, interrupt: Interrupt) -> Outcome:
    config = preflight.named(config)
    check(config)
    folder, name = paths.run_folder(config), config.run.name or ""
    output = paths.output_dir(config.run.output_dir)
    preflight.check_output(output)
    (preflight.check_resumable if config.run.resume else preflight.check_new)(config, folder)
    ray_cluster.check_address(config.cluster.address)
    preflight.rehearse(config, local=ray_cluster.is_local(config.cluster.address))
    tracking = experiment.open_tracking(config, resuming=folder if config.run.resume else None)
    if not config.run.resume and preflight.was_started(folder):
        with preflight.claimed(folder):
            shutil.rmtree(folder)
        say(f"An earlier {name} ended before its first checkpoint; it starts anew.")
    with experiment.tracked(config, folder, tracking, interrupt) as (run, view):
        write_text(folder / "config.json", json.dumps(to_json(config), indent=2))
        shutil.rmtree(output / "ray" / name, ignore_errors=True)  # of a driver that was killed outright
        with _cluster(config) as resources:
            cpus, gpus = _count(resources.get("CPU", 0), "CPU"), _count(resources.get("GPU", 0), "GPU")
            say(f"{_count(config.cluster.num_workers, 'worker')} on {cpus} and {gpus}; the run lies in {folder}")
            with Progress(config, folder):
                metrics, tested = _fit(
                    train_and_test, config, name, resources, max_failures=config.cluster.max_failures
                )
        run.add_artifact(paths.model(folder), "model")
        run.add_artifact(folder / "config.json", None)
        scores: dict[str, dict[str, list[Any]]] = {}
        if tested is not None:
            scores = tested["modes"]
            run.add_metrics(tested["step"], report.metrics_of(scores))
            for file in report.write_evaluation(config, folder, tested):
                run.add_artifact(file, "evaluation")
        for picture in report.draw(config, folder, scores):
            run.add_artifact(picture, "pictures")
    return Outcome(name, folder, metrics, scores, view)


def train_and_test(config: Config, worker: Worker) -> tuple[dict[str, float], dict[str, Any] | None]:
    """What each worker of a run does."""
    metrics = loop.train(config, worker)
    return metrics, loop.evaluate(config, worker) if config.evaluation.num_test_episodes else None


# ------------------------------------------------------------------------------------------ evaluation


def evaluate(config: Config, *, split: str, step: int | None) -> dict[str, Any]:
    """Scores a run's model, or one of its checkpoints, on workers of their own; writes and tracks the result.

    Args:
      step: of a checkpoint; None for the best model.

    Returns:
      What `loop.evaluate` does, with the number of episodes and the files that were written.
    """
    with interruptible():
        config = preflight.named(config)
        check(config)
        folder = paths.run_folder(config)
        known = checkpoint.steps(paths.checkpoints(folder))
        if step is not None and step not in known:
            raise ConfigError(
                f"step={step} has no checkpoint; there are those of {', '.join(map(str, known)) or 'none'}."
            )
        file = paths.model(folder) if step is None else checkpoint.path_of(paths.checkpoints(folder), step)
        check_data(checkpoint.load(file)[1], config)
        opened = build.store(config)
        if opened is not None:
            opened.verify()
        tracking = experiment.open_tracking(config, resuming=folder)
        with _cluster(config) as resources:
            found = _fit(_Evaluation(split, step), config, f"{config.run.name}-{split}", resources, max_failures=0)
        episodes, steps = report.num_episodes(config, split), config.evaluation.num_eval_steps
        name = f"evaluation-{split}-{episodes}-episodes-{steps}-steps" + ("" if step is None else f"-at-{step}")
        files = report.write_evaluation(config, folder, found, split=split, name=name)
        # Not test/*: what the run itself measured at its end stays its result.
        metrics = report.metrics_of(found["modes"], prefix=f"evaluation_{split}")
        experiment.add_evaluation(folder, tracking, found["step"], metrics, files)
    return {**found, "num_episodes": episodes, "files": files}


class _Evaluation(NamedTuple):
    split: str
    step: int | None

    def __call__(self, config: Config, worker: Worker) -> dict[str, Any]:
        return loop.evaluate(config, worker, split=self.split, step=self.step)


# --------------------------------------------------------------------------------------------- cluster


@contextmanager
def _cluster(config: Config) -> Iterator[Mapping[str, float]]:
    num_cpus = max(config.cluster.num_workers, os.cpu_count() or 1)
    local = ray_cluster.is_local(config.cluster.address)
    with ray_cluster.connect(config.cluster.address, num_cpus=num_cpus) as resources:
        # Ray sees the GPUs of this machine also where its torch was built without.
        yield {**resources, "GPU": 0.0} if local and not torch.cuda.is_available() else resources


def _fit(function: Any, config: Config, name: str, resources: Mapping[str, float], *, max_failures: int) -> Any:
    storage = paths.output_dir(config.run.output_dir) / "ray"
    try:
        return launch.fit(
            function,
            config,
            name=name,
            storage_path=storage / name / str(time.time_ns() // 1_000_000),
            num_workers=config.cluster.num_workers,
            gpus_per_worker=_gpus_per_worker(config, resources),
            max_failures=max_failures,
        )
    finally:
        for folder in (storage / name, storage):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _gpus_per_worker(config: Config, resources: Mapping[str, float]) -> float:
    has = resources.get("GPU", 0) > 0
    wanted = config.cluster.use_gpu == "yes" or (config.cluster.use_gpu == "auto" and has)
    return config.cluster.gpus_per_worker if wanted else 0.0


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}" + ("" if number == 1 else "s")
