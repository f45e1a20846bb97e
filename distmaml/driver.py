"""The life of one training run: checks before the start, the MLflow run, the workers, signals, and the end."""

import contextlib
import functools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distmaml import build, checkpoint, experiment, launch, loop, paths, preflight, ray_cluster, report
from distmaml.config import Config, to_json
from distmaml.episodes import num_chunks
from distmaml.errors import ClusterError, ConfigError
from distmaml.files import write_text
from distmaml.interrupt import Interrupt, interruptible
from distmaml.limits import check
from distmaml.progress import Progress, say
from distmaml.recorder import check_data, file_of
from distmaml.scoring import Evaluated, Intervals
from distmaml.worker import Worker

log = logging.getLogger("distmaml")


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
      metrics: the last of each.
      scores: on test episodes; None where the run has no test.
      server: address of the MLflow server that has the run; None for the embedded database.
      view: path of the MLflow page that compares the runs of the experiment, behind a server's address; may be empty.
    """

    name: str
    folder: Path
    metrics: dict[str, float]
    scores: Intervals | None
    server: str | None
    view: str


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
    config = _checked(config)
    folder, output, name = paths.run_folder(config), paths.output_dir(config.run.output_dir), config.run.name or ""
    if config.run.resume:
        preflight.check_resumable(config, folder)
    else:
        preflight.check_new(config, folder)
    preflight.rehearse(config)
    tracking = experiment.open_tracking(config, resuming=folder if config.run.resume else None)
    if not config.run.resume and preflight.remove_false_start(folder):
        say(f"An earlier {name} ended before its first checkpoint; it starts anew.")
    with experiment.tracked(config, folder, tracking, interrupt) as (run, view):
        write_text(paths.config_file(folder), json.dumps(to_json(config), indent=2))
        build.pin_store(config)
        shutil.rmtree(paths.ray(output) / name, ignore_errors=True)  # of a driver that was killed outright
        with _cluster(config) as resources:
            _tell_of_idle_workers(config)
            cpus, gpus = _count(resources.get("CPU", 0), "CPU"), _count(resources.get("GPU", 0), "GPU")
            say(f"{_count(config.cluster.num_workers, 'worker')} on {cpus} and {gpus}; the run lies in {folder}")
            with _told_how_to_go_on(config, folder), Progress(config, folder):
                failures = config.cluster.max_failures
                metrics, tested = _fit(train_and_test, config, name, resources, max_failures=failures)
        run.add_artifact(paths.model(folder), "model")
        run.add_artifact(paths.config_file(folder), None)
        if tested is not None:
            run.add_metrics(tested.step, report.metrics_of(tested.scores))
            for file in report.write_evaluation(config, folder, tested):
                run.add_artifact(file, "evaluation")
        scores = None if tested is None else tested.scores
        for picture in _draw(config, folder, scores):
            run.add_artifact(picture, "pictures")
    return Outcome(name, folder, metrics, scores, None if tracking.embedded else tracking.uri, view)


def train_and_test(config: Config, worker: Worker) -> tuple[dict[str, float], Evaluated | None]:
    """What each worker of a run does."""
    metrics = loop.train(config, worker)
    return metrics, loop.evaluate(config, worker) if config.evaluation.num_test_episodes else None


def _tell_of_idle_workers(config: Config) -> None:
    chunks = num_chunks(config.outer.meta_batch_size, config.outer.reduction_chunk)
    if config.cluster.num_workers > chunks:
        say(
            f"{config.cluster.num_workers} workers, but a step has {_count(chunks, 'chunk')} of "
            f"{_count(config.outer.reduction_chunk, 'task')}: the others have nothing to do. A smaller "
            "--reduction-chunk makes more."
        )


def _draw(config: Config, folder: Path, scores: Intervals | None) -> list[Path]:
    """The run's pictures. What goes wrong with them must not make a failure of a run that is trained and tested."""
    try:
        return report.draw(config, folder, scores)
    except Exception as error:
        log.warning("The pictures could not be drawn (%s). All else is there.", build.described(error))
        return []


@contextmanager
def _told_how_to_go_on(config: Config, folder: Path) -> Iterator[None]:
    try:
        yield
    except (ClusterError, KeyboardInterrupt):
        if checkpoint.steps(paths.checkpoints(folder)):
            say(f"Its checkpoints are kept: the same command with --name {config.run.name} --resume goes on.")
        raise


# ------------------------------------------------------------------------------------------ evaluation


def evaluate(config: Config, *, split: str, step: int | None) -> tuple[Evaluated, list[Path]]:
    """Scores a run's model, or one of its checkpoints, on workers of their own; writes and tracks the result.

    Args:
      step: of a checkpoint; None for the best model.

    Returns:
      The scores, and the files that were written.
    """
    with interruptible():
        config = _checked(config)
        folder = paths.run_folder(config)
        known = checkpoint.steps(paths.checkpoints(folder))
        if step is not None and step not in known:
            raise ConfigError(
                f"step={step} has no checkpoint; there are those of {', '.join(map(str, known)) or 'none'}."
            )
        check_data(checkpoint.load(file_of(folder, step))[1], config)
        opened = build.store(config)
        if opened is not None:
            opened.verify()
        tracking = experiment.open_tracking(config, resuming=folder)
        with _cluster(config) as resources:
            scoring = functools.partial(loop.evaluate, split=split, step=step)
            found: Evaluated = _fit(scoring, config, f"{config.run.name}-{split}", resources, max_failures=0)
        episodes, steps = config.evaluation.num_episodes(split), config.evaluation.num_eval_steps
        name = f"evaluation-{split}-{episodes}-episodes-{steps}-steps" + ("" if step is None else f"-at-{step}")
        files = report.write_evaluation(config, folder, found, split=split, name=name)
        # Not test/*: what the run itself measured at its end stays its result.
        metrics = report.metrics_of(found.scores, prefix=f"evaluation_{split}")
        experiment.add_evaluation(folder, tracking, found.step, metrics, files)
    return found, files


# --------------------------------------------------------------------------------------------- cluster


def _checked(config: Config) -> Config:
    """The configuration with a name and absolute paths, once nothing about it is wrong whatever the data are."""
    config = preflight.named(config)
    check(config)
    preflight.check_output(paths.output_dir(config.run.output_dir))
    ray_cluster.check_address(config.cluster.address)
    if ray_cluster.is_local(config.cluster.address):
        preflight.check_machine(config)
    return config


@contextmanager
def _cluster(config: Config) -> Iterator[Mapping[str, float]]:
    num_cpus = max(config.cluster.num_workers, os.cpu_count() or 1)
    local = ray_cluster.is_local(config.cluster.address)
    with ray_cluster.connect(config.cluster.address, num_cpus=num_cpus) as resources:
        # Ray sees the GPUs of this machine also where its torch was built without.
        yield {**resources, "GPU": 0.0} if local and not torch.cuda.is_available() else resources


def _fit(function: Any, config: Config, name: str, resources: Mapping[str, float], *, max_failures: int) -> Any:
    storage = paths.ray(paths.output_dir(config.run.output_dir))
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
            with contextlib.suppress(OSError):  # not empty: of other runs
                folder.rmdir()


def _gpus_per_worker(config: Config, resources: Mapping[str, float]) -> float:
    has = resources.get("GPU", 0) > 0
    wanted = config.cluster.use_gpu == "yes" or (config.cluster.use_gpu == "auto" and has)
    return config.cluster.gpus_per_worker if wanted else 0.0


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}" + ("" if number == 1 else "s")
