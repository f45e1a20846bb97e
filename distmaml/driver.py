"""The life of one training run: checks before the start, the MLflow run, the workers, signals, and the end."""

import functools
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from distmaml import build, checkpoint, experiment, loop, paths, preflight, report, workers
from distmaml.config import Config, override, to_json
from distmaml.episodes import num_chunks
from distmaml.errors import ClusterError, ConfigError
from distmaml.files import write_text
from distmaml.interrupt import Interrupt, interruptible
from distmaml.progress import Progress, say
from distmaml.recorder import check_data, file_of, save_now
from distmaml.scoring import Evaluated, Intervals
from distmaml.worker import Worker

log = logging.getLogger("distmaml")


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
      metrics: the last of each.
      scores: on test episodes; None where the run has no test.
      compare: what opens the MLflow page that compares the runs of the experiment, a line each.
    """

    name: str
    folder: Path
    metrics: dict[str, float]
    scores: Intervals | None
    compare: tuple[str, ...]


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
    config = workers.checked(config)
    folder, output, name = paths.run_folder(config), paths.output_dir(config.run.output_dir), config.run.name or ""
    if not config.run.resume and preflight.is_interrupted(config, folder):
        say(f"{name} was stopped after {checkpoint.steps(paths.checkpoints(folder))[-1]} outer steps: it goes on.")
        config = override(config, {"resume": True})
    if config.run.resume:
        preflight.check_resumable(config, folder)
    else:
        preflight.check_new(config, folder)
    preflight.rehearse(config)
    tracking = experiment.open_tracking(config, resuming=folder if config.run.resume else None)
    if not tracking.reachable:
        say("The run goes on without it: its points are kept in its folder, and sent when the server is back.")
    if not config.run.resume and preflight.remove_false_start(folder):
        say(f"An earlier {name} ended before its first checkpoint; it starts anew.")
    with experiment.tracked(config, folder, tracking, interrupt) as run:
        view = experiment.view(config, run, tracking)
        write_text(paths.config_file(folder), json.dumps(to_json(config), indent=2))
        build.pin_store(config)
        shutil.rmtree(paths.ray(output) / name, ignore_errors=True)  # of a driver that was killed outright
        with workers.cluster(config) as resources:
            _tell_of_idle_workers(config)
            least, most = config.cluster.team
            team = workers.count(most, "worker") if least == most else f"{least} to {most} workers"
            say(f"{team} on {workers.described(resources)}; the run lies in {folder}")
            with _told_how_to_go_on(config, folder), Progress(config, folder):
                metrics, tested = workers.fit(
                    train_and_test, config, name, resources, max_failures=config.cluster.max_failures,
                    before_resize=functools.partial(save_now, folder),
                )  # fmt: skip
        run.add_artifact(paths.model(folder), "model")
        run.add_artifact(paths.config_file(folder), None)
        if tested is not None:
            run.add_metrics(tested.step, report.metrics_of(tested.scores))
            for file in report.write_evaluation(config, folder, tested):
                run.add_artifact(file, "evaluation")
        scores = None if tested is None else tested.scores
        for picture in _draw(config, folder, scores):
            run.add_artifact(picture, "pictures")
    return Outcome(name, folder, metrics, scores, experiment.how_to_compare(tracking, output, view))


def train_and_test(config: Config, worker: Worker) -> tuple[dict[str, float], Evaluated | None]:
    """What each worker of a run does."""
    preflight.check_shared(config)
    metrics = loop.train(config, worker)
    return metrics, loop.evaluate(config, worker) if config.evaluation.num_test_episodes else None


def _tell_of_idle_workers(config: Config) -> None:
    chunks = num_chunks(config.outer.meta_batch_size, config.outer.reduction_chunk)
    if config.cluster.team[1] > chunks:
        say(
            f"{config.cluster.num_workers} workers, but a step has {workers.count(chunks, 'chunk')} of "
            f"{workers.count(config.outer.reduction_chunk, 'task')}: the others have nothing to do. A smaller "
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
    except (ClusterError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):
            save_now(folder)  # the workers train until their cluster is let go of
        if checkpoint.steps(paths.checkpoints(folder)):
            say(f"Its checkpoints are kept: the same command with --name {config.run.name} goes on.")
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
        config = workers.checked(config)
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
        with workers.cluster(config) as resources:
            scoring = functools.partial(loop.evaluate, split=split, step=step)
            found: Evaluated = workers.fit(scoring, config, f"{config.run.name}-{split}", resources, max_failures=0)
        episodes, steps = config.evaluation.num_episodes(split), config.evaluation.num_eval_steps
        name = f"evaluation-{split}-{episodes}-episodes-{steps}-steps" + ("" if step is None else f"-at-{step}")
        files = report.write_evaluation(config, folder, found, split=split, name=name)
        # Not test/*: what the run itself measured at its end stays its result.
        metrics = report.metrics_of(found.scores, prefix=f"evaluation_{split}")
        experiment.add_evaluation(folder, tracking, found.step, metrics, files)
    return found, files
