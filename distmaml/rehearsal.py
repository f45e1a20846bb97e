"""The rehearsal of a run: one task in the command's own process, before any cluster work.

Nothing of workers, MLflow or files but the data and the checkpoint that a run goes on from; preflight.py has the rest.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distmaml import build, checkpoint, paths
from distmaml.config import Config
from distmaml.engine import warn_once
from distmaml.errors import ConfigError, DistmamlError, first_line
from distmaml.outer import chunk_sum, init_outer, load_named_state
from distmaml.scoring import score
from distmaml.trees import Tree, tree_to


def rehearse(config: Config) -> None:
    """One task's gradient and score in this process, so that a mistake shows before any cluster work.

    Raises:
      ConfigError: options that do not get along.
      DataError: data that are not there or do not suffice.
    """
    try:
        opened = build.store(config)
        if opened is not None:
            opened.verify()
        learner = _train_and_score_one(config)
        if config.run.resume:
            _check_restorable(config, learner.meta_params)
    except DistmamlError:
        raise
    except Exception as error:  # whatever a user's own code raises
        if "allocate memory" in str(error) or isinstance(error, MemoryError):
            raise ConfigError(
                f"the memory of this machine does not suffice for one task ({first_line(error)})."
            ) from error
        raise ConfigError(
            f"model={config.model!r} does not get along with tasks={config.tasks!r} and objective={config.objective!r}"
            f": {build.described(error)}."
        ) from error
    judged = sorted(f"val/query_{name}" for name in ("loss", *learner.objective.metrics))
    metric, _, step = config.evaluation.selection_metric.partition("_step_")
    most = config.evaluation.num_eval_steps if learner.algorithm.descends else -1
    if metric not in judged or (step and not (step.isdecimal() and int(step) <= most)):
        also = f", each also with _step_0 to _step_{most} behind it" if learner.algorithm.descends else ""
        raise ConfigError(
            f"selection_metric={config.evaluation.selection_metric!r} is not among the metrics of this run: "
            f"{', '.join(judged)}{also}."
        )


def _train_and_score_one(config: Config) -> build.Learner:
    device, dtype = torch.device("cpu"), getattr(torch, config.outer.dtype)
    tasks = build.task_distributions(config)
    learner = build.learner(config, build.shapes(tasks["train"]), device)
    one, other = (tree_to(tasks[split].sample([0]), device, dtype) for split in ("train", "val"))
    with _quietly():
        for step in sorted(
            {0, getattr(config.algorithm_options, "first_order_steps", 0)}
        ):  # where the gradient changes
            chunk_sum(learner.algorithm, learner.meta_params, one, step, vectorize=learner.vectorize)
        found = score(learner.algorithm, learner.objective, learner.meta_params, other, num_steps=1,
                      inductive=config.evaluation.inductive, vectorize=learner.vectorize)  # fmt: skip
    returned = sorted(name.removeprefix("query_") for name in found["transductive"] if name != "query_loss")
    if returned != sorted(learner.objective.metrics):
        raise ConfigError(
            f"objective={config.objective!r} names the metrics {sorted(learner.objective.metrics)}, and its loss "
            f"returns {returned}. Make the two agree."
        )
    return learner


def _check_restorable(config: Config, meta_params: Tree) -> None:
    folder = paths.checkpoints(paths.run_folder(config))
    last = checkpoint.newest(folder)
    if last is not None:
        tensors, _ = checkpoint.load(checkpoint.path_of(folder, last))
        load_named_state(init_outer(meta_params, config.outer), tensors)


@contextmanager
def _quietly() -> Iterator[None]:
    """One thread, as in a worker, and no warning of what rank 0 will say again."""
    logger, threads = logging.getLogger("distmaml"), torch.get_num_threads()
    level = logger.level
    torch.set_num_threads(1)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logger.setLevel(level)
        warn_once.cache_clear()
