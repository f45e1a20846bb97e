"""One trial of a search: its configuration, and what its process does.

A trial is an ordinary training run, in a folder of its own with checkpoints of its own; what makes it a trial is that
its driver is that of the search.
"""

import functools

import torch

from distmaml import checkpoint, collectives, launch, loop, paths
from distmaml.config import Config, override, to_json
from distmaml.search import TIME, Report, Trial, forwarding
from distmaml.segments import SegmentWriter, committed_segments, read_points
from distmaml.worker import LocalWorker, Worker


def of_trial(config: Config, trial: Trial) -> Config:
    """The configuration of one trial: a training run whose name ends in its number."""
    name = f"{config.run.name}-{trial.number:03d}"
    return override(config, {**trial.values, "name": name, "resume": False})


def run_trial(config: Config, gpus: float, trial: Trial, report: Report) -> None:
    """What the process of a trial does.

    Args:
      gpus: of each worker.
    """
    own = of_trial(config, trial)
    train = functools.partial(train_on, after=trial.step)
    if config.cluster.team[1] == 1:
        device = torch.device("cuda" if gpus else "cpu")
        train(own, LocalWorker(device, tell=report))
    else:
        launch.fit(
            train,
            own,
            name=own.run.name or "",
            storage_path=paths.ray(paths.output_dir(own.run.output_dir)) / (own.run.name or ""),
            team=own.cluster.team,
            gpus_per_worker=gpus,
            max_failures=own.cluster.max_failures,
            collective_timeout=own.cluster.collective_timeout,
            node_timeout=own.cluster.node_timeout,
            callbacks=[forwarding()],
        )


def train_on(config: Config, worker: Worker, *, after: int) -> dict[str, float]:
    """What the workers of a trial do: trains, after reporting again what was measured after a step.

    Workers that were killed between a checkpoint and its report leave nobody who trains the steps before it again. What
    had been heard of is heard twice, which the journal and the rungs count once.
    """
    measured = _measured(config, after=after) if worker.rank == 0 else []
    for number in range(collectives.from_first(len(measured), worker.device)):
        worker.report(measured[number] if measured else {})  # rank 0's is what counts
    return loop.train(config, worker)


def _measured(config: Config, *, after: int) -> list[dict[str, float]]:
    run, metric = paths.run_folder(config), config.evaluation.selection_metric
    step = checkpoint.newest(paths.checkpoints(run))
    if step is None:
        return []
    SegmentWriter(paths.metrics(run), step)  # settles which points count
    points = [point for segment in committed_segments(paths.metrics(run), after) for point in read_points(segment)]
    return [{TIME: point.step, **point.values} for point in points if point.step > after and metric in point.values]


def take_weights(config: Config, *, donor: Config, step: int) -> None:
    """Lets a run go on from the weights and the optimizer's state of another, as if they were its own.

    Its best model so far stays, and what is known of it.

    Args:
      config: the run's, as it goes on.
      step: of a checkpoint that both have.

    Raises:
      CheckpointError: one of them is missing or damaged.
    """
    tensors, _ = checkpoint.load(checkpoint.path_of(paths.checkpoints(paths.run_folder(donor)), step))
    own = checkpoint.path_of(paths.checkpoints(paths.run_folder(config)), step)
    _, document = checkpoint.load(own)
    checkpoint.save(own, tensors, {**document, "config": to_json(config)})
