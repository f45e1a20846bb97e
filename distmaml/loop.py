"""The training loop and the evaluation, the same code for one worker or many, with or without a cluster.

A step: take this worker's chunks of tasks, sum their meta-gradients, add up over the workers, step. All that decides
something (early stop, divergence, the best model) is computed from sums that every worker has, so all decide alike.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from distmaml import build, checkpoint, collectives, gpu, mirror, outer, paths
from distmaml.config import Config, from_json
from distmaml.episodes import TaskDistribution, num_chunks, shard
from distmaml.errors import DivergenceError
from distmaml.evaluation import scores_on
from distmaml.machine import machine_of
from distmaml.meter import Meter
from distmaml.prefetch import prefetched
from distmaml.recorder import Recorder, check_data, check_origin, file_of
from distmaml.scoring import Evaluated, by_step
from distmaml.selection import Selection, best_of, selected
from distmaml.trees import floats, named_leaves, tree_to
from distmaml.worker import Worker

log = logging.getLogger("distmaml")


def train(config: Config, worker: Worker) -> dict[str, float]:
    """Meta-trains until `num_outer_steps` or an early stop; goes on from the newest checkpoint in the run's folder.

    Args:
      config: one that `limits.check` lets pass, with a name.

    Returns:
      The last value of each metric, where there was a step left to train, the best of the selection metric, and the
      step it ended at.

    Raises:
      DivergenceError: a loss or gradient that is not finite; checkpoints from before it are kept.
      RunError: a run that other settings or other data have begun; a folder that cannot be written.
      CheckpointError: no checkpoint of the run is whole.
      ConfigError, DataError: a task, model or objective that cannot be built.
    """
    mirror.take_state(config, worker.device)
    options, evaluation = config.outer, config.evaluation
    tasks = build.task_distributions(config, worker.device)
    shapes = build.shapes(tasks["train"])
    learner = build.learner(config, shapes, worker.device)
    state = outer.init_outer(learner.meta_params, options)
    start, selection = _restore(config, worker, state)
    recorder = Recorder(config, start, shapes=shapes._asdict()) if worker.rank == 0 else None
    shards = shard(options.meta_batch_size, options.reduction_chunk, worker.rank, worker.world_size)
    chunks_per_step = num_chunks(options.meta_batch_size, options.reduction_chunk)
    like = _shape_of_sums(config, worker, learner, tasks["train"])
    summed = gpu.replayed(
        partial(outer.chunk_sum, learner.algorithm, state.meta_params, vectorize=learner.vectorize),
        worker.device, steady_from=learner.algorithm.steady_from,
    )  # fmt: skip
    meter = Meter(options.meta_batch_size)
    values, done = dict[str, float](), start

    for step, chunks in prefetched(
        tasks["train"], shards, steps=range(start, start if selection.is_over(evaluation) else options.num_outer_steps),
        tasks_per_step=options.meta_batch_size, device=worker.device, dtype=getattr(torch, options.dtype),
    ):  # fmt: skip
        sums = {chunk.number: (summed(chunk.tasks, step), chunk.num_tasks) for chunk in chunks}
        hurry = worker.leaving() or (recorder is not None and recorder.asked_to_save())
        (grads, metrics), _, urgent = collectives.mean_over_tasks(
            sums, like, num_chunks=chunks_per_step, ordered=options.reduction == "ordered", flag=hurry
        )
        norm = outer.outer_step(state, grads, step, options)
        done = step + 1
        seen = floats({**metrics, "gradient_norm": norm, "parameter_norm": outer.parameter_norm(state)})
        _check_finite(seen, done, config)
        meter.add({name: value for name, value in seen.items() if name != "parameter_norm"})
        values = {name: seen[name] for name in metrics}
        last = done == options.num_outer_steps
        improved = False
        if evaluation.val_every and (done % evaluation.val_every == 0 or last):
            with meter.excluded():
                found = _validate(config, worker, learner, state.meta_params, tasks)
            selection = selection.after(selected(found, evaluation), evaluation)
            improved = selection.stale == 0
            values.update(found)
            if recorder:
                recorder.points(done, {**found, **(best_of(selection, evaluation) if improved else {})})
        last = last or selection.is_over(evaluation)
        improved = improved or (selection.best is None and last)  # a run has a result, whatever it is
        due = done % config.run.checkpoint_every == 0 or last
        if due or done % config.run.log_every == 0:
            read = {**meter.read(), "system/outer_lr": outer.learning_rate(step, options)}
            read["system/cpu_seconds"] = collectives.total(read["system/cpu_seconds"], worker.device)
            if recorder:
                recorder.points(done, read)
        if recorder:
            with meter.excluded():
                if improved:
                    recorder.model(done, named_leaves(state.meta_params), evaluation.selection_metric, selection.best)
                if due or urgent:  # not reported: what is heard of at other times than planned could decide something
                    recorder.checkpoint(done, outer.named_state(state), selection._asdict(), in_turn=due)
                recorder.progress(done, last=last)
        if due:
            worker.report({"step": float(done), **values})
        if last:
            break
    return {**values, **best_of(selection, evaluation), "step": float(done)}


def evaluate(
    config: Config, worker: Worker, *, split: str = "test", step: int | None = None,
    tell: Callable[[float], None] | None = None,
) -> Evaluated:  # fmt: skip
    """Scores the run's model, or its checkpoint after `step`, on episodes of a split; every worker gets the result.

    Args:
      tell: hears what share of them this worker has done.

    Raises:
      CheckpointError: there is no such file, or it is damaged or of another model.
      RunError: the data are not those that it was trained on.
    """
    collectives.wait_for_all(worker.device)  # rank 0 may still be writing the file that all read
    file = mirror.take_file(config, file_of(paths.run_folder(config), step))
    tasks = build.task_distributions(config, worker.device)
    tensors, document = checkpoint.load(file)
    check_data(document, config)
    # What it was trained with, which is not what the run has by now where a search has changed it in between.
    trained = from_json(document["config"])
    learner = build.learner(trained, build.shapes(tasks["train"]), worker.device)
    meta_params = outer.load_meta_params(learner.meta_params, tensors, prefix="" if step is None else outer.META_PARAMS)
    inductive = config.evaluation.inductive
    scores = scores_on(config, worker, learner, meta_params, tasks[split], split, inductive=inductive, tell=tell)
    return Evaluated(document["step"], scores, machine_of(worker.device))


def _validate(
    config: Config, worker: Worker, learner: build.Learner, meta_params: Any, tasks: dict[str, TaskDistribution]
) -> dict[str, float]:
    scores = scores_on(config, worker, learner, meta_params, tasks["val"], "val", inductive=False)
    means = [by_step(f"val/{metric}", intervals) for metric, intervals in scores["transductive"].items()]
    return {name: mean for found in means for name, mean in found.items()}


def _restore(config: Config, worker: Worker, state: Any) -> tuple[int, Selection]:
    """The step of the newest whole checkpoint, and how the run stood then; fills the state from it."""
    folder = paths.checkpoints(paths.run_folder(config))
    step = collectives.from_first((checkpoint.newest(folder) or 0) if worker.rank == 0 else 0, worker.device)
    if step == 0:
        return 0, Selection()
    if worker.rank == 0 and step < checkpoint.steps(folder)[-1]:
        log.warning("Going back to the checkpoint of step %d: newer ones are damaged.", step)
    tensors, document = checkpoint.load(checkpoint.path_of(folder, step))
    check_origin(document, config)
    outer.load_named_state(state, tensors)
    return step, Selection.of(document)


def _shape_of_sums(config: Config, worker: Worker, learner: build.Learner, tasks: TaskDistribution) -> Any:
    """A tree like the sums of a step, from one task: a worker without a chunk needs it too."""
    one = tree_to(tasks.sample([0]), worker.device, getattr(torch, config.outer.dtype))
    return outer.chunk_sum(learner.algorithm, learner.meta_params, one, 0, vectorize=learner.vectorize)


def _check_finite(values: dict[str, float], step: int, config: Config) -> None:
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise DivergenceError(
            f"{', '.join(wrong)} is no longer finite at outer step {step}. The likely cause is a learning rate that is "
            f"too large: lower --inner-lr or --outer-lr (now {config.outer.outer_lr}), or set --clip-norm. "
            "The last checkpoint from before it is kept."
        )
