"""The life of one training run: checks before the start, the MLflow run, the workers, signals, and the end."""

import functools
import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from distmaml import build, checkpoint, experiment, loop, mirror, paths, preflight, rehearsal, report, workers
from distmaml.config import Config, flatten, override, to_json
from distmaml.episodes import num_chunks
from distmaml.errors import ClusterError, ConfigError, RunError
from distmaml.files import write_text
from distmaml.interrupt import Interrupt, interruptible
from distmaml.mirror import Mirror
from distmaml.progress import Progress, say
from distmaml.recorder import EvaluationProgress, check_data, file_of, save_now
from distmaml.scoring import Evaluated, Intervals
from distmaml.worker import Worker

log = logging.getLogger("distmaml")

SAVE_SECONDS = 30.0
"""For a checkpoint when a run is stopped; more than one long step."""


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
    storage = mirror.of(config)
    preflight.take_run(storage, folder)
    if not config.run.resume and preflight.is_interrupted(config, folder):
        say(f"{name} was stopped after {checkpoint.steps(paths.checkpoints(folder))[-1]} outer steps: it goes on.")
        config = override(config, {"resume": True})
    if config.run.resume:
        preflight.check_resumable(config, folder)
    else:
        preflight.check_new(config, folder)
    rehearsal.rehearse(config)
    tracking = experiment.open_tracking(config, resuming=folder if config.run.resume else None)
    if not tracking.reachable:
        say("The run goes on without it: its points are kept in its folder, and sent when the server is back.")
    if not config.run.resume and preflight.remove_false_start(folder):
        say(f"An earlier {name} ended before its first checkpoint; it starts anew.")
        storage.clear()
    with ExitStack() as at_last, experiment.tracked(config, folder, tracking, interrupt) as run:
        view = experiment.view(config, run, tracking)
        write_text(paths.config_file(folder), json.dumps(to_json(config), indent=2))
        build.pin_store(config)
        storage.delete(paths.progress(folder), paths.save_request(folder))  # of an earlier start
        at_last.enter_context(storage.kept())  # whose end is after that of the MLflow run
        shutil.rmtree(paths.ray(output) / name, ignore_errors=True)  # of a driver that was killed outright
        with workers.cluster(config) as resources:
            workers.check_precision(config, resources)
            _tell_of_idle_workers(config)
            _tell_of_few_steps(config)
            least, most = config.cluster.team
            team = workers.count(most, "worker") if least == most else f"{least} to {most} workers"
            say(f"{team} on {workers.described(resources)}; the run lies in {storage.shown or folder}")
            with storage.followed(), _told_how_to_go_on(config, folder, storage), Progress(config, folder):
                metrics, tested = workers.fit(
                    train_and_test, config, name, resources, max_failures=config.cluster.max_failures,
                    before_resize=functools.partial(save_now, folder, storage=config.run.storage),
                )  # fmt: skip
                storage.follow()
        storage.pull(paths.model(folder))
        storage.pull_newest()
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
    if not config.evaluation.num_test_episodes:
        return metrics, None
    tell = EvaluationProgress(config, int(metrics["step"])) if worker.rank == 0 else None
    return metrics, loop.evaluate(config, worker, tell=tell)


def _tell_of_idle_workers(config: Config) -> None:
    chunks = num_chunks(config.outer.meta_batch_size, config.outer.reduction_chunk)
    if config.cluster.team[1] > chunks:
        say(
            f"{config.cluster.num_workers} workers, but a step has {workers.count(chunks, 'chunk')} of "
            f"{workers.count(config.outer.reduction_chunk, 'task')}: the others have nothing to do. A smaller "
            "--reduction-chunk makes more."
        )


def _tell_of_few_steps(config: Config) -> None:
    trained, tested = flatten(config).get("num_inner_steps", 0), config.evaluation.num_eval_steps
    if tested < trained:
        say(
            f"{config.algorithm} trains by {trained} inner steps, and is validated and tested after {tested}; "
            f"--num-eval-steps {trained} tests what it trains for."
        )


def _draw(config: Config, folder: Path, scores: Intervals | None) -> list[Path]:
    """The run's pictures. What goes wrong with them must not make a failure of a run that is trained and tested."""
    try:
        return report.draw(config, folder, scores)
    except Exception as error:
        log.warning("The pictures could not be drawn (%s). All else is there.", build.described(error))
        return []


@contextmanager
def _told_how_to_go_on(config: Config, folder: Path, storage: Mirror) -> Iterator[None]:
    try:
        yield
    except (ClusterError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and _is_training(config, folder):
            # The workers train until their cluster is let go of.
            save_now(folder, storage=storage.uri, seconds=SAVE_SECONDS)
        with suppress(RunError):
            if storage.hasty().checkpoints():
                say(f"Its checkpoints are kept: the same command with --name {config.run.name} goes on.")
        raise


def _is_training(config: Config, folder: Path) -> bool:
    """Whether the workers were at it a moment ago, and neither at their start nor at the test."""
    try:
        progress = json.loads(paths.progress(folder).read_text())
        age = time.time() - paths.progress(folder).stat().st_mtime
    except (OSError, ValueError):
        return False
    return age < SAVE_SECONDS and "tested" not in progress and int(progress["step"]) < config.outer.num_outer_steps


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
        folder, storage = paths.run_folder(config), mirror.of(config)
        known = storage.checkpoints()
        if step is not None and step not in known:
            raise ConfigError(
                f"step={step} has no checkpoint; there are those of {', '.join(map(str, known)) or 'none'}."
            )
        storage.pull(paths.pinned_store(folder), file_of(folder, step))
        check_data(checkpoint.load(file_of(folder, step))[1], config)
        opened = build.store(config)
        if opened is not None:
            opened.verify()
        if storage.uri:
            with suppress(RunError), preflight.claimed(folder):  # otherwise its driver, on this node, knows better
                storage.pull_tracking()
        tracking = experiment.open_tracking(config, resuming=folder)
        with workers.cluster(config) as resources:
            scoring = functools.partial(loop.evaluate, split=split, step=step)
            found: Evaluated = workers.fit(scoring, config, f"{config.run.name}-{split}", resources, max_failures=0)
        episodes, steps = config.evaluation.num_episodes(split), config.evaluation.num_eval_steps
        name = f"evaluation-{split}-{episodes}-episodes-{steps}-steps" + ("" if step is None else f"-at-{step}")
        files = report.write_evaluation(config, folder, found, split=split, name=name)
        # Not test/*: what the run itself measured at its end stays its result.
        metrics = report.metrics_of(found.scores, prefix=f"evaluation_{split}")
        if storage.uri and experiment.status(folder) is None:
            say("The run has not ended, as far as its storage knows: MLflow is not told of these scores.")
        else:
            experiment.add_evaluation(folder, tracking, found.step, metrics, files)
        storage.push_own()
    return found, files
